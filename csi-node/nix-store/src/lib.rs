//! Nix's formats, and nothing else: store paths (also in other text), hashes, content addresses, narinfo,
//! signatures, NAR.
//!
//! Everything here is pure. **Absent on purpose:** no file is opened, no socket is used, nothing is
//! `async`, and no length that came from outside decides how much memory is reserved. The parsers are
//! meant to be fed by an enemy: they answer with an error, never with a panic.

mod base32;
pub mod conf;
mod content_address;
mod hash;
pub mod nar;
mod narinfo;
mod netrc;
mod path;
mod references;
mod signature;

pub use base32::{Base32Error, decode as decode_base32, encode as encode_base32};
pub use content_address::{
    ContentAddress, ContentAddressError, ContentAddressMethod, ParseContentAddressError,
};
pub use hash::{Hash, HashAlgorithm, NarHash, ParseHashError};
pub use narinfo::{Compression, NarInfo, ParseNarInfoError};
pub use netrc::{Login, Netrc, ParseNetrcError};
pub use path::{ParseStorePathError, STORE_DIR, StorePath, StorePathHash};
pub use references::{FoundPath, find_store_paths};
pub use signature::{
    ParseKeyError, ParseSignatureError, PublicKey, Signature, SignatureError, TrustedKeys, fingerprint,
};
