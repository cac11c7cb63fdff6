//! What the tests share: the package fixtures, caches to serve them, and the cluster.
//!
//! Nothing is skipped here. What is missing is an error that says how it is made.

pub mod cluster;
mod fault;
mod fixtures;
mod http;
pub mod nix;

pub use fault::{Fault, FaultProxy};
pub use fixtures::{Fixture, Fixtures};
pub use http::StaticServer;
