//! Getting closures from binary caches: ask, check, download, restore, register.
//!
//! ```text
//! roots ─▶ narinfo ─▶ signature ─▶ references ─▶ narinfo …          (many at a time, breadth first)
//!                        └──▶ NAR ─▶ decode ─▶ hash ─▶ restore ─▶ staging
//!                                                    what is closed under references ─▶ store, one transaction
//! ```
//! **Invariant:** what neither has a trusted signature nor can prove itself by its content is not downloaded (unless
//! `require-sigs = false`); what has another hash or size than its narinfo says never gets out of staging.

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
mod turns;
mod unpack;
mod window;

pub use cache::BinaryCache;
pub(crate) use cache::public as without_secrets;
pub use client::{ClientError, client};
pub use content::ContentError;
pub use error::{CacheError, FetchError};
pub use fetch::{Closure, Largest, Progress, Substituter};
pub use login::{Credentials, Logins, ParseCredentialsError, ParseTokensError};
pub use lookup::Trust;
pub use share::{Fetches, Waited};
