//! `mount_setattr(2)`, which no safe library offers yet.
#![expect(unsafe_code, reason = "one system call without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// `struct mount_attr` of the kernel, in its first version (Linux 5.12).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Makes a detached mount, and all below it, read-only, nosuid and nodev, and lets programs run from it.
///
/// Programs must run even where the host mounts /var with noexec; clearing the flag needs no more rights
/// than mounting does.
pub(super) fn seal_read_only(tree: &OwnedFd) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: libc::MOUNT_ATTR_NOEXEC,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = (libc::AT_EMPTY_PATH | libc::AT_RECURSIVE).cast_unsigned();
    // SAFETY: the path is a NUL-terminated string, `attr` lives until the call returns and its size is
    // given with it; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether this kernel has the calls; told once at start rather than at the first pod.
pub fn probe() -> io::Result<()> {
    // SAFETY: no attribute is given; with size 0 the kernel answers before it looks at anything.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, -1, c"".as_ptr(), 0, std::ptr::null::<MountAttr>(), 0)
    };
    let error = io::Error::last_os_error();
    if result == -1 && error.raw_os_error() == Some(libc::ENOSYS) {
        return Err(error);
    }
    Ok(())
}
