//! In whose turns a path waits: in those of every fetch that needs it.
//!
//! A path of a large closure may be the last thing that a small one lacks. Then it must not wait until the large one
//! is done, only because that one asked for it first.

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use super::budget::{Budget, Share};
use super::fair::{Owner, Urgency};

/// The fetches that want one path, in the order in which they came. A clone sees those that come later, too.
#[derive(Clone)]
pub(super) struct Turns(watch::Receiver<Vec<Owner>>);

/// Where others may join.
pub(super) struct Joining(watch::Sender<Vec<Owner>>);

impl Turns {
    /// Those of `owner`, and of whoever joins.
    pub(super) fn of(owner: Owner) -> (Joining, Self) {
        let (joining, turns) = watch::channel(vec![owner]);
        (Joining(joining), Self(turns))
    }

    /// Those of `owner` alone.
    pub(super) fn only(owner: Owner) -> Self {
        Self::of(owner).1
    }

    /// A share of `budget`, in the first turn of any of them.
    pub(super) async fn acquire(&self, budget: &Budget, urgency: Urgency, want: usize) -> Share {
        let mut owners = self.0.clone();
        let mut waiting = FuturesUnordered::new();
        loop {
            // As many are waiting as have been seen: the first to be served ends this.
            let new = owners.borrow_and_update()[waiting.len()..].to_vec();
            waiting.extend(new.into_iter().map(|owner| budget.acquire(owner, urgency, want)));
            tokio::select! {
                Some(share) = waiting.next() => return share,
                Ok(()) = owners.changed() => {}
            }
        }
    }
}

impl Joining {
    /// From now on the path waits in the turns of `owner` as well.
    pub(super) fn join(&self, owner: Owner) {
        self.0.send_if_modified(|owners| {
            let is_new = !owners.contains(&owner);
            if is_new {
                owners.push(owner);
            }
            is_new
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const SMALL: Urgency = Urgency::Nar(1);
    const LARGE: Urgency = Urgency::Nar(1000);

    #[tokio::test]
    async fn a_path_that_another_fetch_needs_comes_in_the_turn_of_that_one() {
        let budget = Budget::new(1, 8);
        let running = budget.acquire(1, LARGE, 1).await;
        let mut large: Vec<_> = (0..3).map(|_| Box::pin(budget.acquire(1, LARGE, 1))).collect();
        for wish in &mut large {
            assert!(wish.as_mut().now_or_never().is_none());
        }
        let (joining, turns) = Turns::of(1);
        let mut shared = Box::pin(turns.acquire(&budget, SMALL, 1));
        assert!(shared.as_mut().now_or_never().is_none(), "it is the smallest of its fetch");
        joining.join(2);
        joining.join(2);
        assert!(shared.as_mut().now_or_never().is_none());
        drop(running);
        let share = shared.now_or_never().expect("the turn of the second fetch is next");
        assert_eq!(share.owner(), 2);
        drop(share);
        assert!(large.remove(0).now_or_never().is_some(), "and what it did not take is free again");
    }

    #[tokio::test]
    async fn nothing_is_taken_twice() {
        let budget = Budget::new(2, 8);
        let (joining, turns) = Turns::of(1);
        joining.join(2);
        let share = turns.acquire(&budget, SMALL, 1).await;
        assert!(budget.acquire(3, SMALL, 1).now_or_never().is_some(), "one of two was taken");
        drop(share);
    }
}
