//! Id-mapped mounts, as a container runtime makes them for a pod with `hostUsers: false`.
#![expect(unsafe_code, reason = "no safe library offers mount_setattr(2)")]

use std::ffi::{c_char, c_int, c_long, c_uint};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context as _, Result};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// The first of the host's ids in a [`UserNamespace`].
pub const FIRST: u32 = 100_000;

/// A user namespace in which 0 is [`FIRST`]; it ends with the value.
pub struct UserNamespace(Child);

impl UserNamespace {
    /// A new one.
    pub fn new() -> Result<Self> {
        let child = Command::new("unshare").args(["--user", "sleep", "600"]).spawn().context("unshare")?;
        let this = Self(child);
        // Only when `unshare` has become `sleep`, it is in a namespace of its own.
        let start = std::time::Instant::now();
        while fs::read_link(this.file("ns/user"))? == fs::read_link("/proc/self/ns/user")? {
            anyhow::ensure!(start.elapsed().as_secs() < 30, "no user namespace");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(this.file(map), format!("0 {FIRST} 65536\n")).with_context(|| map.to_owned())?;
        }
        Ok(this)
    }

    fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.0.id())
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

/// Mounts what is at `from` at `to`, as those in `namespace` see it.
pub fn bind_mapped(from: &Path, to: &Path, namespace: &UserNamespace) -> Result<io::Result<()>> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    const SYS_MOUNT_SETATTR: c_long = 442;
    const AT_EMPTY_PATH: c_uint = 0x1000;
    let tree: OwnedFd =
        open_tree(CWD, from, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let user_namespace = File::open(namespace.file("ns/user"))?;
    let attr = MountAttr {
        set: MOUNT_ATTR_IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: user_namespace.as_raw_fd().cast_unsigned().into(),
    };
    let (dir, empty): (c_int, *const c_char) = (tree.as_raw_fd(), c"".as_ptr());
    // SAFETY: the path is NUL-terminated, and `attr` lives until the call returns; the kernel only reads both.
    let result = unsafe {
        syscall(SYS_MOUNT_SETATTR, dir, empty, AT_EMPTY_PATH, &raw const attr, size_of::<MountAttr>())
    };
    if result != 0 {
        return Ok(Err(io::Error::last_os_error()));
    }
    move_mount(&tree, "", CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(Ok(()))
}
