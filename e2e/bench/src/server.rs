//! The caches over HTTP on loopback.
//!
//! Rows without latency are served by nginx, which costs the machine next to nothing. With latency it is a
//! server of our own that sleeps before each answer. All contestants of a row have the same server.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::serve::ListenerExt as _;

/// nginx, and what servers with latency are started from.
pub(crate) struct Servers {
    corpora: PathBuf,
    nginx: Child,
    address: SocketAddr,
}

impl Servers {
    /// Starts nginx, which gets a directory in `scratch`.
    pub(crate) fn start(corpora: &Path, scratch: &Path) -> Result<Self> {
        // Free a moment ago; if somebody else takes it, nginx does not start and that is said.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let nginx_dir = scratch.join("nginx");
        fs::create_dir(&nginx_dir).with_context(|| nginx_dir.display().to_string())?;
        let config = nginx_dir.join("nginx.conf");
        fs::write(&config, nginx_config(&nginx_dir, corpora, address))?;
        // It ends with us, however we end.
        let nginx = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "nginx", "-e", "stderr", "-c"])
            .arg(&config)
            .spawn()
            .context("setpriv nginx; e2e/setup.sh installs it")?;
        let servers = Self { corpora: corpora.to_owned(), nginx, address };
        for _ in 0..100 {
            if TcpStream::connect(address).is_ok() {
                return Ok(servers);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("nginx does not answer at {address}")
    }

    /// The address of a server that answers after `delay`, without a slash at its end.
    pub(crate) fn url(&self, delay: Duration) -> Result<String> {
        let address = if delay.is_zero() { self.address } else { delayed(&self.corpora, delay)? };
        Ok(format!("http://{address}"))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.nginx);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.nginx.wait();
    }
}

fn nginx_config(dir: &Path, root: &Path, address: SocketAddr) -> String {
    let (dir, root) = (dir.display(), root.display());
    format!(
        "daemon off;
error_log stderr crit;
user root;
worker_processes 1;
pid {dir}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  default_type application/octet-stream;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  server {{
    listen {address} backlog=1024;
    root \"{root}\";
  }}
}}
"
    )
}

/// Starts a server that sleeps before it answers. It runs until the program ends.
fn delayed(root: &Path, delay: Duration) -> Result<SocketAddr> {
    let (sender, bound) = mpsc::channel();
    let router = Router::new().fallback(answer).with_state((root.to_owned(), delay));
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
            sender.send(listener.local_addr()?)?;
            let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
            Ok(axum::serve(listener, router).await?)
        })
    });
    bound.recv().context("the server with latency did not start")
}

async fn answer(State((root, delay)): State<(PathBuf, Duration)>, uri: Uri) -> Result<Vec<u8>, StatusCode> {
    tokio::time::sleep(delay).await;
    let path = Path::new(uri.path().trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(StatusCode::BAD_REQUEST);
    }
    // From the page cache, and small: without a thread for it.
    fs::read(root.join(path)).map_err(|_| StatusCode::NOT_FOUND)
}
