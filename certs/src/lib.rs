//! Certificates without cert-manager: a CA of our own and a serving certificate, in one Secret.
//!
//! The Secret is the source of truth. Every replica reads it, whoever finds it absent or old writes it, and
//! the resource version makes sure that two writers do not undo each other. `caBundle` of the webhook
//! configuration is ours by server-side apply, so nothing that people apply contains it.

mod bundle;
mod keeper;
mod resolver;

pub use bundle::{Bundle, BundleError};
pub use keeper::{Keeper, KeeperError};
pub use resolver::LiveCertificate;
