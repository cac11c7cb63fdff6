//! What is measured, and how good is good enough.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::contestant::{Contestant, Field, Outcome};
use crate::corpus::Corpus;
use crate::server::Servers;

/// One closure, fetched in one way by all contestants.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) corpus: &'static str,
    pub(crate) compression: &'static str,
    /// Milliseconds before each answer of the cache.
    pub(crate) delay: u64,
    /// The highest ratios to `nix copy` and to `nix-store -r` that are good, for both figures of each.
    pub(crate) budget: Option<(f64, f64)>,
    /// Measured against the limit of the machine too.
    pub(crate) limit: bool,
    /// The registration is a figure of its own.
    pub(crate) register: bool,
    /// A corpus that the same process is fetching, and how many times longer this one may take because of it.
    pub(crate) beside: Option<(&'static str, f64)>,
}

const fn row(corpus: &'static str, compression: &'static str, budget: Option<(f64, f64)>) -> Row {
    Row { corpus, compression, delay: 0, budget, limit: false, register: false, beside: None }
}

/// All rows. The corpora are described in `corpora.sh`.
pub(crate) const ROWS: &[Row] = &[
    Row { limit: true, register: true, ..row("B", "zstd", Some((1.0 / 1.6, 1.0 / 1.5))) },
    row("B", "none", None),
    row("B", "xz", XZ),
    Row { limit: true, ..row("C", "zstd", Some((1.0 / 1.5, 1.0 / 1.5))) },
    row("C", "none", None),
    row("C", "xz", XZ),
    Row { limit: true, ..row("A", "zstd", Some((1.0 / 1.3, 1.0 / 1.3))) },
    row("A", "none", Some((1.0 / 1.05, 1.0 / 1.05))),
    row("A", "xz", XZ),
    Row { limit: true, ..row("D", "zstd", None) },
    Row { delay: 20, ..row("B", "zstd", Some((1.0 / 15.0, 1.0 / 2.4))) },
    Row { beside: Some(("G", 2.5)), ..row("B", "zstd", None) },
];

/// Nearly all of it is the same decoder.
const XZ: Option<(f64, f64)> = Some((1.0 / 1.05, 1.0 / 1.05));

/// A row and the outcomes of its rounds.
pub(crate) struct Measured {
    pub(crate) row: &'static Row,
    pub(crate) outcomes: Vec<(Contestant, Outcome)>,
}

impl Row {
    pub(crate) fn name(&self) -> String {
        let Self { corpus, compression, delay, beside, .. } = self;
        if let Some((beside, _)) = beside {
            format!("{corpus} {compression} while {beside} is fetched")
        } else if *delay == 0 {
            format!("{corpus} {compression}")
        } else {
            format!("{corpus} {compression}, {delay} ms per request")
        }
    }

    /// All rounds. Who begins changes from round to round.
    pub(crate) fn measure(
        &'static self,
        corpora: &Path,
        servers: &Servers,
        field: &mut Field,
        rounds: usize,
    ) -> Result<Measured> {
        let mut corpus = Corpus::open(corpora, self.corpus, self.compression)?;
        corpus.warm()?;
        let url = servers.url(Duration::from_millis(self.delay))?;
        let url = format!("{url}/{}", corpus.url_path);
        let mut contestants = vec![Contestant::Ours, Contestant::NixCopy, Contestant::NixRealise];
        if let Some((beside, _)) = self.beside {
            let beside = Corpus::open(corpora, beside, self.compression)?;
            beside.warm()?;
            corpus.beside = Some(Box::new(beside));
            contestants = vec![Contestant::Ours, Contestant::OursBeside];
        }
        if self.limit {
            contestants.push(Contestant::Limit);
        }
        let mut outcomes = Vec::new();
        for _ in 0..rounds {
            for who in &contestants {
                outcomes.push((*who, field.run(*who, &corpus, &url)?));
            }
            contestants.rotate_left(1);
        }
        Ok(Measured { row: self, outcomes })
    }
}
