//! A *view*: what a pod sees at `/nix`, hard-linked out of the node store, shared by all who ask for the same.
//!
//! ```text
//! views/<id>/store/<hash>-<name>     linked: one inode with the node store, for the closure and nothing else
//! views/<id>/var/result              the package, or all of them merged
//! views/<id>/var/nix/db              Nix's database of this closure, where Nix is in it or it is asked for
//! views/<id>/var/entry/<container>   link to what a container without a command runs
//! views/<id>/nix -> .                for pods that mount with `subPath: nix`
//! ```
//! **Invariant:** a view appears by one rename, whole. What is half built has another name.
//! **Invariant:** a view never outlives its roots, and nothing here writes through a link.

mod database;
mod entry;
mod inside;
mod link;
mod profile;
mod spec;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;

pub use entry::EntryError;
pub(crate) use profile::Collisions;
pub use spec::{ViewId, ViewSpec};

use crate::fault;
use crate::path_error::PathError;
use crate::store::{DatabaseError, NodeStore};

/// Between the id of a view that is not to be used any more and a fresh name.
const RETIRED: &str = ".retired-";

/// Why a view could not be built. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// No file of one place can be linked to the other.
    #[error(
        "cannot link from {} to {}: both must be in one mount of one filesystem, and something is mounted over \
         one of them; mount the whole directory once and nothing below it",
        from.display(), to.display()
    )]
    OtherFilesystem {
        /// In the node store.
        from: PathBuf,
        /// In the view.
        to: PathBuf,
    },
    /// The database of the closure.
    #[error("the database for the view")]
    Database(#[source] DatabaseError),
    /// A container's entry point cannot be chosen.
    #[error(transparent)]
    Entry(#[from] EntryError),
}

/// Where the view of `id` is, if it is built.
pub fn find(store: &NodeStore, id: &ViewId) -> Option<PathBuf> {
    let path = store.layout().views().join(id.as_str());
    path.is_dir().then_some(path)
}

/// Whether a view of that name is not to be used any more.
pub(crate) fn is_retired(name: &str) -> bool {
    name.contains(RETIRED)
}

/// A view, and what there is to say about how it was built.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Built {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Files of which there can be no more links.
    pub(crate) copied: u64,
    /// Files of the profile that several packages have.
    pub(crate) collisions: Collisions,
}

/// Builds the view of `spec` over `closure`, unless it is there.
///
/// Somebody must keep `closure` from collectors until this returns; from then on the view does.
pub fn build(store: &NodeStore, spec: &ViewSpec, closure: &[StorePath]) -> Result<PathBuf, ViewError> {
    build_and_tell(store, spec, closure).map(|built| built.path)
}

/// The same, with what there is to say. Nothing, if the view was there.
pub(crate) fn build_and_tell(
    store: &NodeStore,
    spec: &ViewSpec,
    closure: &[StorePath],
) -> Result<Built, ViewError> {
    let id = spec.id();
    if let Some(path) = find(store, &id) {
        return Ok(Built { path, ..Built::default() });
    }
    let views = store.layout().views();
    let beside = views.join(format!(".{}-{}", id.as_str(), store.fresh_name()));
    let path = views.join(id.as_str());
    let built = build_at(store, spec, closure, &beside).and_then(|built| match fs::rename(&beside, &path) {
        Err(source) if !path.is_dir() => Err(PathError::on("move into place", &path)(source).into()),
        // Another process may have been faster: then ours is cleared away below.
        _ => Ok(built),
    });
    fault::point("view.placed");
    // From where nothing can be linked, nothing can be renamed either.
    if beside.exists() && store.discard(&beside).is_err() {
        let _ = fs::remove_dir_all(&beside);
    }
    if built.is_err() && find(store, &id).is_none() {
        let _ = store.remove_roots(id.as_str());
    }
    built.map(|built| Built { path, ..built })
}

/// Retires every view that shows `path`: it stays for the volumes that have it mounted, and is not found any more.
/// Gives back their ids.
pub fn retire(store: &NodeStore, path: &StorePath) -> std::io::Result<Vec<String>> {
    let views = store.layout().views();
    let mut retired = Vec::new();
    for entry in fs::read_dir(&views)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let shows = fs::symlink_metadata(views.join(&name).join("store").join(path.base_name())).is_ok();
        if shows && !is_retired(&name) {
            fs::rename(views.join(&name), views.join(format!("{name}{RETIRED}{}", store.fresh_name())))?;
            retired.push(name);
        }
    }
    Ok(retired)
}

fn build_at(
    store: &NodeStore,
    spec: &ViewSpec,
    closure: &[StorePath],
    at: &Path,
) -> Result<Built, ViewError> {
    store.add_roots(spec.id().as_str(), &spec.packages).map_err(PathError::on("write the roots of", at))?;
    fault::point("view.rooted");
    for dir in [at.to_owned(), at.join("store"), at.join("var"), at.join("var/entry")] {
        fs::create_dir(&dir).map_err(PathError::on("create", &dir))?;
    }
    symlink(".", at.join("nix")).map_err(PathError::on("link", &at.join("nix")))?;
    let copied = link::link_paths(&store.layout().store_dir(), &at.join("store"), closure)?;
    fault::point("view.linked");
    let inside = inside::Inside::new(store.layout(), closure)?;
    let collisions = profile::build(&inside, &spec.packages, &at.join("var/result"))?;
    if database::is_wanted(store, spec.database, closure) {
        database::write(store, closure, at)?;
    }
    for (container, entrypoint) in &spec.entrypoints {
        let program = entry::find(&inside, &spec.packages, container, entrypoint)?;
        let link = at.join("var/entry").join(container);
        symlink(program, &link).map_err(PathError::on("link", &link))?;
    }
    fault::point("view.filled");
    Ok(Built { path: at.to_owned(), copied, collisions })
}
