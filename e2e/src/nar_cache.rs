//! Caches of paths that no Nix would make, well signed; and a server that is as slow as a test wants.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use data_encoding::BASE64;
use nix_csi_store::{NarHash, StorePath, encode_base32, fingerprint};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tempfile::TempDir;

/// A directory that is a binary cache, with a key that signs whatever it is given.
pub struct NarCache {
    dir: TempDir,
    key_name: &'static str,
    key: Ed25519KeyPair,
}

/// What a narinfo says, and what is there.
#[derive(Debug, Clone)]
pub struct Offer<'a> {
    /// The name of the store path; its hash follows from it.
    pub name: &'a str,
    /// `Compression`.
    pub compression: &'a str,
    /// What the NAR's file has.
    pub file: &'a [u8],
    /// `NarHash`.
    pub nar_hash: NarHash,
    /// `NarSize`.
    pub nar_size: u64,
    /// `References`.
    pub references: &'a [StorePath],
}

/// SHA-256 of these bytes.
pub fn sha256(bytes: &[u8]) -> NarHash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    NarHash::new(hash)
}

impl NarCache {
    /// An empty cache with a new key.
    pub fn new() -> Result<Self> {
        Self::with_key("nix-csi-hostile-1")
    }

    /// The same, with a key of that name.
    pub fn with_key(key_name: &'static str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("nar"))?;
        fs::write(dir.path().join("nix-cache-info"), "StoreDir: /nix/store\n")?;
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .and_then(|key| Ok(Ed25519KeyPair::from_pkcs8(key.as_ref())?));
        Ok(Self { dir, key_name, key: key.map_err(|_| anyhow::anyhow!("no new key"))? })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its address as a directory.
    pub fn url(&self) -> String {
        format!("file://{}", self.dir().display())
    }

    /// The key that all of it is signed with.
    pub fn public_key(&self) -> String {
        format!("{}:{}", self.key_name, BASE64.encode(self.key.public_key().as_ref()))
    }

    /// Offers these bytes as they are, whether they are a NAR or not.
    pub fn add(&self, name: &str, nar: &[u8]) -> Result<StorePath> {
        self.offer(&Offer {
            name,
            compression: "none",
            file: nar,
            nar_hash: sha256(nar),
            nar_size: nar.len() as u64,
            references: &[],
        })
    }

    /// Offers a path, well signed.
    pub fn offer(&self, offer: &Offer<'_>) -> Result<StorePath> {
        let hash = encode_base32(&sha256(offer.name.as_bytes()).digest()[..20]);
        let path = StorePath::from_base_name(&format!("{hash}-{}", offer.name))?;
        let signed = fingerprint(&path, offer.nar_hash, offer.nar_size, offer.references);
        let signature = BASE64.encode(self.key.sign(signed.as_bytes()).as_ref());
        let references: Vec<_> = offer.references.iter().map(StorePath::base_name).collect();
        let Offer { compression, file, nar_hash, nar_size, .. } = offer;
        fs::write(self.dir().join(format!("nar/{hash}.nar")), file)?;
        let info = format!(
            "StorePath: {path}\nURL: nar/{hash}.nar\nCompression: {compression}\nFileSize: {}\n\
             NarHash: {nar_hash}\nNarSize: {nar_size}\nReferences: {}\nSig: {}:{signature}\n",
            file.len(),
            references.join(" "),
            self.key_name,
        );
        fs::write(self.dir().join(format!("{hash}.narinfo")), info)?;
        Ok(path)
    }
}

/// A NAR of one file.
pub fn nar_of_file(contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut word = |bytes: &[u8]| {
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(8), 0);
    };
    for bytes in [&b"nix-archive-1"[..], b"(", b"type", b"regular", b"contents", contents, b")"] {
        word(bytes);
    }
    out
}

/// A server of one directory, with one line to all clients together, that writes down what it is asked for.
pub struct SlowServer {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    dir: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

struct State {
    /// Bytes a second, for everybody together.
    rate: u64,
    /// When the line is free again.
    free: Instant,
    held: HashSet<String>,
    asked: Vec<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlowServer {
    /// Serves `dir` with that many bytes a second.
    pub fn start(dir: &Path, rate: u64) -> Result<Self> {
        ensure!(dir.is_dir(), "{} is not there", dir.display());
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let state = State { rate, free: Instant::now(), held: HashSet::new(), asked: Vec::new() };
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let accepting = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for connection in listener.incoming() {
                    if shared.stopping.load(Ordering::Relaxed) {
                        return;
                    }
                    let (Ok(connection), shared) = (connection, Arc::clone(&shared)) else { continue };
                    // A client that was killed is what this server is for.
                    std::thread::spawn(move || drop(serve(connection, &shared)));
                }
            })
        };
        Ok(Self { port, shared, accepting: Some(accepting) })
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// So many bytes a second from now on.
    pub fn set_rate(&self, rate: u64) {
        let mut state = self.shared.state();
        (state.rate, state.free) = (rate, Instant::now());
    }

    /// Whoever asks for this file gets the first half of it, and the rest when it is let go.
    pub fn hold(&self, file: &str) {
        self.shared.state().held.insert(file.to_owned());
    }

    /// Lets go of all files.
    pub fn release(&self) {
        self.shared.state().held.clear();
        self.shared.changed.notify_all();
    }

    /// What was asked for since it was taken the last time.
    pub fn asked(&self) -> Vec<String> {
        self.shared.state().asked.clone()
    }

    /// The same; from here on it is counted anew.
    pub fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.state().asked)
    }
}

impl Drop for SlowServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.release();
        // Wakes the thread that waits for a connection.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

fn serve(mut client: TcpStream, shared: &Shared) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let file = request.split(' ').nth(1).context("a request line")?.trim_start_matches('/').to_owned();
    shared.state().asked.push(file.clone());
    let body = match fs::read(shared.dir.join(&file)) {
        Ok(body) => body,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(
                client.write_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?
            );
        }
        Err(error) => return Err(error.into()),
    };
    write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    let mut sent = 0;
    for piece in body.chunks((body.len() / 2).clamp(1, 16 * 1024)) {
        if sent >= body.len() / 2 {
            let mut state = shared.state();
            while state.held.contains(&file) && !shared.stopping.load(Ordering::Relaxed) {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if shared.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        let turn = {
            let mut state = shared.state();
            let turn = state.free.max(Instant::now());
            state.free = turn + Duration::from_secs(1).mul_f64(ratio(piece.len(), state.rate));
            turn
        };
        std::thread::sleep(turn.saturating_duration_since(Instant::now()));
        client.write_all(piece)?;
        sent += piece.len();
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a time, not a sum")]
fn ratio(len: usize, rate: u64) -> f64 {
    len as f64 / rate.max(1) as f64
}
