//! Getting closures from binary caches: ask, check, download, restore, register.
//!
//! ```text
//! roots ─▶ narinfo ─▶ signature ─▶ references ─▶ narinfo …          (many at a time, breadth first)
//!                        └──▶ NAR ─▶ decode ─▶ hash ─▶ restore ─▶ staging
//!                                                                  └─ all of it ─▶ store, one transaction
//! ```
//! **Invariant:** what has no trusted signature is not downloaded; what has another hash or size than was
//! signed never gets out of staging.

mod cache;
mod client;
mod decode;
mod error;
mod fetch;
mod pool;
mod share;
mod staging;

pub use cache::BinaryCache;
pub use client::client;
pub use error::{CacheError, FetchError};
pub use fetch::{Closure, Progress, Substituter, Trust};
pub use share::{Fetches, Waited};
