//! Getting closures from binary caches: ask, check, download, restore, register.
//!
//! ```text
//! roots ─▶ narinfo ─▶ signature ─▶ references ─▶ narinfo …          (many at a time, breadth first)
//!                        └──▶ NAR ─▶ decode ─▶ hash ─▶ restore ─▶ staging
//!                                                                  └─ all of it ─▶ store, one transaction
//! ```
//! **Invariant:** what has no trusted signature is not downloaded; what has another hash or size than was
//! signed never gets out of staging.

mod budget;
mod cache;
mod client;
mod content;
mod decode;
mod download;
mod error;
mod fair;
mod fetch;
mod flight;
mod health;
mod info;
mod login;
mod lookup;
mod partial;
mod pool;
mod share;
mod stop;
mod transfer;
mod unpack;
mod window;

pub use cache::BinaryCache;
pub(crate) use cache::public as without_secrets;
pub use client::{ClientError, client};
pub use content::ContentError;
pub use error::{CacheError, FetchError};
pub use fetch::{Closure, Progress, Substituter};
pub use login::{Logins, ParseTokensError};
pub use lookup::Trust;
pub use share::{Fetches, Waited};
