//! Project quotas: how much a volume's own files may take of the disk.
//!
//! A directory has a number, its *project*, which everything made below it inherits, and the filesystem limits what one
//! number takes. Nothing is written down about which volume has which: the directory says it itself, and a number of
//! which there is no file is free. An overlay never uses what is reserved for root, so the limit holds for root too.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};

use super::syscalls::{self, Quota};
use super::{MountError, fail, inodes_for};

/// Our projects begin here: far from those that kubelet and administrators number.
const FIRST: u32 = 0x4e43_0000;
/// How many there are.
const COUNT: u32 = 0x0100_0000;

/// Whether the filesystem of `dir` counts what a project takes, and enforces limits of it.
pub fn has_quotas(dir: &Path) -> bool {
    open(dir).and_then(|dir| syscalls::enforces_project_quotas(&dir)).unwrap_or(false)
}

/// From now on `upper` and `work`, which must be of one filesystem, take no more than `bytes` together.
pub(super) fn limit(upper: &Path, work: &Path, bytes: u64) -> Result<(), MountError> {
    // Two volumes must not find the same number free.
    static CHOOSING: Mutex<()> = Mutex::new(());
    let _alone = CHOOSING.lock().unwrap_or_else(PoisonError::into_inner);
    let (of_upper, of_work) =
        (open(upper).map_err(fail("open", upper))?, open(work).map_err(fail("open", work))?);
    // After a reboot it has one already, and files in it.
    let project = match syscalls::project(&of_upper).map_err(fail("read the project of", upper))? {
        project if is_ours(project) => project,
        _ => choose(upper, |project| syscalls::quota(&of_upper, project))
            .map_err(fail("find a free project for", upper))?,
    };
    syscalls::set_quota(&of_upper, project, bytes, inodes_for(bytes))
        .map_err(fail("limit what is in", upper))?;
    // Both: a file is made in one and renamed into the other, which works within one project only.
    syscalls::set_project(&of_upper, project).map_err(fail("set the project of", upper))?;
    syscalls::set_project(&of_work, project).map_err(fail("set the project of", work))
}

fn is_ours(project: u32) -> bool {
    (FIRST..FIRST + COUNT).contains(&project)
}

/// A number of which there is no file, sought from one that follows from the volume's directory.
fn choose(upper: &Path, quota: impl Fn(u32) -> io::Result<Quota>) -> io::Result<u32> {
    let mut hasher = DefaultHasher::new();
    upper.hash(&mut hasher);
    let start = u32::try_from(hasher.finish() % u64::from(COUNT)).unwrap_or_default();
    for n in 0..COUNT {
        let project = FIRST + (start + n) % COUNT;
        let used = quota(project)?;
        if used.inodes == 0 && used.bytes == 0 {
            return Ok(project);
        }
    }
    Err(io::ErrorKind::QuotaExceeded.into())
}

fn open(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_number_with_files_is_taken() {
        let taken = RefCell::new(Vec::new());
        let quota = |project| {
            let inodes = u64::from(taken.borrow().contains(&project));
            Ok(Quota { bytes: 0, inodes })
        };
        for _ in 0..3 {
            let project = choose(Path::new("/volumes/a/upper"), quota).unwrap();
            assert!(is_ours(project) && !taken.borrow().contains(&project));
            taken.borrow_mut().push(project);
        }
        let other = choose(Path::new("/volumes/b/upper"), quota).unwrap();
        assert!(!taken.borrow().contains(&other));
        assert!(!is_ours(0) && !is_ours(1_048_577), "kubelet's");
        choose(Path::new("/x"), |_| Err(io::ErrorKind::Unsupported.into())).unwrap_err();
    }
}
