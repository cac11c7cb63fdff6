//! What the tests share: the package fixtures, caches to serve them, and the cluster.
//!
//! Nothing is skipped here. What is missing is an error that says how it is made.

mod cache_server;
pub mod cluster;
pub mod driver;
mod fault;
mod fixtures;
mod http;
pub mod nar_cache;
pub mod nix;
mod refusal;
pub mod small_fs;
mod tls_server;
pub mod tree;

pub use cache_server::{CacheServer, Rule, Seen};
pub use fault::{Fault, FaultProxy};
pub use fixtures::{Fixture, Fixtures};
pub use http::StaticServer;
pub use refusal::{chain, refusal};
pub use tls_server::{Asked, Authority, Ending, Identity, TlsServer};
