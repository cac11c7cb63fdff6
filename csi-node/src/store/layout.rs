//! Where everything is under the root, and who may write there.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;
use rustix::fs::FlockOperation;

use super::db::DatabaseError;
use super::provenance::ProvenanceError;
use crate::path_error::PathError;

/// The layout that this program writes. Larger numbers come from newer programs.
const FORMAT: u32 = 1;

/// Why a node store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// A path that mounts cannot use.
    #[error("{} cannot be the root: it is longer than 90 bytes or contains `:`, `,` or `\\\\`", root.display())]
    Root {
        /// The root.
        root: PathBuf,
    },
    /// Another process writes there.
    #[error("{} is in use by {by}; stop it, or use a command that only reads", root.display())]
    Held {
        /// The root.
        root: PathBuf,
        /// What the holder wrote about itself.
        by: String,
    },
    /// Written by a newer program.
    #[error("{} has format {found:?}, this program knows {FORMAT}; use the newer program", path.display())]
    Format {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// Hard links do not work from the store to the views.
    #[error(
        "cannot link from {} to {}: both must be in one mount of one filesystem, \
         so mount the whole directory once and nothing below it",
        from.display(), to.display()
    )]
    Link {
        /// A file in the store directory.
        from: PathBuf,
        /// Its link in the views directory.
        to: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The database cannot be opened.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Nor the one that says where paths came from.
    #[error(transparent)]
    Provenance(#[from] ProvenanceError),
}

/// The paths under a root. Only names: apart from `Layout::open` nothing here touches the disk.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes what is missing under `root`, and checks that it can be worked with.
    pub(super) fn open(root: &Path) -> Result<Self, OpenError> {
        make_dir(root, 0o755).map_err(PathError::on("create", root))?;
        // Nix refuses a store below a symlink.
        let root = root.canonicalize().map_err(PathError::on("resolve", root))?;
        // What overlayfs would read as a separator, and what does not fit into one of its options.
        if root.as_os_str().len() > 90
            || root.as_os_str().as_encoded_bytes().iter().any(|b| b":,\\".contains(b))
        {
            return Err(OpenError::Root { root });
        }
        // Other users of the host have no business in what pods may have fetched with credentials.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))
            .map_err(PathError::on("protect", &root))?;
        let layout = Self { root };
        layout.check_format()?;
        for (dir, mode) in [
            (layout.store_dir(), 0o755),
            (layout.db_dir(), 0o755),
            (layout.temp_roots(), 0o755),
            (layout.view_roots(), 0o755),
            (layout.views(), 0o755),
            // Uppers may hold a setuid file that a pod left; staging is not verified yet.
            (layout.staging(), 0o700),
            (layout.volumes(), 0o700),
            (layout.trash(), 0o700),
        ] {
            make_dir(&dir, mode).map_err(PathError::on("create", &dir))?;
        }
        layout.probe_link()?;
        Ok(layout)
    }

    fn check_format(&self) -> Result<(), OpenError> {
        let path = self.root.join("format");
        match fs::read_to_string(&path) {
            Ok(found) if found.trim() == FORMAT.to_string() => Ok(()),
            Ok(found) => Err(OpenError::Format { path, found: found.trim().chars().take(20).collect() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let beside = self.root.join(".format");
                fs::write(&beside, format!("{FORMAT}\n")).map_err(PathError::on("write", &path))?;
                fs::rename(&beside, &path).map_err(PathError::on("write", &path))?;
                Ok(())
            }
            Err(error) => Err(PathError::on("read", &path)(error).into()),
        }
    }

    /// A real link, because two mounts of one filesystem look the same until `link` says EXDEV.
    fn probe_link(&self) -> Result<(), OpenError> {
        // `.links` is the one name in the store directory that Nix's collector leaves alone.
        let links = self.store_dir().join(".links");
        let (from, to) = (links.join(".probe"), self.views().join(".probe"));
        let made =
            make_dir(&links, 0o755).and_then(|()| fs::write(&from, b"")).and_then(
                |()| match fs::remove_file(&to) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => fs::hard_link(&from, &to),
                },
            );
        let _ = (fs::remove_file(&from), fs::remove_file(&to));
        made.map_err(|source| OpenError::Link { from, to, source })
    }

    /// The directory that holds all of it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the files of a store path are on this node.
    pub fn physical(&self, path: &StorePath) -> PathBuf {
        self.store_dir().join(path.base_name())
    }

    /// The store directory on this node.
    pub fn store_dir(&self) -> PathBuf {
        self.root.join("nix/store")
    }

    /// Views, by their id.
    pub fn views(&self) -> PathBuf {
        self.root.join("views")
    }

    /// Volumes, by their id.
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// When which view was used last.
    pub fn usage(&self) -> PathBuf {
        self.root.join("used.json")
    }

    /// Where commands reach the driver that holds the store.
    pub fn control(&self) -> PathBuf {
        control_socket(&self.root)
    }

    pub(super) fn provenance(&self) -> PathBuf {
        self.root.join("provenance.sqlite")
    }

    pub(super) fn state_dir(&self) -> PathBuf {
        self.root.join("nix/var/nix")
    }

    /// Nix's lock between collectors and whoever makes a root.
    pub(super) fn gc_lock(&self) -> PathBuf {
        self.state_dir().join("gc.lock")
    }

    pub(super) fn db_dir(&self) -> PathBuf {
        self.state_dir().join("db")
    }

    pub(super) fn temp_roots(&self) -> PathBuf {
        self.state_dir().join("temproots")
    }

    pub(super) fn view_roots(&self) -> PathBuf {
        self.state_dir().join("gcroots/nix-csi")
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }
}

/// Where commands reach the driver that holds the store under `root`.
pub fn control_socket(root: &Path) -> PathBuf {
    root.join("control.sock")
}

/// Makes `dir` and its parents, readable to all; `dir` itself gets `mode`. One that is there keeps its own.
fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => fs::set_permissions(dir, fs::Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Held by the one process that may write under a root, until it ends.
#[derive(Debug)]
pub struct RootLock {
    _file: File,
}

impl RootLock {
    /// Takes the lock, or says who holds it.
    pub fn acquire(root: &Path, who: &str) -> Result<Self, OpenError> {
        let path = root.join("lock");
        make_dir(root, 0o755).map_err(PathError::on("create", root))?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(PathError::on("open", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut by = String::new();
                let _ = file.take(200).read_to_string(&mut by);
                return Err(OpenError::Held { root: root.into(), by: by.trim().to_owned() });
            }
            Err(error) => return Err(PathError::on("lock", &path)(error).into()),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{who}, process {}", std::process::id()))
            .map_err(PathError::on("write", &path))?;
        Ok(Self { _file: file })
    }
}
