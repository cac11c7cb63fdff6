//! A static HTTP server on a loopback port: busybox, which ends with the value.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::net::TcpSocket;

/// A server of one directory.
pub struct StaticServer {
    child: Child,
    port: u16,
    /// Bound to the port and never listening: nobody else gets it, neither before the server does nor after it.
    _port: TcpSocket,
}

impl StaticServer {
    /// Serves `dir` until it is dropped.
    pub fn start(dir: &Path) -> Result<Self> {
        let reserved = TcpSocket::new_v4()?;
        // As the server does: of two sockets that both allow it, one may listen.
        reserved.set_reuseaddr(true)?;
        reserved.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let port = reserved.local_addr()?.port();
        let child = Command::new("busybox")
            .args(["httpd", "-f", "-p", &format!("127.0.0.1:{port}"), "-h"])
            .arg(dir)
            .stdin(Stdio::null())
            .spawn()
            .context("busybox httpd; e2e/setup.sh installs it")?;
        let mut server = Self { child, port, _port: reserved };
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = server.child.try_wait()?;
            ensure!(ended.is_none(), "busybox httpd on port {port} ended: {ended:?}");
            let waited = start.elapsed();
            ensure!(waited < Duration::from_mins(1), "busybox httpd does not answer on port {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Ends the server. Its port stays refused as long as the value lives: another test's server may not get it.
    pub fn stop(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Its port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }
}

impl Drop for StaticServer {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}
