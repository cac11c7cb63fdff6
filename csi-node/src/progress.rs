//! How far a fetch is, shown: a bar to a person at a terminal, JSON lines to anything else.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix_csi_proto::control::verify_event::Event as Finding;
use nix_csi_proto::control::{Damaged, NotRepaired, Repaired, Verified};
use serde::Serialize;
use tokio::sync::watch;

use crate::substituter::Progress;

/// How often a line is written.
const LINES: Duration = Duration::from_secs(1);

/// What is written to standard output, a JSON object a line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Event<'a> {
    /// The fetch goes on.
    Progress {
        paths: u64,
        paths_total: u64,
        bytes: u64,
        bytes_total: u64,
        bytes_per_second: u64,
        cache: Option<&'a str>,
    },
    /// The closure may be used.
    Valid { paths: usize, fetched: usize, register_seconds: f64, ran_alone: u64, seconds: f64 },
    /// A power cut cannot take it any more.
    Durable { seconds: f64 },
    /// Files are not what the database says.
    Damaged { path: String, damage: String },
    /// They are again; the views showed the damaged ones, and are built anew for those who come.
    Repaired { path: String, retired_views: Vec<String>, volumes: Vec<String> },
    /// They are not, and why.
    NotRepaired { path: String, error: String },
    /// What was looked at, and how it is now.
    Verified { paths: u64, damaged: u64, repaired: u64 },
}

impl From<Finding> for Event<'_> {
    fn from(finding: Finding) -> Self {
        match finding {
            Finding::Damaged(Damaged { path, damage }) => Self::Damaged { path, damage },
            Finding::Repaired(Repaired { path, retired_views, volumes }) => {
                Self::Repaired { path, retired_views, volumes }
            }
            Finding::NotRepaired(NotRepaired { path, error }) => Self::NotRepaired { path, error },
            Finding::Verified(Verified { paths, damaged, repaired }) => {
                Self::Verified { paths, damaged, repaired }
            }
        }
    }
}

/// Writes one line.
#[expect(clippy::print_stdout, reason = "what a command is run for")]
pub(crate) fn tell(event: &Event<'_>) {
    // Nothing in an event can fail to be JSON.
    println!("{}", serde_json::to_string(event).unwrap_or_default());
}

/// Shows a fetch until its sender is dropped.
pub(crate) async fn show(mut progress: watch::Receiver<Progress>) {
    let start = Instant::now();
    if !std::io::stderr().is_terminal() {
        loop {
            tokio::time::sleep(LINES).await;
            if progress.has_changed().is_err() {
                return;
            }
            let now = progress.borrow_and_update().clone();
            let seconds = start.elapsed().as_secs().max(1);
            tell(&Event::Progress {
                paths: now.paths,
                paths_total: now.paths_total,
                bytes: now.bytes,
                bytes_total: now.bytes_total,
                bytes_per_second: now.bytes / seconds,
                cache: now.cache.as_deref(),
            });
        }
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let template = "{bar:30} {bytes} of {total_bytes}, {msg}, {bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        bar.set_length(now.bytes_total);
        bar.set_position(now.bytes);
        let from = now.cache.as_deref().map(|cache| format!(" from {cache}")).unwrap_or_default();
        bar.set_message(format!("{} of {} paths{from}", now.paths, now.paths_total));
    }
    bar.finish_and_clear();
}
