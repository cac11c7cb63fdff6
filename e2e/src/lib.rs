//! What the tests share: the package fixtures, caches to serve them, and the cluster.
//!
//! Nothing is skipped here. What is missing is an error that says how it is made.

mod api_server;
mod cache_server;
pub mod cluster;
pub mod driver;
mod fault;
mod fixtures;
mod http;
pub mod idmap;
pub mod nar_cache;
pub mod nix;
// Kills the driver at points that a release does not have, and the benchmark is one.
#[cfg(debug_assertions)]
pub mod process;
mod refusal;
mod sanity;
pub mod small_fs;
mod tls_server;
pub mod tree;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

pub use api_server::{ApiServer, Told};
pub use cache_server::{CacheServer, Rule, Seen};
pub use fault::{Fault, FaultProxy};
pub use fixtures::{Fixture, Fixtures};
pub use http::StaticServer;
pub use refusal::{chain, refusal};
pub use sanity::StandIn;
pub use tls_server::{Asked, Authority, Ending, Identity, TlsServer};

/// The `nix-csi-node` that was built beside the test that asks.
pub fn node_program() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let program = test.ancestors().nth(2).context("a target directory")?.join("nix-csi-node");
    ensure!(program.exists(), "{} is missing; e2e/kernel-tests.sh builds it", program.display());
    Ok(program)
}
