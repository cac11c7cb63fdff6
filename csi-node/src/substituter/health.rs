//! When a cache that fails is asked again. Pure: the time comes from outside.

use std::time::{Duration, Instant};

/// How long a cache is left alone after its first failure in a row, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How a cache has been answering.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Failures in a row, each after all attempts at it.
    failures: u32,
    paused_until: Option<Instant>,
    /// When it last answered anything at all.
    answered: Option<Instant>,
}

impl Health {
    /// How much longer the cache is to be left alone.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        self.paused_until?.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// It answered with that status.
    pub(super) fn answered(&mut self, status: u16, now: Instant) {
        if status < 500 && status != 429 {
            *self = Self::default();
        }
        self.answered = Some(now);
    }

    /// Whether there was any answer since `then`: what is ill is not what hangs.
    pub(super) fn has_answered_since(&self, then: Instant) -> bool {
        self.answered.is_some_and(|answered| answered >= then)
    }

    /// It did not, as often as it was asked.
    pub(super) fn failed(&mut self, now: Instant) {
        // What was under way already when the pause began says nothing new.
        if self.pause(now).is_some() {
            return;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(8)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.paused_until = Some(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute_and_end_with_an_answer() {
        let mut health = Health::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..6 {
            health.failed(now);
            health.failed(now);
            let pause = health.pause(now).unwrap();
            pauses.push(pause.as_secs());
            now += pause;
            assert_eq!(health.pause(now), None);
        }
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
        health.answered(503, now);
        assert_eq!(health.failures, 6);
        assert!(health.has_answered_since(now) && !health.has_answered_since(now + FIRST_PAUSE));
        health.answered(404, now);
        health.failed(now);
        assert_eq!(health.pause(now).unwrap().as_secs(), 5);
    }
}
