//! Fetches of closures, by `nix-csi-node fetch` and by real Nix: [`crate::rows`] says which.

use anyhow::Result;

use crate::contestant::{Contestant, Field, Outcome};
use crate::report::{Against, Figure, LIMIT_BUDGET, MEMORY_MIB};
use crate::rows::{Measured, ROWS};
use crate::server::Servers;
use crate::{Filter, Run};

/// The longest that 300 paths may take to be registered.
const REGISTER_SECONDS: f64 = 0.020;

/// Measures all rows that are wanted.
pub(crate) fn measure(options: &Run, filter: &Filter, servers: &Servers) -> Result<Vec<Figure>> {
    if !ROWS.iter().any(|row| filter.wants(&row.name())) {
        return Ok(Vec::new());
    }
    let mut field = Field::new(&options.node, options.nix_rootfs.as_deref(), &options.scratch)?;
    let mut measured = Vec::new();
    for row in ROWS.iter().filter(|row| filter.wants(&row.name())) {
        eprintln!("bench: {}", row.name());
        measured.push(row.measure(&options.corpora, servers, &mut field, options.rounds)?);
    }
    Ok(figures(&measured, field.nix_version()))
}

/// The values of one contestant.
fn values(measured: &Measured, of: Contestant, value: impl Fn(&Outcome) -> Option<f64>) -> Vec<f64> {
    let outcomes = measured.outcomes.iter().filter(|(who, _)| *who == of);
    outcomes.filter_map(|(_, outcome)| value(outcome)).collect()
}

/// All figures of all rows.
fn figures(all: &[Measured], nix: &str) -> Vec<Figure> {
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
