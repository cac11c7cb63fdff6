//! Follows paths as a pod will: `/nix/store` is the node store, and there is nothing outside the closure.
//!
//! A package may be, or contain, links to anywhere. Followed by this process they would lead into the
//! driver's own files, or miss what is in the closure.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::ViewError;
use crate::path_error::PathError;
use crate::store::Layout;

/// The closure of a view, to look around in.
pub(super) struct Inside<'a> {
    root: OwnedFd,
    store_dir: PathBuf,
    closure: &'a [StorePath],
}

impl<'a> Inside<'a> {
    /// `closure` must be sorted.
    pub(super) fn new(layout: &Layout, closure: &'a [StorePath]) -> Result<Self, ViewError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, layout.root(), flags, Mode::empty())
            .map_err(PathError::on("open", layout.root()))?;
        Ok(Self { root, store_dir: layout.store_dir(), closure })
    }

    /// Where `logical` really is on this node; `None` if a pod with this closure would not find it.
    pub(super) fn resolve(&self, logical: &Path) -> Option<PathBuf> {
        let relative = logical.strip_prefix("/").ok()?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(&self.root, relative, flags, Mode::empty(), resolve).ok()?;
        let physical = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
        let base = physical.strip_prefix(&self.store_dir).ok()?.components().next()?;
        let base = base.as_os_str().to_str()?;
        self.closure.binary_search_by(|path| path.base_name().cmp(base)).is_ok().then_some(physical)
    }
}
