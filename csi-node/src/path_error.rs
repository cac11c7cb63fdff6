//! The commonest error of a node: a system call on a path.

use std::io;
use std::path::{Path, PathBuf};

/// A system call failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {}", path.display())]
pub struct PathError {
    /// What was tried, as it reads after "cannot".
    pub op: &'static str,
    /// On what.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl PathError {
    /// For `map_err`: turns what the system says of `op` on `path` into an error that names both.
    pub(crate) fn on<E: Into<io::Error>>(op: &'static str, path: &Path) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| Self { op, path, source: source.into() }
    }
}
