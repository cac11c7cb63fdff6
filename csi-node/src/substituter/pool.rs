//! Threads that restore: decode, hash, parse and write are work for cores, not for the network's threads.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use bytes::Bytes;
use nix_csi_store::nar::{NarReader, PushError};
use nix_csi_store::{NarHash, NarInfo};
use ring::digest::{Context, SHA256};
use tokio::sync::oneshot;

use super::decode::decoder;
use super::error::FetchError;
use super::staging::Staging;
use crate::restore::Restore;

/// What a decoder writes into at once; the hash and the disk read it while it is in the cache.
const BUFFER: usize = 128 * 1024;

/// One NAR on its way from a socket to the disk.
pub(super) struct Job {
    /// What was signed.
    pub(super) info: NarInfo,
    /// Who sends it, for messages.
    pub(super) cache: String,
    /// The compressed bytes. Ends early when the transfer fails, which the sender knows.
    pub(super) chunks: tokio::sync::mpsc::Receiver<Bytes>,
    /// Where to restore it, as its base name: a directory in `staging`.
    pub(super) dir: PathBuf,
    /// Kept until the last byte is written.
    pub(super) staging: Arc<Staging>,
    /// Told how it went.
    pub(super) done: oneshot::Sender<Result<PathBuf, FetchError>>,
}

/// The threads. They end when this is dropped and the jobs are done.
#[derive(Debug, Clone)]
pub(super) struct RestorePool {
    jobs: mpsc::Sender<Job>,
}

impl RestorePool {
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for n in 0..threads {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name(format!("restore-{n}")).spawn(move || {
                loop {
                    // The guard is gone before the job begins: another thread takes the next one.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(Job { info, cache, chunks, dir, staging, done }) = job else { return };
                    let restored = restore(&info, &cache, Chunks::new(chunks, info.nar_size), &dir, &done);
                    drop(staging);
                    // Nobody may wait for it any more.
                    let _ = done.send(restored);
                }
            })?;
        }
        Ok(Self { jobs })
    }

    pub(super) fn submit(&self, job: Job) {
        // The threads end only after this is dropped; a job that is lost says so by its dropped sender.
        let _ = self.jobs.send(job);
    }
}

/// Restores one NAR and checks that it is what was signed.
fn restore(
    info: &NarInfo,
    cache: &str,
    input: Chunks,
    dir: &Path,
    done: &oneshot::Sender<Result<PathBuf, FetchError>>,
) -> Result<PathBuf, FetchError> {
    let path = || info.path.clone();
    let cache = || cache.to_owned();
    let disk = |source| FetchError::Restore { path: path(), source };
    let size = || FetchError::Size { path: path(), cache: cache(), expected: info.nar_size };
    let undecodable = |source| FetchError::Decode { path: path(), cache: cache(), source };

    let mut sink = Restore::new(dir, info.path.base_name()).map_err(disk)?;
    let mut input = decoder(info.compression, input).map_err(undecodable)?;
    let mut reader = NarReader::new();
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; BUFFER];
    let mut left = info.nar_size;
    loop {
        if done.is_closed() {
            return Err(FetchError::Stopped);
        }
        let read = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => &buffer[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(undecodable(error)),
        };
        // Before anything is written: a bomb ends at the size that was signed.
        left = left.checked_sub(read.len() as u64).ok_or_else(size)?;
        hash.update(read);
        reader.push(read, &mut sink).map_err(|error| match error {
            PushError::Nar(source) => FetchError::Nar { path: path(), cache: cache(), source },
            PushError::Sink(source) => disk(source),
        })?;
    }
    if left > 0 {
        return Err(size());
    }
    let mut found = [0; 32];
    found.copy_from_slice(hash.finish().as_ref());
    let found = NarHash::new(found);
    if found != info.nar_hash {
        return Err(FetchError::Hash { path: path(), cache: cache(), expected: info.nar_hash, found });
    }
    reader.finish().map_err(|source| FetchError::Nar { path: path(), cache: cache(), source })?;
    Ok(dir.join(info.path.base_name()))
}

/// The chunks of a transfer as something to read from, without copying them together.
struct Chunks {
    rest: Bytes,
    more: tokio::sync::mpsc::Receiver<Bytes>,
    /// How many more may come. Empty frames decode to nothing, so the size of the NAR does not end them.
    left: u64,
}

impl Chunks {
    fn new(more: tokio::sync::mpsc::Receiver<Bytes>, nar_size: u64) -> Self {
        Self { rest: Bytes::new(), more, left: nar_size.saturating_add(nar_size / 8).saturating_add(1 << 20) }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.more.blocking_recv() {
                Some(chunk) => {
                    let too_much =
                        || io::Error::new(io::ErrorKind::FileTooLarge, "far more data than the NAR has");
                    self.left = self.left.checked_sub(chunk.len() as u64).ok_or_else(too_much)?;
                    self.rest = chunk;
                }
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.rest.len());
        buffer[..len].copy_from_slice(&self.rest.split_to(len));
        Ok(len)
    }
}
