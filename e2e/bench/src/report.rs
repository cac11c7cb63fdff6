//! Figures out of outcomes, as a table and as JSON.

use std::io::Write as _;

use anyhow::Result;
use serde::Serialize;

use crate::contestant::{Contestant, Outcome};
use crate::rows::Measured;

/// The most that a limit may be exceeded by, and the other budgets that are of no single row.
const LIMIT_BUDGET: f64 = 1.2;
const REGISTER_SECONDS: f64 = 0.020;
const MEMORY_MIB: f64 = 64.0;

/// One figure of ours beside one of a peer.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    name: String,
    unit: &'static str,
    /// Best of the rounds.
    ours: f64,
    peer: f64,
    peer_name: String,
    /// Always ours / peer: less is better.
    ratio: f64,
    /// The highest ratio that is good.
    budget: Option<f64>,
    holds: Option<bool>,
    ours_median: f64,
    peer_median: f64,
    rounds: usize,
}

/// What a figure is called and judged by.
struct Against {
    name: String,
    peer_name: String,
    budget: Option<f64>,
}

impl Figure {
    /// None where one of the two has no values.
    fn of_rounds(against: Against, unit: &'static str, ours: &[f64], peer: &[f64]) -> Option<Self> {
        let best = |values: &[f64]| values.iter().copied().reduce(f64::min);
        Self::of(against, unit, (best(ours)?, ours), (best(peer)?, peer))
    }

    /// Of two values that stand for all.
    fn of(
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

/// The values of one contestant.
fn values(measured: &Measured, of: Contestant, value: impl Fn(&Outcome) -> Option<f64>) -> Vec<f64> {
    let outcomes = measured.outcomes.iter().filter(|(who, _)| *who == of);
    outcomes.filter_map(|(_, outcome)| value(outcome)).collect()
}

/// All figures of all rows.
pub(crate) fn figures(all: &[Measured], nix: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    for measured in all {
        figures.extend(of_row(measured, nix));
    }
    let peaks: Vec<_> = all
        .iter()
        .flat_map(|row| &row.outcomes)
        .filter(|(who, _)| who.is_ours())
        .filter_map(|(_, outcome)| outcome.peak_memory)
        .collect();
    let against = Against {
        name: "peak memory of all runs".to_owned(),
        peer_name: format!("limit: {MEMORY_MIB} MiB"),
        budget: Some(1.0),
    };
    let worst = peaks.iter().copied().reduce(f64::max);
    figures.extend(
        worst.and_then(|worst| Figure::of(against, "MiB", (worst, &peaks), (MEMORY_MIB, &[MEMORY_MIB]))),
    );
    figures
}

fn of_row(measured: &Measured, nix: &str) -> Vec<Figure> {
    let row = measured.row;
    if let Some((_, budget)) = row.beside {
        let against =
            Against { name: row.name(), peer_name: "the same alone".to_owned(), budget: Some(budget) };
        let fetch = |who| values(measured, who, |outcome| outcome.fetch);
        let figure =
            Figure::of_rounds(against, "s", &fetch(Contestant::OursBeside), &fetch(Contestant::Ours));
        return figure.into_iter().collect();
    }
    let peers = [
        (Contestant::NixCopy, "nix copy", row.budget.map(|(copy, _)| copy)),
        (Contestant::NixRealise, "nix-store -r", row.budget.map(|(_, realise)| realise)),
    ];
    let publishable: fn(&Outcome) -> Option<f64> = |outcome| Some(outcome.publishable);
    let mut figures = Vec::new();
    for (what, value) in [("publishable", publishable), ("durable", |outcome| outcome.durable)] {
        let ours = values(measured, Contestant::Ours, value);
        for (peer, peer_name, budget) in peers {
            let against = Against {
                name: format!("{}: {what}, {peer_name}", row.name()),
                peer_name: format!("{peer_name}, Nix {nix}"),
                budget,
            };
            figures.extend(Figure::of_rounds(against, "s", &ours, &values(measured, peer, value)));
        }
    }
    let ours = values(measured, Contestant::Ours, publishable);
    let against = Against {
        name: format!("{}: publishable, limit", row.name()),
        peer_name: "limit: decode + hash + create on two cores".to_owned(),
        budget: Some(LIMIT_BUDGET),
    };
    let limit = values(measured, Contestant::Limit, publishable);
    figures.extend(Figure::of_rounds(against, "s", &ours, &limit));
    if row.register {
        let against = Against {
            name: "register 300 paths".to_owned(),
            peer_name: format!("limit: {REGISTER_SECONDS} s"),
            budget: Some(1.0),
        };
        let ours = values(measured, Contestant::Ours, |outcome| outcome.register);
        figures.extend(Figure::of_rounds(against, "s", &ours, &[REGISTER_SECONDS]));
    }
    figures
}

/// The table, and which budgets were missed.
pub(crate) fn print(figures: &[Figure]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or_default();
    writeln!(
        out,
        "{:width$}  {:>14}  {:>14}      {:>6}  {:>6}",
        "best (median)", "ours", "peer", "ratio", "budget"
    )?;
    for Figure { name, unit, ours, ours_median, peer, peer_median, ratio, budget, holds, .. } in figures {
        let budget = budget.map_or_else(|| "-".to_owned(), |budget| format!("{budget:.3}"));
        let mark = if *holds == Some(false) { "  MISSED" } else { "" };
        let pair = |best: &f64, median: &f64| match *unit {
            "MiB" => format!("{best:.1} ({median:.1})"),
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
    fn without_a_budget_nothing_is_judged() {
        assert_eq!(figure(&[9.0], &[1.0], None).holds, None);
    }

    #[test]
    fn without_rounds_there_is_no_figure() {
        let against = Against { name: String::new(), peer_name: String::new(), budget: None };
        assert!(Figure::of_rounds(against, "s", &[], &[1.0]).is_none());
    }
}
