//! Threads that restore: decode, hash, parse and write are work for cores, not for the network's threads.
//!
//! What has arrived whole is restored by one thread for each core, in fair turns; none of them ever waits for a
//! socket. What is too large for that gets a thread for itself as long as it arrives. The memory budget bounds how
//! many of those there are.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use super::budget::Share;
use super::error::FetchError;
use super::fair::{FairQueue, Urgency};
use super::unpack::{Chunks, Unpack, Unpacked};

type Outcome = Result<Unpacked, FetchError>;

/// A NAR file that has arrived.
struct Job {
    unpack: Unpack,
    body: Vec<u8>,
    memory: Share,
    done: oneshot::Sender<Outcome>,
}

/// The threads. They end when the last clone of this is dropped and the jobs are done.
#[derive(Clone)]
pub(super) struct RestorePool(Arc<Ending>);

struct Ending(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: FairQueue<Job>,
    is_ending: bool,
}

impl RestorePool {
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        // Dropped, and so ending the threads that run already, if one does not start.
        let pool = Self(Arc::new(Ending(Arc::clone(&shared))));
        for n in 0..threads {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("restore-{n}")).spawn(move || shared.work())?;
        }
        Ok(pool)
    }

    /// Restores what has arrived.
    pub(super) async fn whole(&self, unpack: Unpack, body: Vec<u8>, memory: Share) -> Outcome {
        let (done, restored) = oneshot::channel();
        let urgency = Urgency::Nar(unpack.info.nar_size);
        let shared = &self.0.0;
        // In the turn that gave it its memory.
        let owner = memory.owner();
        let job = Job { unpack, body, memory, done };
        shared.queue.lock().unwrap_or_else(PoisonError::into_inner).jobs.push(owner, urgency, job);
        shared.changed.notify_one();
        restored.await.unwrap_or(Err(FetchError::Stopped))
    }

    /// Begins to restore what is still arriving.
    pub(super) fn stream(unpack: Unpack, chunks: Chunks, memory: Share) -> oneshot::Receiver<Outcome> {
        let (done, restored) = oneshot::channel();
        let name = "restore-large".to_owned();
        let spawned = thread::Builder::new().name(name).spawn(move || {
            let restored = unpack.stream(chunks);
            drop((unpack, memory));
            // Nobody may wait for it any more.
            let _ = done.send(restored);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to restore with");
        }
        restored
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner).is_ending = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut buffer = Vec::new();
        loop {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let Job { unpack, body, memory, done } = loop {
                if let Some(job) = queue.jobs.pop() {
                    break job;
                }
                if queue.is_ending {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            if unpack.stop.is_set() {
                continue;
            }
            let restored = unpack.whole(&body, &mut buffer);
            drop((unpack, body, memory));
            let _ = done.send(restored);
        }
    }
}
