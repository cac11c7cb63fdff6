//! Deletes trees that others have filled, and may still be filling.
//!
//! Every call is relative to an open directory, follows no link and enters no mount, and however deep a tree is, it
//! takes few open files and little stack: what lies too deep is first moved to the top.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// How many directories are open at the same time.
const DEEP: usize = 32;

/// Deletes `name` in `dir` and all that is in it. One that is not there is well too.
///
/// What cannot be deleted ends it; a directory that its owner, being the caller, has made read-only can.
pub(crate) fn remove(dir: impl AsFd, name: &CStr) -> io::Result<()> {
    let dir = dir.as_fd();
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Err(error) if error != Errno::NOENT => return Err(error.into()),
        _ => return Ok(()),
    }
    let Some(top) = open(dir, name)? else { return Ok(()) };
    let mut moved = Moved { top: top.as_fd(), count: 0 };
    loop {
        let before = moved.count;
        moved.clear(top.as_fd(), DEEP)?;
        if moved.count == before {
            break;
        }
    }
    gone(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR))
}

/// What was moved to the top of the tree.
struct Moved<'a> {
    top: BorrowedFd<'a>,
    count: usize,
}

impl Moved<'_> {
    /// Deletes what is in `dir`, and moves to the top what is deeper than `levels`.
    fn clear(&mut self, dir: BorrowedFd<'_>, levels: usize) -> io::Result<()> {
        make_writable(dir)?;
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Err(Errno::ISDIR) => {}
                unlinked => {
                    gone(unlinked)?;
                    continue;
                }
            }
            let Some(inner) = open(dir, name)? else { continue };
            if levels == 0 {
                self.move_up(dir, name, inner.as_fd())?;
            } else {
                self.clear(inner.as_fd(), levels - 1)?;
                gone(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR))?;
            }
        }
        Ok(())
    }

    fn move_up(&mut self, dir: BorrowedFd<'_>, name: &CStr, inner: BorrowedFd<'_>) -> io::Result<()> {
        // A directory can only change its parent while it is writable.
        make_writable(inner)?;
        loop {
            self.count += 1;
            let free = format!(".deep-{}", self.count);
            match rustix::fs::renameat_with(dir, name, self.top, free, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                moved => return gone(moved),
            }
        }
    }
}

/// The directory, unless it is gone.
fn open(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve) {
        Ok(open) => Ok(Some(open)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A sealed directory of a store is not; neither is it to root, without the capability to override that.
fn make_writable(dir: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(dir)?;
    if stat.st_mode & 0o700 == 0o700 {
        return Ok(());
    }
    match rustix::fs::fchmod(dir, Mode::RWXU) {
        // Somebody else's: then the next call says whether that matters.
        Err(error) if error != Errno::PERM => Err(error.into()),
        _ => Ok(()),
    }
}

fn gone(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error != Errno::NOENT => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn whatever_it_is_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("tree/sealed/inner")).unwrap();
        fs::create_dir(at("outside")).unwrap();
        for file in ["file", "outside/kept", "tree/file", "tree/sealed/file", "tree/sealed/inner/file"] {
            fs::write(at(file), "x").unwrap();
        }
        symlink("../outside", at("tree/link")).unwrap();
        symlink("outside", at("link")).unwrap();
        for sealed in ["tree/sealed/inner", "tree/sealed"] {
            fs::set_permissions(at(sealed), fs::Permissions::from_mode(0o555)).unwrap();
        }
        let open = File::open(dir.path()).unwrap();
        for name in [c"tree", c"file", c"link", c"never-was"] {
            remove(&open, name).unwrap();
        }
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["outside"]);
        assert!(at("outside/kept").exists());
    }

    #[test]
    fn a_tree_may_be_deeper_than_files_may_be_open() {
        let dir = tempfile::tempdir().unwrap();
        let mut inner = OwnedFd::from(File::open(dir.path()).unwrap());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        for _ in 0..5000 {
            for name in [c"deep", c"beside"] {
                rustix::fs::mkdirat(&inner, name, Mode::RWXU).unwrap();
            }
            inner = rustix::fs::openat(&inner, c"deep", flags, Mode::empty()).unwrap();
        }
        drop(inner);
        remove(File::open(dir.path()).unwrap(), c"deep").unwrap();
        assert!(!dir.path().join("deep").exists());
        fs::remove_dir(dir.path().join("beside")).unwrap();
    }
}
