//! Hard-links store paths into a view: directories are made, everything else is linked.
//!
//! A file that has as many links already as its filesystem allows (65,000 on ext4) is copied. Only that one, and only into
//! views that are built from then on: it costs space, and nobody notices.
//!
//! The unit of work is one directory, so that one large path keeps all threads busy as well as many small
//! ones do. Two threads are enough: beyond that they wait for the journal.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use nix_csi_store::StorePath;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::ViewError;
use crate::path_error::PathError;
use crate::restore::STORE_TIME;

const THREADS: usize = 2;

/// A directory that exists in the store and in the view, and whose entries are still to be linked.
struct Task {
    from: PathBuf,
    to: PathBuf,
}

/// A name in two open directories, and what they are called.
struct Entry<'a> {
    source: &'a OwnedFd,
    from: &'a Path,
    target: &'a OwnedFd,
    to: &'a Path,
    name: &'a CStr,
}

struct Queue {
    /// Last in, first out: so few directories wait at any time.
    tasks: Vec<Task>,
    working: usize,
    copied: u64,
    failed: Option<ViewError>,
}

/// Links `paths` from the store directory `from` into `to`. Gives back how many files had to be copied.
pub(super) fn link_paths(from: &Path, to: &Path, paths: &[StorePath]) -> Result<u64, ViewError> {
    let (source, target) = (open_dir(from)?, open_dir(to)?);
    let mut copied = 0;
    let mut tasks = Vec::with_capacity(paths.len());
    for path in paths {
        let (below, at) = (from.join(path.base_name()), to.join(path.base_name()));
        if std::fs::symlink_metadata(&below).map_err(PathError::on("look at", &below))?.is_dir() {
            make_dir(&at)?;
            tasks.push(Task { from: below, to: at });
        } else {
            let name = CString::new(path.base_name()).unwrap_or_default();
            let entry = Entry { source: &source, from, target: &target, to, name: &name };
            copied += u64::from(entry.link()?);
        }
    }
    let queue = Mutex::new(Queue { tasks, working: 0, copied, failed: None });
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 1..THREADS {
            // Without another thread this one does it all.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || work(&queue, &changed));
        }
        work(&queue, &changed);
    });
    let Queue { copied, failed, .. } = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(copied), Err)
}

fn work(queue: &Mutex<Queue>, changed: &Condvar) {
    let mut guard = queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if guard.failed.is_some() || (guard.tasks.is_empty() && guard.working == 0) {
            changed.notify_all();
            return;
        }
        let Some(task) = guard.tasks.pop() else {
            guard = changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        guard.working += 1;
        drop(guard);
        let linked = link_entries(&task);
        guard = queue.lock().unwrap_or_else(PoisonError::into_inner);
        guard.working -= 1;
        match linked {
            Ok((more, copied)) => {
                guard.tasks.extend(more);
                guard.copied += copied;
            }
            Err(error) => guard.failed = Some(error),
        }
        changed.notify_all();
    }
}

/// Links what is in one directory and seals its copy. Gives back the directories found in it, and how many files were
/// copied.
fn link_entries(Task { from, to }: &Task) -> Result<(Vec<Task>, u64), ViewError> {
    let (source, target) = (open_dir(from)?, open_dir(to)?);
    let (mut found, mut copied) = (Vec::new(), 0);
    for entry in Dir::read_from(&source).map_err(PathError::on("read", from))? {
        let entry = entry.map_err(PathError::on("read", from))?;
        let name: &CStr = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_dir = match entry.file_type() {
            FileType::Directory => true,
            // Some filesystems do not say it here.
            FileType::Unknown => {
                let stat = rustix::fs::statat(&source, name, AtFlags::SYMLINK_NOFOLLOW);
                let stat = stat.map_err(PathError::on("look at", &beside(from, name)))?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        if is_dir {
            let (from, to) = (beside(from, name), beside(to, name));
            make_dir(&to)?;
            found.push(Task { from, to });
        } else {
            let entry = Entry { source: &source, from, target: &target, to, name };
            copied += u64::from(entry.link()?);
        }
    }
    rustix::fs::fchmod(&target, Mode::from_raw_mode(0o555))
        .and_then(|()| rustix::fs::futimens(&target, &STORE_TIME))
        .map_err(PathError::on("seal", to))?;
    Ok((found, copied))
}

impl Entry<'_> {
    /// Links it, or copies it if that cannot be. Says whether it did.
    fn link(&self) -> Result<bool, ViewError> {
        // Without AT_SYMLINK_FOLLOW a symlink is linked as itself, time and all.
        match rustix::fs::linkat(self.source, self.name, self.target, self.name, AtFlags::empty()) {
            Ok(()) => Ok(false),
            Err(Errno::MLINK) => {
                self.copy().map_err(PathError::on("copy to", &beside(self.to, self.name)))?;
                Ok(true)
            }
            Err(Errno::XDEV) => {
                Err(ViewError::OtherFilesystem { from: self.from.into(), to: self.to.into() })
            }
            Err(error) => Err(PathError::on("link", &beside(self.to, self.name))(error).into()),
        }
    }

    /// Makes a file or symlink of its own that is the same.
    fn copy(&self) -> io::Result<()> {
        let stat = rustix::fs::statat(self.source, self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            let target = rustix::fs::readlinkat(self.source, self.name, Vec::new())?;
            rustix::fs::symlinkat(target, self.target, self.name)?;
            let no_follow = AtFlags::SYMLINK_NOFOLLOW;
            return Ok(rustix::fs::utimensat(self.target, self.name, &STORE_TIME, no_follow)?);
        }
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = rustix::fs::openat(self.source, self.name, flags | OFlags::RDONLY, Mode::empty())?;
        let new = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o555);
        let mut to = File::from(rustix::fs::openat(self.target, self.name, new, mode)?);
        io::copy(&mut File::from(from), &mut to)?;
        Ok(rustix::fs::futimens(&to, &STORE_TIME)?)
    }
}

fn beside(dir: &Path, name: &CStr) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    dir.join(std::ffi::OsStr::from_bytes(name.to_bytes()))
}

fn open_dir(path: &Path) -> Result<OwnedFd, ViewError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty()).map_err(PathError::on("open", path))?)
}

fn make_dir(path: &Path) -> Result<(), ViewError> {
    Ok(std::fs::create_dir(path).map_err(PathError::on("create", path))?)
}
