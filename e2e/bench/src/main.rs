//! How fast nix-csi is, beside peers and limits that are measured in the same run.
//!
//! ```text
//! fetch.rs      closures, by nix-csi-node and by real Nix       rows.rs, contestant.rs, limit.rs
//! publish.rs    calls of kubelet to a driver that runs          driver.rs, made.rs
//! view.rs       a closure as links, by us, cp and rsync
//! admission.rs  reviews over TLS
//! headline.rs   ten package sets as images and as volumes       images.rs, registry.rs
//! ```
//! Run by `e2e/bench.sh`, which gives it a file system of its own, and for the last by `e2e/bench-headline.sh`, which
//! gives it a cluster. Contestants take turns. A benchmark is no test: a budget that is missed is printed and does not
//! fail it; a contestant that fails does.

mod admission;
mod contestant;
mod corpus;
mod driver;
mod fetch;
mod headline;
mod images;
mod limit;
mod made;
mod publish;
mod registry;
mod report;
mod rows;
mod server;
mod stopwatch;
mod times;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::server::Servers;

/// How fast nix-csi is.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure what needs no cluster.
    Run(Run),
    /// Measure images and volumes on a cluster that is up.
    Headline(headline::Options),
    /// Serve the images of a directory.
    #[command(hide = true)]
    Registry {
        #[arg(long)]
        images: PathBuf,
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Start programs and time them, as asked on standard input: see `stopwatch.rs`.
    #[command(hide = true)]
    Stopwatch,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// What `bench/corpora.sh` printed.
    #[arg(long)]
    corpora: PathBuf,
    /// An empty directory on a file system of its own, where the stores are made.
    #[arg(long)]
    scratch: PathBuf,
    /// The `nix-csi-node` to measure.
    #[arg(long)]
    node: PathBuf,
    /// What `nix-version.sh` printed. Without it: the machine's own Nix.
    #[arg(long)]
    nix_rootfs: Option<PathBuf>,
    /// Where to write the figures.
    #[arg(long)]
    json: PathBuf,
    /// How often each contestant runs.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(flatten)]
    filter: Filter,
}

/// Which of all that can be measured.
#[derive(Debug, clap::Args)]
struct Filter {
    /// Only what has this in its name.
    #[arg(long)]
    only: Option<String>,
}

impl Filter {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|pattern| name.contains(pattern.as_str()))
    }
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Stopwatch => stopwatch::serve(),
        Command::Run(options) => run(&options),
        Command::Headline(options) => headline::run(&options),
        Command::Registry { images, listen } => registry::serve(images, listen),
    }
}

fn run(options: &Run) -> Result<()> {
    // The limit creates files with their final modes, as does nix-csi-node.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let servers = Servers::start(&options.corpora, &options.scratch)?;
    let mut figures = fetch::measure(options, &options.filter, &servers)?;
    figures.extend(publish::measure(options, &options.filter, &servers)?);
    figures.extend(view::measure(options, &options.filter, &servers)?);
    figures.extend(admission::measure(options.rounds, &options.filter)?);
    report::print(&figures)?;
    // What a cluster is needed for is measured by another command.
    report::write(&options.json, &figures, |name| {
        options.filter.only.is_some() || name.starts_with("headline")
    })
}
