//! NAR bytes in, files in staging out, and the proof that they are the ones that were signed.
//!
//! A small NAR is decoded, hashed and written by one thread: it lies in that core's cache from step to step. A
//! large one is decoded here, hashed by a second thread and written by a third, all three out of one buffer; a
//! fourth helps with what is small, because creating a file takes longer than filling it.

use std::io::{self, BufRead, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use bytes::Bytes;
use nix_csi_store::nar::{NarReader, PushError};
use nix_csi_store::{Compression, ContentAddress, NarHash, NarInfo, StorePath};
use ring::digest::{Context, SHA256};

use super::content::ContentHash;
use super::decode::decoder;
use super::error::FetchError;
use super::stop::Stop;
use crate::restore::{Restore, SmallFile};
use crate::store::Place;

/// What a decoder writes into at once.
const BUFFER: usize = 256 * 1024;
/// Buffers between a decoder and those who hash and write.
const AHEAD: usize = 4;
/// Small files that wait for the thread that helps to write them.
const SMALL_FILES: usize = 32;
/// From this size on a NAR is worth several threads.
const LARGE: u64 = 4 << 20;

/// Where a NAR comes from and what it must be.
pub(super) struct Unpack {
    /// What was signed, or proves itself by `ca`.
    pub(super) info: Arc<NarInfo>,
    /// Who sends it, for messages.
    pub(super) cache: Arc<str>,
    /// How it is compressed: what the server did on the way first, then what the file is.
    pub(super) compressions: [Compression; 2],
    /// What its content must hash to, where no signature vouches for it.
    pub(super) ca: Option<ContentAddress>,
    /// The most memory that a decoder may reserve.
    pub(super) memory: u64,
    /// Where to restore it. Kept until the last byte is written: only then may somebody clear it away.
    pub(super) place: Arc<Place>,
    /// How much of it was decoded, for whoever watches.
    pub(super) decoded: Arc<AtomicU64>,
    pub(super) stop: Stop,
}

/// What was restored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unpacked {
    /// Whether the store path is a directory, which has to be sealed after it was moved.
    pub(super) is_dir: bool,
}

impl Unpack {
    fn path(&self) -> StorePath {
        self.info.path.clone()
    }

    fn cache(&self) -> String {
        self.cache.to_string()
    }

    fn disk(&self, source: io::Error) -> FetchError {
        FetchError::Restore { path: self.path(), source }
    }

    fn undecodable(&self, source: io::Error) -> FetchError {
        FetchError::Decode { path: self.path(), cache: self.cache(), source }
    }

    fn wrong_size(&self) -> FetchError {
        FetchError::Size { path: self.path(), cache: self.cache(), expected: self.info.nar_size }
    }

    fn pushed(&self, error: PushError<io::Error>) -> FetchError {
        match error {
            PushError::Nar(source) => self.not_a_nar(source),
            PushError::Sink(source) => self.disk(source),
        }
    }

    fn not_a_nar(&self, source: nix_csi_store::nar::NarError) -> FetchError {
        FetchError::Nar { path: self.path(), cache: self.cache(), source }
    }

    fn count(&self, bytes: u64) {
        self.decoded.fetch_add(bytes, Ordering::Relaxed);
        self.place.written(bytes);
    }

    fn sink(&self, helper: Option<mpsc::SyncSender<SmallFile>>) -> ContentHash<Restore> {
        let (parent, name) = (self.place.parent(), self.place.name().as_bytes());
        let restore = match helper {
            Some(helper) => Restore::with_helper(parent, name, helper),
            None => Restore::new(parent, name),
        };
        ContentHash::new(restore, self.ca.as_ref())
    }

    /// Decodes, hashes and writes what has arrived whole. `buffer` is this thread's own.
    pub(super) fn whole(&self, body: &[u8], buffer: &mut Vec<u8>) -> Result<Unpacked, FetchError> {
        let size = usize::try_from(self.info.nar_size).map_err(|_| self.wrong_size())?;
        let decoded = match self.compressions {
            [Compression::None, Compression::None] => Some(body),
            [Compression::None, Compression::Zstd] | [Compression::Zstd, Compression::None] => {
                // One call, without a window beside the buffer.
                if buffer.len() < size {
                    buffer.resize(size, 0);
                }
                let read = zstd::bulk::Decompressor::new()
                    .and_then(|mut zstd| zstd.decompress_to_buffer(body, &mut buffer[..size]));
                // What is wrong with it is found out below.
                read.is_ok_and(|read| read == size).then_some(&buffer[..size])
            }
            _ => None,
        };
        let mut check = Check::new(self);
        if let Some(decoded) = decoded {
            check.push(decoded)?;
        } else {
            let mut input = self.decode(body)?;
            if buffer.len() < BUFFER {
                buffer.resize(BUFFER, 0);
            }
            while let Some(read) = self.read(&mut input, &mut buffer[..BUFFER])? {
                check.push(&buffer[..read])?;
            }
        }
        check.finish()
    }

    /// The same for what is still arriving.
    pub(super) fn stream(&self, input: Chunks) -> Result<Unpacked, FetchError> {
        if self.info.nar_size >= LARGE {
            return self.overlapped(input);
        }
        let mut check = Check::new(self);
        let mut input = self.decode(input)?;
        let mut buffer = vec![0; BUFFER];
        while let Some(read) = self.read(&mut input, &mut buffer)? {
            check.push(&buffer[..read])?;
        }
        check.finish()
    }

    fn decode<'a>(&self, input: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>, FetchError> {
        let [outer, inner] = self.compressions;
        let decoded = match (outer, inner) {
            (Compression::None, only) | (only, Compression::None) => decoder(only, input, self.memory),
            (outer, inner) => decoder(outer, input, self.memory)
                .and_then(|input| decoder(inner, io::BufReader::new(input), self.memory)),
        };
        decoded.map_err(|error| self.undecodable(error))
    }

    /// Fills `buffer` from `input`; `None` at the end.
    fn read(&self, input: &mut dyn Read, buffer: &mut [u8]) -> Result<Option<usize>, FetchError> {
        if self.stop.is_set() {
            return Err(FetchError::Stopped);
        }
        let mut filled = 0;
        // Short pieces cost a message or a system call each.
        while filled < buffer.len() {
            match input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.undecodable(error)),
            }
        }
        Ok((filled > 0).then_some(filled))
    }

    fn overlapped(&self, input: Chunks) -> Result<Unpacked, FetchError> {
        thread::scope(|scope| {
            let (to_hash, hashed) = mpsc::sync_channel::<Piece>(AHEAD);
            let (to_write, written) = mpsc::sync_channel::<Piece>(AHEAD);
            // Where no more threads are to be had, it is an error of this path and not the end of the process.
            let no_thread = |error| self.disk(error);
            let hash = move || {
                let mut hash = Context::new(&SHA256);
                for piece in hashed {
                    hash.update(piece.bytes());
                }
                digest(hash)
            };
            let hashing = thread::Builder::new().spawn_scoped(scope, hash).map_err(no_thread)?;
            let (to_help, files) = mpsc::sync_channel::<SmallFile>(SMALL_FILES);
            let help = move || files.into_iter().for_each(SmallFile::write);
            let helping = thread::Builder::new().spawn_scoped(scope, help).map_err(no_thread)?;
            let write = move || {
                let (mut nar, mut sink) = (NarReader::new(), self.sink(Some(to_help)));
                for piece in written {
                    nar.push(piece.bytes(), &mut sink).map_err(|error| self.pushed(error))?;
                }
                sink.inner().let_helper_go();
                Ok::<_, FetchError>((nar, sink))
            };
            let writing = thread::Builder::new().spawn_scoped(scope, write).map_err(no_thread)?;
            let mut left = self.info.nar_size;
            let decoded = self.pieces(input, |piece| {
                // Before anything is written: a bomb ends at the size that was signed.
                let len = piece.bytes().len() as u64;
                left = left.checked_sub(len).ok_or_else(|| self.wrong_size())?;
                self.count(len);
                // One of them ended early: its own error says why.
                Ok(to_hash.send(piece.clone()).is_ok() && to_write.send(piece).is_ok())
            });
            drop((to_hash, to_write));
            let found = hashing.join().map_err(|_| FetchError::Stopped)?;
            let written = writing.join().map_err(|_| FetchError::Stopped)?;
            helping.join().map_err(|_| FetchError::Stopped)?;
            decoded?;
            let (nar, sink) = written?;
            self.finish(left, found, &nar, sink)
        })
    }

    /// Gives what is decoded to `give`, until that has enough.
    fn pieces(
        &self,
        mut input: Chunks,
        mut give: impl FnMut(Piece) -> Result<bool, FetchError>,
    ) -> Result<(), FetchError> {
        if self.compressions == [Compression::None; 2] {
            // As they come from the socket, without a copy.
            while let Some(chunk) = input.next().map_err(|error| self.undecodable(error))? {
                if self.stop.is_set() {
                    return Err(FetchError::Stopped);
                }
                if !give(Piece::Received(chunk))? {
                    break;
                }
            }
            return Ok(());
        }
        let mut input = self.decode(input)?;
        // As many as can be with the others at once; after that each is free again when its turn comes.
        let mut ring: Vec<Arc<Buffer>> = Vec::new();
        let mut turn = 0;
        loop {
            if ring.len() < AHEAD + 2 {
                ring.push(Arc::new(Buffer { bytes: vec![0; BUFFER], len: 0 }));
            }
            turn = (turn + 1) % ring.len();
            if Arc::get_mut(&mut ring[turn]).is_none() {
                ring[turn] = Arc::new(Buffer { bytes: vec![0; BUFFER], len: 0 });
            }
            let Some(buffer) = Arc::get_mut(&mut ring[turn]) else { return Err(FetchError::Stopped) };
            match self.read(&mut input, &mut buffer.bytes)? {
                Some(len) => buffer.len = len,
                None => return Ok(()),
            }
            if !give(Piece::Decoded(Arc::clone(&ring[turn])))? {
                return Ok(());
            }
        }
    }

    fn finish(
        &self,
        left: u64,
        found: NarHash,
        nar: &NarReader,
        mut sink: ContentHash<Restore>,
    ) -> Result<Unpacked, FetchError> {
        if left > 0 {
            return Err(self.wrong_size());
        }
        if found != self.info.nar_hash {
            let expected = self.info.nar_hash;
            return Err(FetchError::Hash { path: self.path(), cache: self.cache(), expected, found });
        }
        nar.finish().map_err(|source| self.not_a_nar(source))?;
        sink.inner().finish().map_err(|error| self.disk(error))?;
        let restore = sink.finish(&found).map_err(|source| FetchError::ContentAddress {
            path: self.path(),
            cache: self.cache(),
            source,
        })?;
        Ok(Unpacked { is_dir: restore.is_dir() })
    }
}

/// One thread's way through a NAR.
struct Check<'a> {
    unpack: &'a Unpack,
    left: u64,
    hash: Context,
    nar: NarReader,
    sink: ContentHash<Restore>,
}

impl<'a> Check<'a> {
    fn new(unpack: &'a Unpack) -> Self {
        Self {
            unpack,
            left: unpack.info.nar_size,
            hash: Context::new(&SHA256),
            nar: NarReader::new(),
            sink: unpack.sink(None),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), FetchError> {
        // Before anything is written: a bomb ends at the size that was signed.
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or_else(|| self.unpack.wrong_size())?;
        self.unpack.count(bytes.len() as u64);
        self.hash.update(bytes);
        self.nar.push(bytes, &mut self.sink).map_err(|error| self.unpack.pushed(error))
    }

    fn finish(self) -> Result<Unpacked, FetchError> {
        self.unpack.finish(self.left, digest(self.hash), &self.nar, self.sink)
    }
}

fn digest(hash: Context) -> NarHash {
    let mut found = [0; 32];
    found.copy_from_slice(hash.finish().as_ref());
    NarHash::new(found)
}

/// Bytes that are hashed and written at the same time.
#[derive(Clone)]
enum Piece {
    Received(Bytes),
    Decoded(Arc<Buffer>),
}

struct Buffer {
    bytes: Vec<u8>,
    len: usize,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Received(bytes) => bytes,
            Self::Decoded(buffer) => &buffer.bytes[..buffer.len],
        }
    }
}

/// The chunks of a transfer, to read from without copying them together.
pub(super) struct Chunks {
    now: Bytes,
    more: tokio::sync::mpsc::Receiver<Bytes>,
    /// How many more may come. Empty frames decode to nothing, so the size of the NAR does not end them.
    left: u64,
}

impl Chunks {
    pub(super) fn new(more: tokio::sync::mpsc::Receiver<Bytes>, nar_size: u64) -> Self {
        Self { now: Bytes::new(), more, left: largest_body(nar_size) }
    }

    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if !self.now.is_empty() {
            return Ok(Some(std::mem::take(&mut self.now)));
        }
        let Some(chunk) = self.more.blocking_recv() else { return Ok(None) };
        let too_much = || io::Error::new(io::ErrorKind::FileTooLarge, "far more data than the NAR has");
        self.left = self.left.checked_sub(chunk.len() as u64).ok_or_else(too_much)?;
        Ok(Some(chunk))
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.now.is_empty() {
            match self.next()? {
                Some(chunk) => self.now = chunk,
                None => break,
            }
        }
        Ok(&self.now)
    }

    fn consume(&mut self, len: usize) {
        let _ = self.now.split_to(len);
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = self.fill_buf()?;
        let len = buffer.len().min(now.len());
        buffer[..len].copy_from_slice(&now[..len]);
        self.consume(len);
        Ok(len)
    }
}

/// The most bytes that a NAR of that size may have as a file: some formats make a little more of it.
pub(super) fn largest_body(nar_size: u64) -> u64 {
    nar_size.saturating_add(nar_size / 8).saturating_add(1 << 20)
}
