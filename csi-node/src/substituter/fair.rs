//! Who is next: round robin over owners, and of one owner's wishes the largest first.
//!
//! An owner is one fetch. However much one closure wants, another one's turn comes after each of its own.

use std::collections::{BTreeMap, BinaryHeap};

/// One fetch, for as long as the process lives.
pub(super) type Owner = u64;

/// What is served first among the wishes of one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// A NAR of that size: the largest takes longest, so it begins first.
    Nar(u64),
    /// A question: its answer is small and says what else is needed.
    Question,
}

struct Wish<T> {
    urgency: Urgency,
    /// Of two alike, the older one.
    age: std::cmp::Reverse<u64>,
    item: T,
}

impl<T> Wish<T> {
    fn rank(&self) -> (Urgency, std::cmp::Reverse<u64>) {
        (self.urgency, self.age)
    }
}

impl<T> PartialEq for Wish<T> {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}
impl<T> Eq for Wish<T> {}
impl<T> PartialOrd for Wish<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Wish<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

/// What [`FairQueue::pop_if`] does with the wish that is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Serve it.
    Take,
    /// Not this owner now; perhaps the next one.
    Skip,
    /// Nobody, until it can be served: so that large wishes do not wait forever behind small ones.
    Wait,
}

/// Wishes by owner.
pub(super) struct FairQueue<T> {
    owners: BTreeMap<Owner, BinaryHeap<Wish<T>>>,
    /// Whose turn was last.
    last: Owner,
    age: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { owners: BTreeMap::new(), last: Owner::MAX, age: 0 }
    }
}

impl<T> FairQueue<T> {
    pub(super) fn push(&mut self, owner: Owner, urgency: Urgency, item: T) {
        self.age += 1;
        let wish = Wish { urgency, age: std::cmp::Reverse(self.age), item };
        self.owners.entry(owner).or_default().push(wish);
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        self.pop_if(|_, _| Turn::Take)
    }

    /// The first wish, in turn, that `decide` takes.
    pub(super) fn pop_if(&mut self, mut decide: impl FnMut(Owner, &T) -> Turn) -> Option<T> {
        let behind = (std::ops::Bound::Excluded(self.last), std::ops::Bound::Unbounded);
        let turns = self.owners.range(behind).chain(self.owners.range(..=self.last));
        let mut taken = None;
        for (owner, wishes) in turns {
            match wishes.peek().map(|wish| decide(*owner, &wish.item)) {
                Some(Turn::Take) => {
                    taken = Some(*owner);
                    break;
                }
                Some(Turn::Wait) => break,
                Some(Turn::Skip) | None => {}
            }
        }
        let owner = taken?;
        let wishes = self.owners.get_mut(&owner)?;
        let item = wishes.pop()?.item;
        if wishes.is_empty() {
            self.owners.remove(&owner);
        }
        self.last = owner;
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(queue: &mut FairQueue<u32>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn owners_take_turns_and_each_begins_with_its_largest() {
        let mut queue = FairQueue::default();
        for (owner, size, item) in [(1, 10, 11), (1, 30, 13), (1, 20, 12), (2, 5, 21), (2, 6, 22)] {
            queue.push(owner, Urgency::Nar(size), item);
        }
        queue.push(1, Urgency::Question, 10);
        assert_eq!(all(&mut queue), [10, 22, 13, 21, 12, 11]);
    }

    #[test]
    fn of_equal_wishes_the_oldest_is_first() {
        let mut queue = FairQueue::default();
        for item in 0..5 {
            queue.push(7, Urgency::Question, item);
        }
        assert_eq!(all(&mut queue), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn an_owner_may_be_skipped_and_a_wish_may_hold_up_the_rest() {
        let mut queue = FairQueue::default();
        for owner in 1..=3 {
            queue.push(owner, Urgency::Question, owner);
        }
        let skip_first = |owner, _: &u64| if owner == 1 { Turn::Skip } else { Turn::Take };
        assert_eq!(queue.pop_if(skip_first), Some(2));
        let wait_for_third = |owner, _: &u64| if owner == 3 { Turn::Wait } else { Turn::Take };
        assert_eq!(queue.pop_if(wait_for_third), None);
        assert_eq!(queue.pop(), Some(3));
    }

    proptest! {
        #[test]
        fn nobody_waits_for_two_wishes_of_another(owners in prop::collection::vec(0_u64..4, 1..60)) {
            let mut queue = FairQueue::default();
            for owner in &owners {
                queue.push(*owner, Urgency::Question, *owner);
            }
            let mut left: Vec<_> = (0..4).map(|o| owners.iter().filter(|owner| **owner == o).count()).collect();
            let mut order = Vec::new();
            while let Some(owner) = queue.pop() {
                order.push(owner);
            }
            prop_assert_eq!(order.len(), owners.len());
            for pair in order.windows(2) {
                left[usize::try_from(pair[0]).unwrap()] -= 1;
                let others = left.iter().enumerate().any(|(o, n)| o as u64 != pair[0] && *n > 0);
                prop_assert!(!others || pair[0] != pair[1]);
            }
        }
    }
}
