//! The node side of nix-csi: a CSI driver that needs no Nix.
//!
//! Read [`publish`] first; it tells the story, and each of its steps is a module of its own.

mod args;
mod authority;
pub mod config;
mod control;
mod driver;
mod dump;
#[cfg(debug_assertions)]
pub mod fault;
#[cfg(not(debug_assertions))]
mod fault;
mod gc;
mod http;
mod identity;
mod kubernetes;
mod limit;
mod metrics;
pub mod mount;
mod node;
mod ops;
mod path_error;
mod prepare;
mod progress;
pub mod publish;
mod reconcile;
mod registration;
mod request;
mod restore;
mod server;
mod stats;
pub mod store;
pub mod substituter;
mod tenancy;
mod unlink;
mod usage;
mod verify;
pub mod view;
pub mod volume;
mod wanted;

pub use args::{Args, run};
pub use driver::{Driver, DriverOptions, start_substituter};
pub use gc::Limits;
pub use kubernetes::Kubernetes;
pub use limit::LimitError;
pub use ops::Busy;
pub use path_error::PathError;
pub use request::{PublishRequest, RequestError, StatsRequest, UnpublishRequest};
pub use server::{ServeError, Sockets, serve};
pub use stats::StatsError;
