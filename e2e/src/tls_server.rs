//! A binary cache behind TLS, by HTTP/1.1 or HTTP/2, that ends streams and connections as a test tells it to.

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, Version, header};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// The files never change, so one validator is right for all of them.
const TAG: &str = "\"as ever\"";
/// What is passed to HTTP/2 at once, and the most that it holds of one stream.
const PIECE: usize = 16 * 1024;

/// An authority that only a test trusts.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// What a server must send behind its own certificate.
    chain: Vec<CertificateDer<'static>>,
    pem: String,
}

impl Authority {
    /// One that is trusted by itself.
    pub fn new(name: &str) -> Result<Self> {
        let (params, key) = (Self::params(name), KeyPair::generate()?);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), chain: Vec::new(), pem })
    }

    /// One that is trusted because this one is.
    pub fn intermediate(&self, name: &str) -> Result<Self> {
        let (params, key) = (Self::params(name), KeyPair::generate()?);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let chain = std::iter::once(certificate.der().clone()).chain(self.chain.iter().cloned()).collect();
        Ok(Self { issuer: Issuer::new(params, key), chain, pem: certificate.pem() })
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two of one name would be told apart by their signatures only.
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for host names or addresses, valid from the beginning of a year to that of another.
    pub fn certify(&self, names: &[&str], years: Range<i32>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let [from, to] = [years.start, years.end].map(|year| date_time_ymd(year, 1, 1));
        (params.not_before, params.not_after) = (from, to);
        let own = params.signed_by(&key, &self.issuer)?.der().clone();
        let chain = std::iter::once(own).chain(self.chain.iter().cloned()).collect();
        Ok(Identity { chain, key: PrivateKeyDer::Pkcs8(key.serialize_der().into()) })
    }
}

/// What a server says it is.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// How an answer by HTTP/2 ends early, if it is long enough.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    /// RST_STREAM in place of it.
    Refused(Reason),
    /// RST_STREAM in its body.
    Reset {
        /// After so many bytes.
        at: usize,
        /// What the frame says.
        reason: Reason,
    },
    /// GOAWAY in its body, and then the connection is closed with all its streams.
    Closed {
        /// After so many bytes.
        at: usize,
        /// What the frame says.
        reason: Reason,
    },
}

struct Rule {
    suffix: String,
    left: usize,
    ending: Ending,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What was asked for.
    pub path: String,
    /// Which part of it, or nothing.
    pub range: String,
    /// By which HTTP.
    pub version: Version,
    /// The number of its connection.
    pub connection: usize,
}

/// The server. It ends with the value.
pub struct TlsServer {
    port: u16,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

struct State {
    dir: PathBuf,
    /// What it offers by ALPN.
    protocols: Vec<Vec<u8>>,
    tls: Mutex<Arc<ServerConfig>>,
    rules: Mutex<Vec<Rule>>,
    asked: Mutex<Vec<Asked>>,
    most_streams: AtomicU32,
    most_requests: AtomicUsize,
}

impl TlsServer {
    /// Serves `dir` until it is dropped. Of `protocols` (`h2`, `http/1.1`) it takes the first that a client has, too.
    /// To be called in a runtime.
    pub fn start(dir: &Path, identity: &Identity, protocols: &[&str]) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let listener = TcpListener::from_std(listener)?;
        let protocols: Vec<_> = protocols.iter().map(|name| name.as_bytes().to_owned()).collect();
        let state = Arc::new(State {
            dir: dir.to_owned(),
            tls: Mutex::new(tls(identity, &protocols)?),
            protocols,
            rules: Mutex::default(),
            asked: Mutex::default(),
            most_streams: AtomicU32::new(128),
            most_requests: AtomicUsize::new(usize::MAX),
        });
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            // They end with this task.
            let mut connections = JoinSet::new();
            let mut number = 0;
            while let Ok((connection, _)) = listener.accept().await {
                number += 1;
                let state = Arc::clone(&shared);
                // A client that does not like the certificate, or that goes away, is what some tests are about.
                connections.spawn(async move { drop(state.converse(connection, number).await) });
            }
        });
        Ok(Self { port, state, accepting })
    }

    /// Its address, as that of `host`.
    pub fn url(&self, host: &str) -> String {
        format!("https://{host}:{}/", self.port)
    }

    /// From the next connection on it is this.
    pub fn becomes(&self, identity: &Identity) -> Result<()> {
        *lock(&self.state.tls) = tls(identity, &self.state.protocols)?;
        Ok(())
    }

    /// The next `times` answers for paths that end so end early. The first rule that fits counts.
    pub fn rule(&self, suffix: impl Into<String>, times: usize, ending: Ending) {
        lock(&self.state.rules).push(Rule { suffix: suffix.into(), left: times, ending });
    }

    /// From now on without rules.
    pub fn behave(&self) {
        lock(&self.state.rules).clear();
    }

    /// New connections take so many streams at the same time.
    pub fn takes_streams(&self, at_once: u32) {
        self.state.most_streams.store(at_once, Ordering::Relaxed);
    }

    /// New connections say GOAWAY with so many requests, and end when those are answered.
    pub fn takes_requests(&self, of_a_connection: usize) {
        self.state.most_requests.store(of_a_connection, Ordering::Relaxed);
    }

    /// The requests for paths that end so, in their order.
    pub fn asked(&self, suffix: &str) -> Vec<Asked> {
        lock(&self.state.asked).iter().filter(|asked| asked.path.ends_with(suffix)).cloned().collect()
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn tls(identity: &Identity, protocols: &[Vec<u8>]) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = protocols.to_vec();
    Ok(Arc::new(config))
}

impl State {
    async fn converse(self: Arc<Self>, connection: TcpStream, number: usize) -> Result<()> {
        connection.set_nodelay(true)?;
        let tls = Arc::clone(&*lock(&self.tls));
        let connection = TlsAcceptor::from(tls).accept(connection).await?;
        if connection.get_ref().1.alpn_protocol() == Some(b"h2") {
            return self.http2(connection, number).await;
        }
        let answer = service_fn(|request| {
            let answer = self.answer(request, number);
            async { Ok::<_, Infallible>(answer.await.map(Full::new)) }
        });
        let server = hyper::server::conn::http1::Builder::new();
        Ok(server.serve_connection(TokioIo::new(connection), answer).await?)
    }

    async fn http2(self: &Arc<Self>, connection: TlsStream<TcpStream>, number: usize) -> Result<()> {
        let mut connection = h2::server::Builder::new()
            .max_concurrent_streams(self.most_streams.load(Ordering::Relaxed))
            .max_send_buffer_size(PIECE)
            .handshake(connection)
            .await?;
        let (close, mut closing) = mpsc::unbounded_channel();
        // They end with the connection.
        let mut answers = JoinSet::new();
        let mut left = self.most_requests.load(Ordering::Relaxed);
        loop {
            tokio::select! {
                request = connection.accept() => {
                    let Some(request) = request else { return Ok(()) };
                    let (request, respond) = request?;
                    left = left.saturating_sub(1);
                    if left == 0 {
                        connection.graceful_shutdown();
                    }
                    let (state, close) = (Arc::clone(self), close.clone());
                    answers.spawn(async move {
                        let ending = state.ending(request.uri().path());
                        let response = state.answer(request, number).await;
                        // A stream that the client no longer wants.
                        drop(send(response, respond, ending, &close).await);
                    });
                }
                Some(reason) = closing.recv() => connection.abrupt_shutdown(reason),
            }
        }
    }

    fn ending(&self, path: &str) -> Option<Ending> {
        let mut rules = lock(&self.rules);
        let rule = rules.iter_mut().find(|rule| rule.left > 0 && path.ends_with(&rule.suffix))?;
        rule.left -= 1;
        Some(rule.ending)
    }

    async fn answer<B>(&self, request: Request<B>, connection: usize) -> Response<Bytes> {
        let (path, headers) = (request.uri().path().to_owned(), request.headers());
        let range = text(headers, header::RANGE).to_owned();
        let first = (text(headers, header::IF_RANGE) == TAG).then(|| first_byte(&range)).flatten();
        lock(&self.asked).push(Asked { path: path.clone(), range, version: request.version(), connection });
        let mut response = Response::new(Bytes::new());
        let (status, headers) = match tokio::fs::read(self.dir.join(path.trim_start_matches('/'))).await {
            Err(_) => (404, vec![]),
            Ok(file) => {
                let all = file.len();
                *response.body_mut() = Bytes::from(file).slice(first.unwrap_or(0).min(all)..);
                match first {
                    None => (200, vec![(header::ETAG, TAG.to_owned())]),
                    Some(first) if first < all => {
                        (206, vec![(header::CONTENT_RANGE, format!("bytes {first}-{}/{all}", all - 1))])
                    }
                    Some(_) => (416, vec![]),
                }
            }
        };
        let length = (header::CONTENT_LENGTH, response.body().len().to_string());
        *response.status_mut() = status.try_into().expect("a status");
        for (name, value) in headers.into_iter().chain([length]) {
            response.headers_mut().insert(name, value.try_into().expect("a header"));
        }
        response
    }
}

/// Sends as much as there is until the `ending`.
async fn send(
    response: Response<Bytes>,
    mut respond: SendResponse<Bytes>,
    ending: Option<Ending>,
    close: &mpsc::UnboundedSender<Reason>,
) -> Result<()> {
    let (head, mut body) = response.into_parts();
    let ending = match ending {
        Some(Ending::Refused(reason)) => {
            respond.send_reset(reason);
            return Ok(());
        }
        Some(Ending::Reset { at, .. } | Ending::Closed { at, .. }) if at >= body.len() => None,
        ending => ending,
    };
    if let Some(Ending::Reset { at, .. } | Ending::Closed { at, .. }) = ending {
        body.truncate(at);
    }
    let mut stream = respond.send_response(Response::from_parts(head, ()), false)?;
    while !body.is_empty() {
        let room = room(&mut stream, 1).await?;
        stream.send_data(body.split_to(room.min(body.len())), false)?;
    }
    // What is not sent when a stream is reset is thrown away. There is room for a whole piece when all is sent.
    if ending.is_some() {
        room(&mut stream, PIECE).await?;
    }
    match ending {
        Some(Ending::Reset { reason, .. }) => stream.send_reset(reason),
        Some(Ending::Closed { reason, .. }) => {
            close.send(reason)?;
            // A stream that is dropped is reset.
            pending::<()>().await;
        }
        _ => stream.send_data(Bytes::new(), true)?,
    }
    Ok(())
}

/// How much may be sent: at least so many bytes, and at most a piece.
async fn room(stream: &mut SendStream<Bytes>, least: usize) -> Result<usize, h2::Error> {
    stream.reserve_capacity(PIECE);
    while stream.capacity() < least {
        poll_fn(|context| stream.poll_capacity(context)).await.ok_or(Reason::STREAM_CLOSED)??;
    }
    Ok(stream.capacity())
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> &str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Of `bytes=<first>-`, the only range that is understood.
fn first_byte(range: &str) -> Option<usize> {
    range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
