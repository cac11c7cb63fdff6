//! Calls of kubelet to a driver that runs: what a pod waits for when its closure and its view are there.
//!
//! Each round has a driver of its own on an empty store. Calls of one kind are made in turns with those of the others
//! and with `Probe`, which does nothing: the least that any call takes.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use nix_csi_e2e::nar_cache::NarCache;
use nix_csi_store::StorePath;

use crate::corpus::{Corpus, nix_conf};
use crate::driver::Driver;
use crate::made;
use crate::report::{Against, Figure, MEMORY_MIB};
use crate::server::Servers;
use crate::times::{Peer, Times};
use crate::{Filter, Run};

/// How often each call is made in a round.
const CALLS: usize = 200;
/// How many calls are made at once.
const AT_ONCE: [usize; 4] = [1, 4, 16, 64];
/// The closures: the smallest, corpus B, and the largest, of which most is measured.
const CLOSURES: [&str; 3] = ["10 paths", "300 paths", "2,000 paths"];
const SMALLEST: usize = 0;
const LARGEST: usize = 2;

/// The most milliseconds of a warm publish, p50 and p99, and of one while something large is fetched.
const WARM: [Option<f64>; 2] = [Some(1.2), Some(4.0)];
const WHILE_FETCHING: [Option<f64>; 2] = [None, Some(25.0)];
/// What is independent of something may differ by that much because of other things.
const INDEPENDENT: f64 = 1.25;

const NAME_WARM: &str = "publish, warm";
const NAME_AGAIN: &str = "publish again after the last";
const NAME_AT_ONCE: &str = "publish at once";
const NAME_BESIDE: &str = "publish while G is fetched";
const PROBE: &str = "Probe";

/// The times of all rounds.
#[derive(Default)]
struct Measured {
    warm: [Times; CLOSURES.len()],
    unpublish: [Times; CLOSURES.len()],
    probe: Times,
    again: Times,
    at_once: [AtOnce; AT_ONCE.len()],
    beside: Times,
    beside_probe: Times,
    peaks: Vec<f64>,
}

#[derive(Default)]
struct AtOnce {
    publish: Times,
    /// From the first call to the last answer.
    all: Times,
    probe: Times,
    all_probe: Times,
}

/// What a driver is asked for, and where it gets it.
struct Sources {
    config: String,
    closures: [StorePath; CLOSURES.len()],
    large: StorePath,
    // A directory that goes with it.
    _made: NarCache,
}

/// Measures what is wanted of it.
pub(crate) fn measure(options: &Run, filter: &Filter, servers: &Servers) -> Result<Vec<Figure>> {
    if ![NAME_WARM, NAME_AGAIN, NAME_AT_ONCE, NAME_BESIDE].iter().any(|name| filter.wants(name)) {
        return Ok(Vec::new());
    }
    let sources = Sources::new(&options.corpora, servers)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut measured = Measured::default();
    for round in 1..=options.rounds {
        eprintln!("bench: publish, round {round}");
        let dir = options.scratch.join(format!("publish-{round}"));
        fs::create_dir(&dir)?;
        runtime.block_on(measured.round(&options.node, &dir, &sources, filter))?;
        fs::remove_dir_all(&dir)?;
        rustix::fs::syncfs(fs::File::open(&options.scratch)?)?;
    }
    measured.tell();
    Ok(measured.figures())
}

impl Sources {
    fn new(corpora: &Path, servers: &Servers) -> Result<Self> {
        let (medium, large) = (Corpus::open(corpora, "B", "zstd")?, Corpus::open(corpora, "G", "zstd")?);
        large.warm()?;
        let made = NarCache::with_key("nix-csi-bench-made-1")?;
        let (smallest, largest) = (made::add_closure(&made, 10)?, made::add_closure(&made, 2000)?);
        let url = servers.url(Duration::ZERO)?;
        let of = |corpus: &Corpus| (format!("{url}/{}", corpus.url_path), corpus.public_key.clone());
        let (large_root, medium_root) = (large.root()?.clone(), medium.root()?.clone());
        Ok(Self {
            config: nix_conf(&[of(&medium), of(&large), (made.url(), made.public_key())]),
            closures: [smallest, medium_root, largest],
            large: large_root,
            _made: made,
        })
    }
}

impl Measured {
    async fn round(&mut self, program: &Path, dir: &Path, sources: &Sources, filter: &Filter) -> Result<()> {
        let driver = Driver::start(program, dir, &sources.config).await?;
        for (name, closure) in CLOSURES.iter().zip(&sources.closures) {
            driver.publish_path(&holder(name), closure).await?;
        }
        // The first calls pay for what is paid once.
        for _ in 0..20 {
            driver.publish_path("first", &sources.closures[LARGEST]).await?;
            driver.unpublish("first").await?;
            driver.probe().await?;
        }
        if filter.wants(NAME_WARM) {
            self.warm(&driver, sources).await?;
        }
        if filter.wants(NAME_AT_ONCE) {
            self.at_once(&driver, &sources.closures[LARGEST]).await?;
        }
        if filter.wants(NAME_BESIDE) {
            self.beside(&driver, sources).await?;
        }
        for name in CLOSURES {
            driver.unpublish(&holder(name)).await?;
        }
        if filter.wants(NAME_AGAIN) {
            // Nobody else has the view.
            for _ in 0..CALLS {
                let request = driver.request("again", &sources.closures[LARGEST])?;
                self.again.of(driver.publish(request)).await?;
                driver.unpublish("again").await?;
            }
        }
        driver.stop().await
    }

    /// Views that another volume shows, too.
    async fn warm(&mut self, driver: &Driver, sources: &Sources) -> Result<()> {
        for _ in 0..CALLS {
            for (n, closure) in sources.closures.iter().enumerate() {
                self.probe.of(driver.probe()).await?;
                let request = driver.request("warm", closure)?;
                self.warm[n].of(driver.publish(request)).await?;
                self.unpublish[n].of(driver.unpublish("warm")).await?;
            }
        }
        Ok(())
    }

    async fn at_once(&mut self, driver: &Driver, closure: &StorePath) -> Result<()> {
        for (n, of) in AT_ONCE.iter().zip(&mut self.at_once) {
            for _ in 0..CALLS.div_ceil(*n) {
                let pods: Vec<_> = (0..*n).map(|n| format!("at-once-{n}")).collect();
                let requests = pods.iter().map(|pod| driver.request(pod, closure));
                let requests: Vec<_> = requests.collect::<Result<_>>()?;
                timed(
                    &mut of.publish,
                    &mut of.all,
                    requests.into_iter().map(|request| driver.publish(request)),
                )
                .await?;
                try_join_all(pods.iter().map(|pod| driver.unpublish(pod))).await?;
                timed(&mut of.probe, &mut of.all_probe, pods.iter().map(|_| driver.probe())).await?;
            }
        }
        Ok(())
    }

    /// While a path of 2 GiB is fetched for another volume, and what that takes of memory.
    async fn beside(&mut self, driver: &Driver, sources: &Sources) -> Result<()> {
        driver.forget_peak_memory()?;
        let fetched = Cell::new(false);
        let fetch = async {
            let done = driver.publish_path("large", &sources.large).await;
            fetched.set(true);
            done
        };
        let calls = async {
            let mut calls = 0;
            while !fetched.get() {
                self.beside_probe.of(driver.probe()).await?;
                let request = driver.request("beside", &sources.closures[LARGEST])?;
                self.beside.of(driver.publish(request)).await?;
                driver.unpublish("beside").await?;
                calls += 1;
            }
            ensure!(calls > 10, "G was fetched before anything could be measured beside it");
            Ok(())
        };
        tokio::try_join!(fetch, calls)?;
        self.peaks.push(driver.peak_memory()?);
        driver.unpublish("large").await
    }

    fn tell(&self) {
        self.probe.tell(PROBE);
        for (n, name) in CLOSURES.iter().enumerate() {
            self.warm[n].tell(&format!("{NAME_WARM}, {name}"));
            self.unpublish[n].tell(&format!("unpublish, {name}"));
        }
        self.again.tell(NAME_AGAIN);
        for (n, of) in AT_ONCE.iter().zip(&self.at_once) {
            of.publish.tell(&format!("{NAME_AT_ONCE}, {n}"));
            of.probe.tell(&format!("{PROBE}, {n} at once"));
        }
        self.beside.tell(NAME_BESIDE);
        self.beside_probe.tell("Probe while G is fetched");
    }

    fn figures(&self) -> Vec<Figure> {
        let probe = |times| Peer { name: PROBE, times, budgets: [None, None] };
        let mut figures = Vec::new();
        for (n, name) in CLOSURES.iter().enumerate() {
            let name = format!("{NAME_WARM}, {name}");
            figures.extend(self.warm[n].within(&name, WARM));
            figures.extend(self.warm[n].beside(&name, &probe(&self.probe)));
        }
        let largest = CLOSURES[LARGEST];
        let smallest = Peer {
            name: CLOSURES[SMALLEST],
            times: &self.warm[SMALLEST],
            budgets: [Some(INDEPENDENT), None],
        };
        figures.extend(self.warm[LARGEST].beside(&format!("{NAME_WARM}, {largest}"), &smallest));
        for (n, name) in CLOSURES.iter().enumerate() {
            figures.extend(self.unpublish[n].beside(&format!("unpublish, {name}"), &probe(&self.probe)));
        }
        figures.extend(self.again.within(&format!("{NAME_AGAIN}, {largest}"), WARM));
        for (n, of) in AT_ONCE.iter().zip(&self.at_once) {
            let name = format!("{NAME_AT_ONCE}, {n}");
            figures.extend(of.publish.beside(&name, &probe(&of.probe)));
            if *n > 1 {
                figures.extend(of.all.beside(&format!("{name}: all answered"), &probe(&of.all_probe)));
            }
        }
        let name = format!("{NAME_BESIDE}, {largest}");
        figures.extend(self.beside.within(&name, WHILE_FETCHING));
        figures.extend(self.beside.beside(&name, &probe(&self.beside_probe)));
        let memory = Against {
            name: format!("{NAME_BESIDE}: peak memory of the driver"),
            peer_name: format!("limit: {MEMORY_MIB} MiB"),
            budget: Some(1.0),
        };
        let worst = self.peaks.iter().copied().reduce(f64::max);
        figures.extend(
            worst.and_then(|worst| {
                Figure::of(memory, "MiB", (worst, &self.peaks), (MEMORY_MIB, &[MEMORY_MIB]))
            }),
        );
        figures
    }
}

fn holder(name: &str) -> String {
    format!("holder-of-{}", name.replace([' ', ','], "-"))
}

/// Makes all calls at once, and adds the time of each to `each` and that of all to `all`.
async fn timed<F: Future<Output = Result<()>>>(
    each: &mut Times,
    all: &mut Times,
    calls: impl Iterator<Item = F>,
) -> Result<()> {
    let start = Instant::now();
    let seconds = try_join_all(calls.map(|call| async {
        let start = Instant::now();
        call.await?;
        anyhow::Ok(start.elapsed().as_secs_f64())
    }))
    .await?;
    all.push(start.elapsed().as_secs_f64());
    for seconds in seconds {
        each.push(seconds);
    }
    Ok(())
}
