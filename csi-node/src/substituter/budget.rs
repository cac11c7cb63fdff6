//! A budget that waiting fetches share: connections to one cache, or bytes of memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::fair::{FairQueue, Owner, Turn, Urgency};

/// So many units, handed out in turn. A clone is the same budget.
#[derive(Clone)]
pub(super) struct Budget(Arc<Mutex<State>>);

struct State {
    total: usize,
    free: usize,
    /// Kept for owners that hold nothing yet, so that one large fetch is never in everybody's way.
    reserve: usize,
    held: HashMap<Owner, usize>,
    waiting: FairQueue<Waiter>,
}

struct Waiter {
    owner: Owner,
    want: usize,
    granted: oneshot::Sender<Share>,
}

/// A part of a budget, given back when it is dropped.
pub(super) struct Share {
    budget: Budget,
    owner: Owner,
    units: usize,
}

impl Share {
    /// In whose turn it was granted.
    pub(super) fn owner(&self) -> Owner {
        self.owner
    }
}

impl Budget {
    /// `total` units, of which a `1/reserve_part` is kept for newcomers.
    pub(super) fn new(total: usize, reserve_part: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            total,
            free: total,
            reserve: total / reserve_part,
            held: HashMap::new(),
            waiting: FairQueue::default(),
        })))
    }

    /// Waits for `want` units. More than there are means all of them: then nothing else is under way.
    ///
    /// Whoever holds a share of this budget must not wait for another one.
    pub(super) async fn acquire(&self, owner: Owner, urgency: Urgency, want: usize) -> Share {
        let (granted, share) = oneshot::channel();
        {
            let mut state = self.state();
            let want = want.min(state.total);
            state.waiting.push(owner, urgency, Waiter { owner, want, granted });
        }
        self.grant();
        // If this wait ends early, those behind it may be next.
        let unserved = Unserved(self);
        match share.await {
            Ok(share) => {
                std::mem::forget(unserved);
                share
            }
            // The sender is in the queue until it is used, and the queue lives as long as `self`.
            Err(_) => unreachable!("a waiter is only taken out of the queue to be served"),
        }
    }

    /// Whether more units than there are would be needed.
    pub(super) fn exceeds(&self, want: usize) -> bool {
        want > self.state().total
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(&self) {
        loop {
            let Some((granted, share)) = self.next() else { return };
            // One that does not wait any more gives its share back at once, outside of the lock.
            drop(granted.send(share));
        }
    }

    fn next(&self) -> Option<(oneshot::Sender<Share>, Share)> {
        let mut guard = self.state();
        let State { free, reserve, held, waiting, .. } = &mut *guard;
        loop {
            let waiter = waiting.pop_if(|owner, waiter| {
                if waiter.granted.is_closed() {
                    Turn::Take
                } else if held.contains_key(&owner) && waiter.want + *reserve > *free {
                    // Becomes a newcomer when all that it holds is given back.
                    Turn::Skip
                } else if waiter.want > *free {
                    Turn::Wait
                } else {
                    Turn::Take
                }
            })?;
            let Waiter { owner, want: units, granted } = waiter;
            // There may be thousands of them, after a large fetch has failed.
            if granted.is_closed() {
                continue;
            }
            *free -= units;
            *held.entry(owner).or_default() += units;
            return Some((granted, Share { budget: self.clone(), owner, units }));
        }
    }
}

/// A wait that has not ended well.
struct Unserved<'a>(&'a Budget);

impl Drop for Unserved<'_> {
    fn drop(&mut self) {
        self.0.grant();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        {
            let mut state = self.budget.state();
            state.free += self.units;
            if let Some(held) = state.held.get_mut(&self.owner) {
                *held -= self.units;
                if *held == 0 {
                    state.held.remove(&self.owner);
                }
            }
        }
        self.budget.grant();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const Q: Urgency = Urgency::Question;

    #[tokio::test]
    async fn what_is_given_back_goes_to_whoever_waits() {
        let budget = Budget::new(2, 2);
        let first = budget.acquire(1, Q, 1).await;
        assert!(budget.acquire(1, Q, 1).now_or_never().is_none(), "the rest is for newcomers");
        let other = budget.acquire(2, Q, 1).await;
        let waiting = tokio::spawn({
            let budget = budget.clone();
            async move { drop(budget.acquire(3, Q, 1).await) }
        });
        tokio::task::yield_now().await;
        drop(first);
        waiting.await.unwrap();
        drop(other);
        assert_eq!(budget.state().free, 2);
        assert!(budget.state().held.is_empty());
    }

    #[tokio::test]
    async fn who_wants_more_than_there_is_runs_alone() {
        let budget = Budget::new(10, 4);
        let small = budget.acquire(1, Q, 1).await;
        let mut alone = Box::pin(budget.acquire(2, Q, 1000));
        assert!(alone.as_mut().now_or_never().is_none());
        assert!(budget.acquire(3, Q, 1).now_or_never().is_none(), "later ones do not overtake it for ever");
        drop(small);
        let alone = alone.now_or_never().expect("all of it is free");
        assert_eq!(budget.state().free, 0);
        drop(alone);
        assert_eq!(budget.state().free, 10);
    }

    #[tokio::test]
    async fn one_that_stopped_waiting_takes_nothing() {
        let budget = Budget::new(1, 8);
        let held = budget.acquire(1, Q, 1).await;
        assert!(budget.acquire(2, Q, 1).now_or_never().is_none());
        drop(held);
        assert!(budget.acquire(3, Q, 1).now_or_never().is_some());
    }
}
