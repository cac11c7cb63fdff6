//! What no fetch of a closure can leave out, measured on this machine: decompress, hash, create files.
//!
//! Nothing else is in it: no HTTP, no lookups, no signatures, no database, no renames, no syncs. And it is CPU
//! time of the threads that do it, without what they wait for. A fetch on two cores cannot take less than
//! half of the sum, and one stream not less than the longest of its parts.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix_csi_store::nar::{NarReader, NarSink};
use nix_csi_store::{Compression, NarInfo};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};
use rustix::time::{ClockId, clock_gettime};

use crate::corpus::Corpus;

/// How many cores the limit has, whatever the machine has.
const CORES: u32 = 2;

/// Seconds of CPU for one path.
#[derive(Clone, Copy, Default)]
struct Parts {
    decode: f64,
    hash: f64,
    create: f64,
}

/// Measures a closure, whose tree is created in `dir`: the least seconds that a fetch of it can take.
pub(crate) fn measure(corpus: &Corpus, dir: &Path) -> Result<f64> {
    let mut closure = corpus.closure()?;
    closure.sort_by_key(|info| std::cmp::Reverse(info.nar_size));
    let parts = restore_all(corpus, &closure, dir)?;

    let sum = |part: fn(&Parts) -> f64| parts.iter().map(part).sum::<f64>();
    let (decode, hash, create) = (sum(|of| of.decode), sum(|of| of.hash), sum(|of| of.create));
    let largest = parts.first().context("an empty closure")?;
    let stream = largest.decode.max(largest.hash).max(largest.create);
    let limit = ((decode + hash + create) / f64::from(CORES)).max(stream);
    eprintln!(
        "  limit        {limit:7.3} s: decode {decode:.3}, hash {hash:.3}, create {create:.3}; \
         longest part of the largest path {stream:.3}"
    );
    Ok(limit)
}

/// Restores on as many threads as there are cores: they share the file system's locks, as in a fetch.
fn restore_all(corpus: &Corpus, closure: &[NarInfo], dir: &Path) -> Result<Vec<Parts>> {
    let parent = OwnedFd::from(fs::File::open(dir)?);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Parts)>> {
        let mut done = Vec::new();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(info) = closure.get(n) else { return Ok(done) };
            done.push((n, restore(corpus, info, &parent)?));
        }
    };
    let mut parts = vec![Parts::default(); closure.len()];
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..CORES).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            for (n, of) in worker.join().map_err(|_| anyhow!("a worker panicked"))?? {
                parts[n] = of;
            }
        }
        Ok(())
    })?;
    Ok(parts)
}

/// Restores one path piece by piece, so that each part finds its bytes in the CPU's cache.
fn restore(corpus: &Corpus, info: &NarInfo, parent: &OwnedFd) -> Result<Parts> {
    ensure!(info.compression == Compression::Zstd, "the limit is for zstd only");
    let file = fs::read(corpus.dir.join(&info.url))?;
    let mut stream = zstd::stream::read::Decoder::with_buffer(file.as_slice())?;
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    let mut reader = NarReader::new();
    let name = info.path.base_name();
    let mut tree = Tree { parent, root: name.as_bytes(), open: Vec::new(), file: None };
    let mut piece = vec![0; 256 * 1024];
    let mut parts = Parts::default();
    let mut last = cpu_time();
    let mut lap = || {
        let now = cpu_time();
        now - std::mem::replace(&mut last, now)
    };
    loop {
        let len = stream.read(&mut piece)?;
        parts.decode += lap();
        if len == 0 {
            break;
        }
        digest.update(&piece[..len]);
        parts.hash += lap();
        reader.push(&piece[..len], &mut tree)?;
        parts.create += lap();
    }
    reader.finish()?;
    let _ = std::hint::black_box(digest.finish());
    Ok(parts)
}

/// Seconds of CPU that this thread has had: somebody else's load does not count.
pub(crate) fn cpu_time() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default().as_secs_f64()
}

/// One path on disk, with the fewest calls that give it Nix's modes and times.
struct Tree<'a> {
    parent: &'a OwnedFd,
    root: &'a [u8],
    open: Vec<OwnedFd>,
    file: Option<OwnedFd>,
}

const STORE_TIME: Timestamps = {
    let one = Timespec { tv_sec: 1, tv_nsec: 0 };
    Timestamps { last_access: one, last_modification: one }
};

impl Tree<'_> {
    fn place<'a>(&'a self, name: &'a [u8]) -> (BorrowedFd<'a>, &'a [u8]) {
        match self.open.last() {
            Some(dir) => (dir.as_fd(), name),
            None => (self.parent.as_fd(), self.root),
        }
    }
}

impl NarSink for Tree<'_> {
    type Error = io::Error;

    fn directory(&mut self, name: &[u8]) -> io::Result<()> {
        let (parent, name) = self.place(name);
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        self.open.push(dir);
        Ok(())
    }

    fn leave(&mut self) -> io::Result<()> {
        let Some(dir) = self.open.pop() else { return Ok(()) };
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o555))?;
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
        if let Some(file) = &self.file {
            while !bytes.is_empty() {
                bytes = &bytes[rustix::io::write(file, bytes)?..];
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
