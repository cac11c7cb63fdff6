//! Times of many calls of one kind, and what is said of them.

use std::time::Instant;

use anyhow::Result;

use crate::report::{Against, Figure};

/// What is said of the times of calls: the middle one, and the one that a hundredth is slower than.
const PERCENTILES: [(&str, f64); 2] = [("p50", 0.5), ("p99", 0.99)];

/// Times in milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<f64>);

/// Whose times they are, and which ratios of p50 and of p99 are good.
pub(crate) struct Peer<'a> {
    pub(crate) name: &'a str,
    pub(crate) times: &'a Times,
    pub(crate) budgets: [Option<f64>; 2],
}

impl Times {
    /// Awaits a call and adds its time, if it succeeds.
    pub(crate) async fn of<T>(&mut self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let start = Instant::now();
        let done = call.await?;
        self.0.push(start.elapsed().as_secs_f64() * 1000.0);
        Ok(done)
    }

    /// Adds a time in seconds.
    pub(crate) fn push(&mut self, seconds: f64) {
        self.0.push(seconds * 1000.0);
    }

    fn percentile(&self, part: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = (sorted.len() as f64 * part).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }

    /// p50 and p99 beside those of `peer`.
    pub(crate) fn beside(&self, name: &str, peer: &Peer<'_>) -> Vec<Figure> {
        let figures = PERCENTILES.iter().zip(peer.budgets).map(|((called, part), budget)| {
            let against = Against {
                name: format!("{name}: {called}, {}", peer.name),
                peer_name: peer.name.to_owned(),
                budget,
            };
            let (ours, theirs) = (self.percentile(*part)?, peer.times.percentile(*part)?);
            Figure::of(against, "ms", (ours, &self.0), (theirs, &peer.times.0))
        });
        figures.flatten().collect()
    }

    /// p50 and p99 beside the most milliseconds that are good, where there is such a limit.
    pub(crate) fn within(&self, name: &str, limits: [Option<f64>; 2]) -> Vec<Figure> {
        let figures = PERCENTILES.iter().zip(limits).map(|((called, part), limit)| {
            let limit = limit?;
            let against = Against {
                name: format!("{name}: {called}"),
                peer_name: format!("limit: {limit} ms"),
                budget: Some(1.0),
            };
            Figure::of(against, "ms", (self.percentile(*part)?, &self.0), (limit, &[limit]))
        });
        figures.flatten().collect()
    }

    /// One line for whoever watches.
    pub(crate) fn tell(&self, what: &str) {
        let percentile = |part| self.percentile(part).unwrap_or(f64::NAN);
        eprintln!(
            "  {what:<48} {:6} calls, p50 {:8.3} ms, p99 {:8.3} ms",
            self.0.len(),
            percentile(0.5),
            percentile(0.99)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_time_that_was_measured() {
        let times = Times((1..=200).rev().map(f64::from).collect());
        assert_eq!(times.percentile(0.5), Some(100.0));
        assert_eq!(times.percentile(0.99), Some(198.0));
        assert_eq!(Times(vec![7.0]).percentile(0.99), Some(7.0));
        assert_eq!(Times::default().percentile(0.5), None);
    }

    #[test]
    fn only_what_has_a_limit_is_judged() {
        let times = Times(vec![1.0, 2.0, 3.0]);
        assert_eq!(times.within("a", [None, Some(3.0)]).len(), 1);
        let peer = Peer { name: "b", times: &times, budgets: [None, Some(0.9)] };
        assert_eq!(times.beside("a", &peer).len(), 2);
        assert!(Times::default().beside("a", &peer).is_empty());
    }
}
