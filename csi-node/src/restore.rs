//! Turns a NAR into files, sealed as Nix seals them, beneath one directory and nowhere else.
//!
//! Every call is relative to an open directory and follows no link, every file is created anew, and the
//! nesting is a list of open directories instead of recursion: a hostile NAR has nothing to hold on to.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix_csi_store::nar::NarSink;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};

/// One second after the epoch: the only modification time in a store.
pub(crate) const STORE_TIME: Timestamps = {
    let one = Timespec { tv_sec: 1, tv_nsec: 0 };
    Timestamps { last_access: one, last_modification: one }
};

/// Restores one store path as `name` in a directory.
///
/// Modes and times are final, but for the top directory: that one stays writable to its owner, because
/// without it nobody can move it into the store.
pub(crate) struct Restore {
    parent: Arc<OwnedFd>,
    name: Box<[u8]>,
    open: Vec<OwnedFd>,
    file: Option<OwnedFd>,
    is_dir: bool,
}

impl Restore {
    /// Restores as `name` in `parent`, where nothing of that name may be.
    pub(crate) fn new(parent: Arc<OwnedFd>, name: &[u8]) -> Self {
        Self { parent, name: name.into(), open: Vec::new(), file: None, is_dir: false }
    }

    /// Whether what was restored is a directory.
    pub(crate) fn is_dir(&self) -> bool {
        self.is_dir
    }

    /// The directory and name that an entry has; the root's own name is ours to choose.
    fn place<'a>(&'a self, name: &'a [u8]) -> (BorrowedFd<'a>, &'a [u8]) {
        match self.open.last() {
            Some(dir) => (dir.as_fd(), name),
            None => (self.parent.as_fd(), &self.name),
        }
    }
}

impl NarSink for Restore {
    type Error = io::Error;

    fn directory(&mut self, name: &[u8]) -> io::Result<()> {
        let (parent, name) = self.place(name);
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        self.is_dir |= self.open.is_empty();
        self.open.push(dir);
        Ok(())
    }

    fn leave(&mut self) -> io::Result<()> {
        let Some(dir) = self.open.pop() else { return Ok(()) };
        if !self.open.is_empty() {
            rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o555))?;
        }
        Ok(rustix::fs::futimens(&dir, &STORE_TIME)?)
    }

    fn file(&mut self, name: &[u8], executable: bool, _size: u64) -> io::Result<()> {
        let (parent, name) = self.place(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(if executable { 0o555 } else { 0o444 });
        self.file = Some(rustix::fs::openat(parent, name, flags, mode)?);
        Ok(())
    }

    fn data(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        while !bytes.is_empty() {
            match rustix::io::write(file, bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn file_end(&mut self) -> io::Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        Ok(rustix::fs::futimens(&file, &STORE_TIME)?)
    }

    fn symlink(&mut self, name: &[u8], target: &[u8]) -> io::Result<()> {
        let (parent, name) = self.place(name);
        rustix::fs::symlinkat(target, parent, name)?;
        Ok(rustix::fs::utimensat(parent, name, &STORE_TIME, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}
