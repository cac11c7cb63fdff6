//! What keeps paths from a collector, ours or Nix's: temporary roots while something is being done with
//! them, permanent ones as long as a view holds them.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix_csi_store::StorePath;
use rustix::fs::FlockOperation;

use super::layout::Layout;
use super::locks;

/// Nix reads every name in this directory as a number, and takes over the file of its own process id. So
/// ours are numbers that no process can have.
const FIRST_NAME: u32 = 2_000_000_000;

/// Paths that no collector may delete while this or a clone of it lives.
#[derive(Debug, Clone)]
pub struct TempRoots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    gc_lock: PathBuf,
    gc_socket: PathBuf,
}

impl TempRoots {
    pub(super) fn create(layout: &Layout) -> io::Result<Self> {
        let (path, file) = create_file(&layout.temp_roots())?;
        Ok(Self(Arc::new(Inner {
            path,
            file,
            gc_lock: layout.gc_lock(),
            gc_socket: layout.state_dir().join("gc-socket/socket"),
        })))
    }

    /// From when this returns, `paths` are safe, whether they are valid or will be.
    pub(super) fn add(&mut self, paths: &[StorePath]) -> io::Result<()> {
        let Inner { file, .. } = &*self.0;
        let mut file = file;
        let gc_lock = locks::open(&self.0.gc_lock)?;
        let mut lines = Vec::new();
        for path in paths {
            lines.extend_from_slice(path.to_string().as_bytes());
            lines.push(0);
        }
        loop {
            match rustix::fs::flock(&gc_lock, FlockOperation::NonBlockingLockShared) {
                // No collector runs. The next one will read the file.
                Ok(()) => return file.write_all(&lines),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
            // One runs, and has read the file already: tell it, and it will spare them.
            match self.tell_collector(paths) {
                Ok(()) => return file.write_all(&lines),
                // It ended, or has not begun to listen.
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn tell_collector(&self, paths: &[StorePath]) -> io::Result<()> {
        let mut socket = UnixStream::connect(&self.0.gc_socket)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        for path in paths {
            socket.write_all(format!("{path}\n").as_bytes())?;
            let mut answer = [0];
            socket.read_exact(&mut answer)?;
            if answer != *b"1" {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the collector refused a root"));
            }
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn create_file(dir: &Path) -> io::Result<(PathBuf, File)> {
    let mut name = FIRST_NAME;
    loop {
        let path = dir.join(name.to_string());
        match File::options().append(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => {
                rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
                // A collector that came between found it free, marked it and unlinked it.
                if file.metadata()?.size() == 0 {
                    return Ok((path, file));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => name += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Unlinks files of ours whose holders are gone.
pub(super) fn remove_stale_temporary(layout: &Layout) -> io::Result<()> {
    for entry in fs::read_dir(layout.temp_roots())? {
        let entry = entry?;
        let ours = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if ours.is_none_or(|name| name < FIRST_NAME) {
            continue;
        }
        let file = File::options().read(true).write(true).open(entry.path())?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// What stands in temporary roots, of this process and of any other. Stale ones are believed too.
pub(super) fn temporary(layout: &Layout) -> io::Result<HashSet<StorePath>> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(layout.temp_roots())? {
        let text = match fs::read(entry?.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read?,
        };
        let names = text.split(|byte| *byte == 0).filter_map(|path| std::str::from_utf8(path).ok());
        found.extend(names.filter_map(|path| path.parse::<StorePath>().ok()));
    }
    Ok(found)
}

/// What permanent roots name, those of views set aside: `nix build --out-link`, profiles, whatever an administrator
/// has made. One that leads out of what this process sees keeps nothing, as in Nix.
pub(super) fn permanent(layout: &Layout) -> io::Result<Vec<StorePath>> {
    let mut found = Vec::new();
    let mut open = vec![layout.state_dir().join("gcroots"), layout.state_dir().join("profiles")];
    while let Some(dir) = open.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let at = entry.path();
            if entry.file_type()?.is_dir() && at != layout.view_roots() {
                open.push(at);
            } else if entry.file_type()?.is_symlink() {
                found.extend(target_of(&at, 8));
            }
        }
    }
    Ok(found)
}

/// The store path that a symlink leads to, over others.
fn target_of(link: &Path, steps: usize) -> Option<StorePath> {
    let target = fs::read_link(link).ok()?;
    if let Some(path) = target.to_str().and_then(|target| {
        let name = target.strip_prefix("/nix/store/")?.split('/').next()?;
        StorePath::from_base_name(name).ok()
    }) {
        return Some(path);
    }
    let next = link.parent()?.join(target);
    if steps == 0 { None } else { target_of(&next, steps - 1) }
}

/// The roots of views, by view.
pub(super) fn of_views(dir: &Path) -> io::Result<HashMap<String, Vec<StorePath>>> {
    let mut views = HashMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(view) = entry.file_name().into_string() else { continue };
        let links = match fs::read_dir(entry.path()) {
            // Removed in this moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            links => links?,
        };
        let mut roots = Vec::new();
        for link in links {
            roots.extend(target_of(&link?.path(), 0));
        }
        views.insert(view, roots);
    }
    Ok(views)
}

/// `gcroots/nix-csi/<view>/<n>`: symlinks to logical paths. A physical one would silently not count.
pub(super) fn add_permanent(layout: &Layout, view: &str, paths: &[StorePath]) -> io::Result<()> {
    let dir = layout.view_roots().join(view);
    fs::create_dir_all(&dir)?;
    for (n, path) in paths.iter().enumerate() {
        match symlink(path.to_string(), dir.join(n.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn remove_permanent(layout: &Layout, view: &str) -> io::Result<()> {
    match fs::remove_dir_all(layout.view_roots().join(view)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
