//! Turns a NAR into files, sealed as Nix seals them, beneath one directory and nowhere else.
//!
//! Every call is relative to an open directory and follows no link, every file is created anew, and the
//! nesting is a list of open directories instead of recursion: a hostile NAR has nothing to hold on to.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};

use nix_csi_store::nar::NarSink;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};

/// One second after the epoch: the only modification time in a store.
pub(crate) const STORE_TIME: Timestamps = {
    let one = Timespec { tv_sec: 1, tv_nsec: 0 };
    Timestamps { last_access: one, last_modification: one }
};

/// Files up to this size may be written by another thread.
const SMALL: u64 = 64 * 1024;

/// Restores one store path as `name` in a directory.
///
/// Modes and times are final, but for the top directory: that one stays writable to its owner, because
/// without it nobody can move it into the store.
pub(crate) struct Restore {
    parent: Arc<OwnedFd>,
    name: Box<[u8]>,
    open: Vec<Arc<Dir>>,
    file: Option<Open>,
    is_dir: bool,
    helper: Option<SyncSender<SmallFile>>,
    failed: Failed,
}

/// The first error of those that nobody was there to take.
type Failed = Arc<Mutex<Option<io::Error>>>;

/// A directory that is being filled. It is sealed when the last one who writes into it is done.
struct Dir {
    fd: OwnedFd,
    is_top: bool,
    failed: Failed,
}

impl Drop for Dir {
    fn drop(&mut self) {
        let mode =
            if self.is_top { Ok(()) } else { rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(0o555)) };
        if let Err(error) = mode.and_then(|()| rustix::fs::futimens(&self.fd, &STORE_TIME)) {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.into());
        }
    }
}

enum Open {
    Here(OwnedFd),
    /// Collected, to be written in one go.
    Small(SmallFile),
}

/// A whole file, for any thread to write.
pub(crate) struct SmallFile {
    dir: Arc<Dir>,
    name: Box<[u8]>,
    executable: bool,
    content: Vec<u8>,
}

impl SmallFile {
    /// Writes it. An error is told by [`Restore::finish`].
    pub(crate) fn write(self) {
        let written = create(self.dir.fd.as_fd(), &self.name, self.executable).and_then(|file| {
            write_all(&file, &self.content)?;
            Ok(rustix::fs::futimens(&file, &STORE_TIME)?)
        });
        if let Err(error) = written {
            self.dir.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }
}

impl Restore {
    /// Restores as `name` in `parent`, where nothing of that name may be.
    pub(crate) fn new(parent: Arc<OwnedFd>, name: &[u8]) -> Self {
        Self {
            parent,
            name: name.into(),
            open: Vec::new(),
            file: None,
            is_dir: false,
            helper: None,
            failed: Failed::default(),
        }
    }

    /// The same, giving small files away as long as `helper` takes them.
    pub(crate) fn with_helper(parent: Arc<OwnedFd>, name: &[u8], helper: SyncSender<SmallFile>) -> Self {
        Self { helper: Some(helper), ..Self::new(parent, name) }
    }

    /// Lets the helper go: there is nothing more for it.
    pub(crate) fn let_helper_go(&mut self) {
        self.helper = None;
    }

    /// What went wrong where nobody could be told. Only after a helper is done.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// Whether what was restored is a directory.
    pub(crate) fn is_dir(&self) -> bool {
        self.is_dir
    }

    /// The directory and name that an entry has; the root's own name is ours to choose.
    fn place<'a>(&'a self, name: &'a [u8]) -> (BorrowedFd<'a>, &'a [u8]) {
        match self.open.last() {
            Some(dir) => (dir.fd.as_fd(), name),
            None => (self.parent.as_fd(), &self.name),
        }
    }
}

fn create(parent: BorrowedFd<'_>, name: &[u8], executable: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(if executable { 0o555 } else { 0o444 });
    Ok(rustix::fs::openat(parent, name, flags, mode)?)
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl NarSink for Restore {
    type Error = io::Error;

    fn directory(&mut self, name: &[u8]) -> io::Result<()> {
        let (parent, name) = self.place(name);
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        let is_top = self.open.is_empty();
        self.is_dir |= is_top;
        self.open.push(Arc::new(Dir { fd, is_top, failed: Arc::clone(&self.failed) }));
        Ok(())
    }

    fn leave(&mut self) -> io::Result<()> {
        self.open.pop();
        self.finish()
    }

    fn file(&mut self, name: &[u8], executable: bool, size: u64) -> io::Result<()> {
        self.file = Some(match (self.open.last(), &self.helper) {
            (Some(dir), Some(_)) if size <= SMALL => {
                let content = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
                Open::Small(SmallFile { dir: Arc::clone(dir), name: name.into(), executable, content })
            }
            _ => {
                let (parent, name) = self.place(name);
                Open::Here(create(parent, name, executable)?)
            }
        });
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.file {
            Some(Open::Here(file)) => write_all(file, bytes),
            Some(Open::Small(file)) => {
                file.content.extend_from_slice(bytes);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn file_end(&mut self) -> io::Result<()> {
        match self.file.take() {
            Some(Open::Here(file)) => Ok(rustix::fs::futimens(&file, &STORE_TIME)?),
            Some(Open::Small(file)) => {
                let refused = match &self.helper {
                    Some(helper) => helper.try_send(file).err(),
                    None => Some(TrySendError::Full(file)),
                };
                // It has enough to do, so this thread writes one too.
                if let Some(TrySendError::Full(file) | TrySendError::Disconnected(file)) = refused {
                    file.write();
                    return self.finish();
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn symlink(&mut self, name: &[u8], target: &[u8]) -> io::Result<()> {
        let (parent, name) = self.place(name);
        rustix::fs::symlinkat(target, parent, name)?;
        Ok(rustix::fs::utimensat(parent, name, &STORE_TIME, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}
