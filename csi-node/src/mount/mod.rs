//! The one place that knows the kernel's mounts.
//!
//! A mount is made detached, sealed, and only then attached: at no instant, in no mount namespace it
//! propagates to, is it writable or open to setuid files. What is asked for is an enum, so that it can be
//! answered by a helper process with more privileges than the rest of the driver.

mod quota;
mod syscalls;

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

pub use quota::has_quotas;
pub use syscalls::probe;

use crate::fault;
use crate::path_error::PathError;

/// Why something is not mounted as it should be. Nothing is left attached.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct MountError(#[from] PathError);

/// What is to be at a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountRequest {
    /// The view itself, which nobody can write through this mount.
    ReadOnly {
        /// The view.
        view: PathBuf,
    },
    /// The view below, and what the pod writes in a directory of its own.
    ReadWrite {
        /// The view.
        view: PathBuf,
        /// Where writes go.
        upper: PathBuf,
        /// overlayfs' own directory, beside `upper`.
        work: PathBuf,
        /// How many bytes the two may take together, where the filesystem enforces it.
        limit: Option<u64>,
    },
    /// The same, with what the pod writes in memory of its own. It is gone with the mount.
    ReadWriteInMemory {
        /// The view.
        view: PathBuf,
        /// An empty directory of the volume's, on which the memory is mounted for a moment.
        memory: PathBuf,
        /// How much of it.
        bytes: u64,
    },
}

/// Mounts what is asked for at `target`, an existing empty directory.
pub fn mount(request: &MountRequest, target: &Path) -> Result<(), MountError> {
    match request {
        MountRequest::ReadOnly { view } => bind_read_only(view, target),
        MountRequest::ReadWrite { view, upper, work, limit } => {
            if let Some(bytes) = limit {
                quota::limit(upper, work, *bytes)?;
            }
            overlay(view, upper, work, target)
        }
        MountRequest::ReadWriteInMemory { view, memory, bytes } => {
            overlay_in_memory(view, memory, *bytes, target)
        }
    }
}

/// What the system says of a mount, with the target that it was for.
fn fail<E: Into<io::Error>>(op: &'static str, target: &Path) -> impl FnOnce(E) -> MountError + use<E> {
    let fail = PathError::on(op, target);
    move |source| MountError(fail(source))
}

/// Shows `view` read-only. Shares its inodes with the node store, and so its page cache.
fn bind_read_only(view: &Path, target: &Path) -> Result<(), MountError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, view, flags).map_err(fail("clone the view for", target))?;
    syscalls::seal_read_only(&tree).map_err(fail("make read-only the mount for", target))?;
    move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(fail("attach the mount at", target))
}

/// Shows `view` with `upper` over it.
///
/// The options are explicit, so that a kernel's defaults cannot change what an upper means: it may be
/// mounted again after a reboot over a view that was built anew. No `volatile` for the same reason.
fn overlay(view: &Path, upper: &Path, work: &Path, target: &Path) -> Result<(), MountError> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(fail("make an overlay for", target))?;
    for (key, value) in [
        ("lowerdir", view.as_os_str()),
        ("upperdir", upper.as_os_str()),
        ("workdir", work.as_os_str()),
        ("index", "off".as_ref()),
        ("metacopy", "off".as_ref()),
        ("redirect_dir", "off".as_ref()),
        ("xino", "off".as_ref()),
        ("source", "nix-csi".as_ref()),
    ] {
        fsconfig_set_string(&fs, key, value).map_err(fail("set up the overlay for", target))?;
    }
    fsconfig_create(&fs).map_err(fail("create the overlay for", target))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(fail("mount the overlay for", target))?;
    move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(fail("attach the overlay at", target))
}

/// Shows `view` with a filesystem in memory over it.
///
/// The overlay keeps that filesystem, so it is attached for as long as it takes to name it: afterwards nobody else can
/// reach it, and nothing of it is left when the overlay is gone, whoever ends first.
fn overlay_in_memory(view: &Path, memory: &Path, bytes: u64, target: &Path) -> Result<(), MountError> {
    // Of a call that was killed between.
    unmount_all(memory)?;
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(fail("make memory for", target))?;
    let (size, inodes) = (bytes.to_string(), inodes_for(bytes).to_string());
    for (key, value) in [("size", &*size), ("nr_inodes", &*inodes), ("mode", "700"), ("source", "nix-csi")] {
        fsconfig_set_string(&fs, key, value).map_err(fail("set up the memory for", target))?;
    }
    fsconfig_create(&fs).map_err(fail("create the memory for", target))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(fail("mount the memory for", target))?;
    move_mount(&mount, "", CWD, memory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(fail("attach the memory at", memory))?;
    fault::point("memory.attached");
    let (upper, work) = (memory.join("upper"), memory.join("work"));
    let shown = std::fs::create_dir(&upper)
        // The root of the overlay shows the upper's mode: a pod of any user must get through.
        .and_then(|()| std::fs::set_permissions(&upper, PermissionsExt::from_mode(0o755)))
        .and_then(|()| std::fs::create_dir(&work))
        .map_err(fail("make the directories in", memory))
        .and_then(|()| overlay(view, &upper, &work, target));
    fault::point("memory.shown");
    let detached = unmount_all(memory);
    shown.and(detached)
}

/// How many files go with so many bytes: a page for each, and some for what is there in any case.
fn inodes_for(bytes: u64) -> u64 {
    (bytes / 4096).max(64)
}

/// Which entries of `dir` the table of mounts names: what is mounted from there, and what lies below an overlay.
pub fn names_below(dir: &Path) -> Result<HashSet<String>, MountError> {
    let table = Path::new("/proc/self/mountinfo");
    let text = std::fs::read_to_string(table).map_err(fail("read", table))?;
    let Some(dir) = dir.file_name().and_then(|name| name.to_str()) else { return Ok(HashSet::new()) };
    Ok(names_in(&text, dir))
}

/// The name behind each `/<dir>/`. A mount's source is told from the root of its filesystem, so what stands before
/// `dir` is not known.
fn names_in(table: &str, dir: &str) -> HashSet<String> {
    let marker = format!("/{dir}/");
    let parts = table.split(&marker).skip(1);
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    parts.map(|rest| rest.split(|c| !is_of_name(c)).next().unwrap_or_default().to_owned()).collect()
}

/// Whether something is mounted exactly here. A missing path is not a mount.
///
/// Asks the kernel for the attribute: comparing devices would miss a bind mount within one filesystem.
pub fn is_mount_point(path: &Path) -> Result<bool, MountError> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    match rustix::fs::statx(CWD, path, flags, StatxFlags::empty()) {
        Ok(statx) => Ok(statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(false),
        Err(error) => Err(fail("look at", path)(error)),
    }
}

/// Unmounts all that is mounted at `target` and removes the empty directory. Nothing there is well too.
///
/// Never recursive: behind the mount are the inodes of every other pod.
pub fn unmount_and_remove(target: &Path) -> Result<(), MountError> {
    unmount_all(target)?;
    match std::fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fail("remove", target)(error)),
        _ => Ok(()),
    }
}

/// Unmounts all that is mounted at `target`. A missing path is well too.
fn unmount_all(target: &Path) -> Result<(), MountError> {
    while is_mount_point(target)? {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // A container that is still ending, or a shell on the node: it keeps what it has open.
            Err(rustix::io::Errno::BUSY) => {
                rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                    .map_err(fail("detach", target))?;
            }
            Err(error) => return Err(fail("unmount", target)(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_mounts_is_found() {
        let table = "\
            36 35 98:0 /var/lib/nix-csi/views/abc /pods/1/mount ro,nosuid - ext4 /dev/sda rw\n\
            37 35 0:40 / /pods/2/mount rw - overlay nix-csi rw,lowerdir=/var/lib/nix-csi/views/def,upperdir=/var/lib/nix-csi/volumes/x/upper\n\
            38 35 98:1 /views/abc.retired-1f-2 /pods/3/mount ro - ext4 /dev/sdb rw\n\
            39 35 98:1 /previews/none /x ro - ext4 /dev/sdb rw\n";
        let mut names: Vec<_> = names_in(table, "views").into_iter().collect();
        names.sort();
        assert_eq!(names, ["abc", "abc.retired-1f-2", "def"]);
    }
}
