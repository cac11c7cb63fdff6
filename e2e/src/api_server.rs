//! As much of an API server as the node driver talks to: it takes events, and has the objects that a test gives it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// An event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The name of the pod.
    pub pod: String,
    /// `reason`.
    pub reason: String,
    /// `type`.
    pub kind: String,
    /// `message`.
    pub message: String,
}

#[derive(Default)]
struct State {
    /// By their paths.
    objects: BTreeMap<String, Value>,
    events: Vec<Told>,
}

/// The server; it ends with the value.
pub struct ApiServer {
    port: u16,
    state: Arc<Mutex<State>>,
    stopping: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// A server without objects. What it does not have nobody may see, so nothing is said to be gone.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (state, stopping) = (Arc::<Mutex<State>>::default(), Arc::new(AtomicBool::new(false)));
        let accepting = {
            let (state, stopping) = (Arc::clone(&state), Arc::clone(&stopping));
            std::thread::spawn(move || {
                for connection in listener.incoming() {
                    if stopping.load(Ordering::Relaxed) {
                        return;
                    }
                    let (Ok(connection), state) = (connection, Arc::clone(&state)) else { continue };
                    std::thread::spawn(move || drop(answer(connection, &state)));
                }
            })
        };
        Ok(Self { port, state, stopping, accepting: Some(accepting) })
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Puts an object at a path like `/api/v1/nodes/a`.
    pub fn put(&self, path: &str, object: Value) {
        lock(&self.state).objects.insert(path.to_owned(), object);
    }

    /// The object at a path, as it is now.
    pub fn get(&self, path: &str) -> Option<Value> {
        lock(&self.state).objects.get(path).cloned()
    }

    /// The events with that reason so far.
    pub fn told(&self, reason: &str) -> Vec<Told> {
        lock(&self.state).events.iter().filter(|event| event.reason == reason).cloned().collect()
    }

    /// The same, as soon as there is one: the driver waits for nobody who writes them.
    pub fn wait_for(&self, reason: &str) -> Result<Vec<Told>> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            let told = self.told(reason);
            if !told.is_empty() {
                return Ok(told);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::bail!("no event {reason}, but {:?}", lock(&self.state).events)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(mut client: TcpStream, state: &Mutex<State>) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let (mut len, mut is_json_patch) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => len = value.trim().parse()?,
            "content-type" => is_json_patch = value.contains("json-patch+json"),
            _ => {}
        }
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    let mut words = request.split(' ');
    let (method, target) = (words.next().context("a method")?, words.next().context("a path")?);
    let path = target.split('?').next().unwrap_or_default();
    let (status, object) = lock(state).answer(method, path, &body, is_json_patch);
    let text = object.to_string();
    let head = "Content-Type: application/json\r\nConnection: close\r\n";
    write!(client, "HTTP/1.1 {status} x\r\n{head}Content-Length: {}\r\n\r\n{text}", text.len())?;
    Ok(())
}

impl State {
    fn answer(&mut self, method: &str, path: &str, body: &[u8], is_json_patch: bool) -> (u16, Value) {
        let failure = |status: u16, reason: &str| {
            let status_of = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "reason": reason, "message": reason, "code": status,
            });
            (status, status_of)
        };
        match method {
            "GET" => {
                self.objects.get(path).map_or_else(|| failure(403, "Forbidden"), |found| (200, found.clone()))
            }
            "PATCH" if is_json_patch => {
                let patched = self.objects.get(path).cloned().and_then(|mut object| {
                    let operations: Vec<Value> = serde_json::from_slice(body).ok()?;
                    operations.iter().try_for_each(|operation| apply(&mut object, operation))?;
                    Some(object)
                });
                let Some(object) = patched else { return failure(422, "Invalid") };
                self.objects.insert(path.to_owned(), object.clone());
                (200, object)
            }
            "PATCH" => {
                // Server-side apply sends YAML, of which JSON is a part.
                let Ok(object) = serde_json::from_slice::<Value>(body) else {
                    return failure(400, "BadRequest");
                };
                if path.contains("/events/") {
                    let text =
                        |at: &str| object.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned();
                    self.events.push(Told {
                        pod: text("/involvedObject/name"),
                        reason: text("/reason"),
                        kind: text("/type"),
                        message: text("/message"),
                    });
                }
                (200, object)
            }
            _ => failure(405, "MethodNotAllowed"),
        }
    }
}

/// `test` and `remove` of a JSON patch, which is all that the driver uses.
fn apply(object: &mut Value, operation: &Value) -> Option<()> {
    let path = operation["path"].as_str()?;
    match operation["op"].as_str()? {
        "test" => (object.pointer(path) == Some(&operation["value"])).then_some(()),
        "remove" => {
            let (parent, name) = path.rsplit_once('/')?;
            match object.pointer_mut(parent)? {
                Value::Array(entries) => {
                    let n: usize = name.parse().ok()?;
                    (n < entries.len()).then(|| drop(entries.remove(n)))
                }
                Value::Object(map) => map.remove(name).map(drop),
                _ => None,
            }
        }
        _ => None,
    }
}
