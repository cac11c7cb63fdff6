//! Fetches closures with `nix-csi-node fetch`, with `nix copy` and with `nix-store -r`, and tells how long
//! each took. Run by `e2e/bench.sh`, which gives it a file system of its own.
//!
//! [`rows::ROWS`] is what is measured. A row is a corpus, a compression and a latency; its contestants take
//! turns, each from an empty store, and the best of the rounds counts. A benchmark is no test: a budget that
//! is missed is printed and does not fail it; a contestant that fails does.

mod contestant;
mod corpus;
mod limit;
mod report;
mod rows;
mod server;
mod stopwatch;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// How fast closures are fetched.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure.
    Run(Run),
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
    /// Only the rows with this in their name.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Stopwatch => stopwatch::serve(),
        Command::Run(options) => run(&options),
    }
}

fn run(options: &Run) -> Result<()> {
    // The limit creates files with their final modes, as does nix-csi-node.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let servers = server::Servers::start(&options.corpora, &options.scratch)?;
    let mut field = contestant::Field::new(&options.node, options.nix_rootfs.as_deref(), &options.scratch)?;
    let mut measured = Vec::new();
    for row in rows::ROWS {
        if options.only.as_ref().is_none_or(|pattern| row.name().contains(pattern.as_str())) {
            eprintln!("bench: {}", row.name());
            measured.push(row.measure(&options.corpora, &servers, &mut field, options.rounds)?);
        }
    }
    let figures = report::figures(&measured, field.nix_version());
    report::print(&figures)?;
    let json = serde_json::to_vec_pretty(&figures)?;
    std::fs::write(&options.json, json).with_context(|| options.json.display().to_string())
}
