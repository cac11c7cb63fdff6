//! `/nix/var/result`: one package as it is, several merged the way `buildEnv` does it.
//!
//! Directories that more than one package has become directories; everything else is a link to the first
//! package that has it. So the order of the packages decides, and nothing depends on the system's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;

use super::ViewError;
use crate::store::Layout;

/// A directory of some package: as a pod will see it, and where it is now.
#[derive(Clone)]
struct Source {
    logical: PathBuf,
    physical: PathBuf,
}

/// Makes `result` out of the packages.
pub(super) fn build(layout: &Layout, packages: &[StorePath], result: &Path) -> Result<(), ViewError> {
    if let [package] = packages {
        return link(Path::new(&package.to_string()), result);
    }
    let sources: Vec<_> = packages
        .iter()
        .map(|path| Source { logical: path.to_string().into(), physical: layout.physical(path) })
        // A package that is a file has nothing to merge.
        .filter(|source| source.physical.is_dir())
        .collect();
    merge(&sources, result)
}

fn merge(sources: &[Source], target: &Path) -> Result<(), ViewError> {
    fs::create_dir(target).map_err(io("create", target))?;
    let mut entries: BTreeMap<OsString, Vec<Source>> = BTreeMap::new();
    for source in sources {
        for entry in fs::read_dir(&source.physical).map_err(io("read", &source.physical))? {
            let entry = entry.map_err(io("read", &source.physical))?;
            let name = entry.file_name();
            let (logical, physical) = (source.logical.join(&name), entry.path());
            entries.entry(name).or_default().push(Source { logical, physical });
        }
    }
    for (name, sources) in entries {
        let target = target.join(&name);
        match &sources[..] {
            [_, _, ..] if sources.iter().all(|source| is_real_dir(&source.physical)) => {
                merge(&sources, &target)?;
            }
            [first, rest @ ..] => {
                if !rest.is_empty() {
                    tracing::warn!(
                        used = %first.logical.display(),
                        hidden = %rest[0].logical.display(),
                        "two packages have the same file"
                    );
                }
                link(&first.logical, &target)?;
            }
            [] => {}
        }
    }
    Ok(())
}

/// A link inside a package is linked to as it is: its target is logical, and not there on the node.
fn is_real_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn link(to: &Path, at: &Path) -> Result<(), ViewError> {
    symlink(to, at).map_err(io("link", at))
}

fn io(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ViewError + use<> {
    let path = path.to_owned();
    move |source| ViewError::Io { op, path, source }
}
