//! A proxy in front of a cache that cuts, lies, stalls and fails, as often as it is told to.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What is done to an answer.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Another status, and nothing else.
    Status(u16),
    /// The connection ends after this share of the body.
    CutAt {
        /// How much of it arrives, in percent.
        percent: usize,
    },
    /// One byte in the middle of the body is another.
    Flip,
    /// Nothing comes for this long, then the connection ends.
    Stall(Duration),
}

struct Rule {
    suffix: &'static str,
    fault: Fault,
    left: usize,
}

/// The proxy; it ends with the value.
pub struct FaultProxy {
    port: u16,
    rules: Arc<Mutex<Vec<Rule>>>,
    stopping: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// A proxy in front of a server on a loopback port, without faults yet.
    pub fn start(upstream: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (rules, stopping) = (Arc::<Mutex<Vec<Rule>>>::default(), Arc::new(AtomicBool::new(false)));
        let accepting = {
            let (rules, stopping) = (Arc::clone(&rules), Arc::clone(&stopping));
            std::thread::spawn(move || {
                for connection in listener.incoming() {
                    if stopping.load(Ordering::Relaxed) {
                        return;
                    }
                    let (Ok(connection), rules) = (connection, Arc::clone(&rules)) else { continue };
                    // A client that went away is what some of the faults lead to.
                    std::thread::spawn(move || drop(answer(connection, upstream, &rules)));
                }
            })
        };
        Ok(Self { port, rules, stopping, accepting: Some(accepting) })
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// The next `times` answers for paths that end in `suffix` get this fault.
    pub fn fail(&self, suffix: &'static str, fault: Fault, times: usize) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push(Rule { suffix, fault, left: times });
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

fn answer(mut client: TcpStream, upstream: u16, rules: &Mutex<Vec<Rule>>) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).context("a request line")?;
    let fault = {
        let mut rules = rules.lock().unwrap_or_else(PoisonError::into_inner);
        let rule = rules.iter_mut().find(|rule| rule.left > 0 && path.ends_with(rule.suffix));
        rule.map(|rule| {
            rule.left -= 1;
            rule.fault
        })
    };
    if let Some(Fault::Status(status)) = fault {
        return Ok(write!(
            client,
            "HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?);
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    write!(server, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut reply = Vec::new();
    server.read_to_end(&mut reply)?;
    let body = reply.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("an answer")? + 4;
    let len = reply.len() - body;
    match fault {
        None | Some(Fault::Status(_)) => client.write_all(&reply)?,
        Some(Fault::CutAt { percent }) => client.write_all(&reply[..body + len * percent / 100])?,
        Some(Fault::Flip) => {
            reply[body + len / 2] ^= 0x20;
            client.write_all(&reply)?;
        }
        Some(Fault::Stall(time)) => {
            client.write_all(&reply[..body + len / 2])?;
            std::thread::sleep(time);
        }
    }
    match client.shutdown(std::net::Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error.into()),
        _ => Ok(()),
    }
}
