//! Figures, as a table and as JSON.

use std::io::{ErrorKind, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

/// The most that what a machine can do at all may be exceeded by.
pub(crate) const LIMIT_BUDGET: f64 = 1.2;
/// The most memory that the driver may take, in MiB.
pub(crate) const MEMORY_MIB: f64 = 64.0;

/// One figure of ours beside one of a peer.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    name: String,
    unit: &'static str,
    /// Best of the rounds; of calls, a percentile of all of them.
    ours: f64,
    peer: f64,
    peer_name: String,
    /// Less is better: ours / peer, and of rates peer / ours.
    ratio: f64,
    /// The highest ratio that is good.
    budget: Option<f64>,
    holds: Option<bool>,
    ours_median: f64,
    peer_median: f64,
    /// How many values of ours it stands for.
    rounds: usize,
}

/// What a figure is called and judged by.
pub(crate) struct Against {
    pub(crate) name: String,
    pub(crate) peer_name: String,
    pub(crate) budget: Option<f64>,
}

impl Figure {
    /// None where one of the two has no values.
    pub(crate) fn of_rounds(
        against: Against,
        unit: &'static str,
        ours: &[f64],
        peer: &[f64],
    ) -> Option<Self> {
        let best = |values: &[f64]| values.iter().copied().reduce(f64::min);
        Self::of(against, unit, (best(ours)?, ours), (best(peer)?, peer))
    }

    /// Of rates, where more is better.
    pub(crate) fn of_rates(against: Against, unit: &'static str, ours: &[f64], peer: &[f64]) -> Option<Self> {
        let best = |values: &[f64]| values.iter().copied().reduce(f64::max);
        let figure = Self::of(against, unit, (best(ours)?, ours), (best(peer)?, peer))?;
        let ratio = figure.ratio.recip();
        Some(Self { ratio, holds: figure.budget.map(|budget| ratio <= budget), ..figure })
    }

    /// Of two values that stand for all.
    pub(crate) fn of(
        Against { name, peer_name, budget }: Against,
        unit: &'static str,
        (ours, all_ours): (f64, &[f64]),
        (peer, all_peer): (f64, &[f64]),
    ) -> Option<Self> {
        let ratio = ours / peer;
        Some(Self {
            name,
            unit,
            ours,
            peer,
            peer_name,
            ratio,
            budget,
            holds: budget.map(|budget| ratio <= budget),
            ours_median: median(all_ours)?,
            peer_median: median(all_peer)?,
            rounds: all_ours.len(),
        })
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some(f64::midpoint(*low, *high))
}

/// Writes `figures` to `file`, which keeps those of other names that are in it already and that `keep` wants.
pub(crate) fn write(file: &Path, figures: &[Figure], keep: impl Fn(&str) -> bool) -> Result<()> {
    let before: Vec<Value> = match std::fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| file.display().to_string())?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    };
    let is_kept = |figure: &Value| {
        let name = figure["name"].as_str().unwrap_or_default();
        keep(name) && figures.iter().all(|figure| figure.name != name)
    };
    let mut all: Vec<_> = before.into_iter().filter(is_kept).collect();
    for figure in figures {
        all.push(serde_json::to_value(figure)?);
    }
    std::fs::write(file, serde_json::to_vec_pretty(&all)?).with_context(|| file.display().to_string())
}

/// The table, and which budgets were missed.
pub(crate) fn print(figures: &[Figure]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or_default();
    writeln!(
        out,
        "{:width$}  {:>14}  {:>14}      {:>6}  {:>6}",
        "value (median)", "ours", "peer", "ratio", "budget"
    )?;
    for Figure { name, unit, ours, ours_median, peer, peer_median, ratio, budget, holds, .. } in figures {
        let budget = budget.map_or_else(|| "-".to_owned(), |budget| format!("{budget:.3}"));
        let mark = if *holds == Some(false) { "  MISSED" } else { "" };
        let pair = |best: &f64, median: &f64| match *unit {
            "MiB" => format!("{best:.1} ({median:.1})"),
            "1/s" => format!("{best:.0} ({median:.0})"),
            _ => format!("{best:.3} ({median:.3})"),
        };
        let (ours, peer) = (pair(ours, ours_median), pair(peer, peer_median));
        writeln!(out, "{name:width$}  {ours:>14}  {peer:>14} {unit:<3}  {ratio:>6.3}  {budget:>6}{mark}")?;
    }
    let missed = figures.iter().filter(|figure| figure.holds == Some(false)).count();
    let judged = figures.iter().filter(|figure| figure.budget.is_some()).count();
    writeln!(out, "{} of {judged} budgets hold", judged - missed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: &[f64], peer: &[f64], budget: Option<f64>) -> Figure {
        let against = Against { name: String::new(), peer_name: String::new(), budget };
        Figure::of_rounds(against, "s", ours, peer).unwrap()
    }

    #[test]
    fn the_best_round_is_judged() {
        let half = figure(&[3.0, 1.0, 2.0], &[2.0, 4.0], Some(0.5));
        assert!((half.ratio - 0.5).abs() < 1e-9 && half.holds == Some(true));
        assert!((half.ours_median - 2.0).abs() < 1e-9 && (half.peer_median - 3.0).abs() < 1e-9);
        assert_eq!(figure(&[1.1], &[2.0], Some(0.5)).holds, Some(false));
    }

    #[test]
    fn of_rates_the_highest_is_judged() {
        let against = Against { name: String::new(), peer_name: String::new(), budget: Some(1.0) };
        let figure = Figure::of_rates(against, "1/s", &[4000.0, 8000.0], &[5000.0]).unwrap();
        assert!((figure.ratio - 0.625).abs() < 1e-9 && figure.holds == Some(true));
    }

    #[test]
    fn a_file_keeps_what_was_not_measured_anew() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"[{"name": "a", "ours": 1}, {"name": "b"}, {"name": ""}]"#).unwrap();
        write(file.path(), &[figure(&[1.0], &[1.0], None)], |name| name != "b").unwrap();
        let all: Vec<Value> = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap();
        assert_eq!(all.iter().map(|figure| &figure["name"]).collect::<Vec<_>>(), ["a", ""]);
        assert_eq!(all[1]["unit"], "s");
    }

    #[test]
    fn without_a_budget_nothing_is_judged() {
        assert_eq!(figure(&[9.0], &[1.0], None).holds, None);
    }

    #[test]
    fn without_rounds_there_is_no_figure() {
        let against = Against { name: String::new(), peer_name: String::new(), budget: None };
        assert!(Figure::of_rounds(against, "s", &[], &[1.0]).is_none());
    }
}
