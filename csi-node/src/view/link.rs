//! Hard-links store paths into a view: directories are made, everything else is linked.
//!
//! The unit of work is one directory, so that one large path keeps all threads busy as well as many small
//! ones do. Two threads are enough: beyond that they wait for the journal.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use nix_csi_store::StorePath;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

use super::ViewError;
use crate::path_error::PathError;
use crate::restore::STORE_TIME;

const THREADS: usize = 2;

/// A directory that exists in the store and in the view, and whose entries are still to be linked.
struct Task {
    from: PathBuf,
    to: PathBuf,
}

struct Queue {
    /// Last in, first out: so few directories wait at any time.
    tasks: Vec<Task>,
    working: usize,
    failed: Option<ViewError>,
}

/// Links `paths` from the store directory `from` into `to`.
pub(super) fn link_paths(from: &Path, to: &Path, paths: &[StorePath]) -> Result<(), ViewError> {
    let mut tasks = Vec::with_capacity(paths.len());
    for path in paths {
        let (from, to) = (from.join(path.base_name()), to.join(path.base_name()));
        if std::fs::symlink_metadata(&from).map_err(PathError::on("look at", &from))?.is_dir() {
            make_dir(&to)?;
            tasks.push(Task { from, to });
        } else {
            rustix::fs::linkat(CWD, &from, CWD, &to, AtFlags::empty()).map_err(PathError::on("link", &to))?;
        }
    }
    let queue = Mutex::new(Queue { tasks, working: 0, failed: None });
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 1..THREADS {
            // Without another thread this one does it all.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || work(&queue, &changed));
        }
        work(&queue, &changed);
    });
    queue.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
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
            Ok(more) => guard.tasks.extend(more),
            Err(error) => guard.failed = Some(error),
        }
        changed.notify_all();
    }
}

/// Links what is in one directory, seals its copy, and gives back the directories found in it.
fn link_entries(Task { from, to }: &Task) -> Result<Vec<Task>, ViewError> {
    let (source, target) = (open_dir(from)?, open_dir(to)?);
    let mut found = Vec::new();
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
            // Without AT_SYMLINK_FOLLOW a symlink is linked as itself, time and all.
            rustix::fs::linkat(&source, name, &target, name, AtFlags::empty())
                .map_err(PathError::on("link", &beside(to, name)))?;
        }
    }
    rustix::fs::fchmod(&target, Mode::from_raw_mode(0o555))
        .and_then(|()| rustix::fs::futimens(&target, &STORE_TIME))
        .map_err(PathError::on("seal", to))?;
    Ok(found)
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
