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

/// What a project takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Quota {
    /// Bytes.
    pub(super) bytes: u64,
    /// Inodes.
    pub(super) inodes: u64,
}

/// `struct if_dqblk` of the kernel: limits in blocks of 1 KiB, use in bytes.
#[repr(C)]
#[derive(Default)]
struct DiskQuota {
    blocks_hard: u64,
    blocks_soft: u64,
    space: u64,
    inodes_hard: u64,
    inodes_soft: u64,
    inodes: u64,
    blocks_time: u64,
    inodes_time: u64,
    valid: u32,
}

/// `struct fsxattr` of the kernel.
#[repr(C)]
#[derive(Default)]
struct FileAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::c_long = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::c_long = 0x401c_5820;
/// What is made in the directory has its project.
const PROJECT_IS_INHERITED: u32 = 0x200;
const Q_GETQUOTA: u32 = 0x80_0007;
const Q_SETQUOTA: u32 = 0x80_0008;
const Q_XGETQSTATV: u32 = 0x5808;
const PROJECTS: u32 = 2;
/// Limits of blocks and of inodes, in `DiskQuota::valid`.
const LIMITS: u32 = 1 | 4;
/// Limits of projects are enforced, in the flags of `Q_XGETQSTATV`.
const PROJECTS_ENFORCED: u16 = 1 << 5;

/// `quotactl_fd(2)`, which needs no device to be named (Linux 5.14).
///
/// # Safety
/// `data` must point to what `command` reads or writes.
unsafe fn quotactl<T>(fd: &OwnedFd, command: u32, project: u32, data: *mut T) -> io::Result<()> {
    // SAFETY: said above; the kernel keeps no pointer.
    let result = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, fd.as_raw_fd(), (command << 8) | PROJECTS, project, data)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the filesystem of `fd` enforces limits of projects.
pub(super) fn enforces_project_quotas(fd: &OwnedFd) -> io::Result<bool> {
    // `struct fs_quota_statv`: version, padding, flags; as long as any version of it.
    let mut state = [0_u16; 256];
    state[0] = u16::from_ne_bytes([1, 0]);
    // SAFETY: the kernel reads the first byte and writes less than 512.
    unsafe { quotactl(fd, Q_XGETQSTATV, 0, state.as_mut_ptr())? };
    Ok(state[1] & PROJECTS_ENFORCED != 0)
}

/// What a project takes. One that was never used takes nothing.
pub(super) fn quota(fd: &OwnedFd, project: u32) -> io::Result<Quota> {
    let mut quota = DiskQuota::default();
    // SAFETY: the structure is the one that the command writes.
    match unsafe { quotactl(fd, Q_GETQUOTA, project, &raw mut quota) } {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT)) => Ok(Quota::default()),
        Err(error) => Err(error),
        Ok(()) => Ok(Quota { bytes: quota.space, inodes: quota.inodes }),
    }
}

/// Limits what a project may take.
pub(super) fn set_quota(fd: &OwnedFd, project: u32, bytes: u64, inodes: u64) -> io::Result<()> {
    let blocks_hard = bytes.div_ceil(1024);
    let mut quota = DiskQuota { blocks_hard, inodes_hard: inodes, valid: LIMITS, ..DiskQuota::default() };
    // SAFETY: the structure is the one that the command reads.
    unsafe { quotactl(fd, Q_SETQUOTA, project, &raw mut quota) }
}

fn attributes(fd: &OwnedFd) -> io::Result<FileAttributes> {
    let mut attributes = FileAttributes::default();
    // SAFETY: the structure is the one that the command writes.
    let result =
        unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    if result == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

/// The project of a file.
pub(super) fn project(fd: &OwnedFd) -> io::Result<u32> {
    Ok(attributes(fd)?.project)
}

/// Gives a directory a project, which everything made in it inherits.
pub(super) fn set_project(fd: &OwnedFd, project: u32) -> io::Result<()> {
    let mut attributes = attributes(fd)?;
    attributes.project = project;
    attributes.flags |= PROJECT_IS_INHERITED;
    // SAFETY: the structure is the one that the command reads.
    let result =
        unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
