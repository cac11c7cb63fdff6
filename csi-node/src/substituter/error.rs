//! What can go wrong between a cache and the store. Every message names path and cache.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix_csi_store::nar::NarError;
use nix_csi_store::{NarHash, ParseNarInfoError, SignatureError, StorePath};
use reqwest::Url;

use super::cache::public;
use super::content::ContentError;
use crate::store::{DatabaseError, NoSpace, ProvenanceError, RegisterError};

/// Why a cache did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// No answer: refused, reset, timed out, no such name.
    #[error("no answer from {url}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// The answer ended early, and nobody said that it did: HTTP/2 can do that.
    #[error("{url} ended after {received} of {expected} bytes")]
    Cut {
        /// What was asked for.
        url: String,
        /// How much came.
        received: u64,
        /// How much was announced.
        expected: u64,
    },
    /// An answer that does not help.
    #[error("{url} answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: reqwest::StatusCode,
        /// When it wants to be asked again.
        after: Option<Duration>,
    },
    /// The narinfo is there and what it describes is not: the cache was cleaned up in between.
    #[error("{url} is gone, although its narinfo is there")]
    Gone {
        /// What was asked for.
        url: String,
    },
    /// The cache wants other credentials, or any.
    #[error("{url} answered {status}: the cache does not accept these credentials, or wants some")]
    Unauthorized {
        /// What was asked for.
        url: String,
        /// The answer.
        status: reqwest::StatusCode,
    },
    /// Longer than any narinfo.
    #[error("{url} answered with more than {limit} bytes")]
    TooLong {
        /// What was asked for.
        url: String,
        /// The most that is read.
        limit: usize,
    },
    /// Not a narinfo.
    #[error("{url} is not a valid narinfo")]
    NarInfo {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        source: ParseNarInfoError,
    },
    /// A narinfo of something else.
    #[error("{url} is about {found}, not about the path it was asked for")]
    OtherPath {
        /// What was asked for.
        url: String,
        /// What it is about.
        found: StorePath,
    },
    /// A file of a cache that is a directory.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Paths of another store cannot be used here.
    #[error("{cache} is a cache of {found}, not of /nix/store")]
    StoreDir {
        /// The cache.
        cache: String,
        /// What it says.
        found: String,
    },
    /// It failed as often as it was asked, and is asked again later.
    #[error("{cache} failed and is asked again in {seconds} s: {reason}")]
    Paused {
        /// The cache.
        cache: String,
        /// When.
        seconds: u64,
        /// How it failed.
        reason: Arc<str>,
    },
    /// Compressed on the way, and not to be decompressed.
    #[error("cannot decompress {url}")]
    Undecodable {
        /// What was asked for.
        url: String,
        /// What the decoder said.
        source: io::Error,
    },
    /// Compressed on the way in a way that was not asked for.
    #[error("{url} came with Content-Encoding {encoding:?}, known are zstd, gzip, br and xz")]
    Encoding {
        /// What was asked for.
        url: String,
        /// How it came.
        encoding: String,
    },
    /// A NAR's address that cannot be one.
    #[error("{url:?} of the narinfo is neither below the cache nor an http(s) address")]
    NarUrl {
        /// What stands there.
        url: String,
    },
}

impl CacheError {
    pub(super) fn unreachable(url: &Url, source: reqwest::Error) -> Self {
        Self::Unreachable { url: public(url), source: source.without_url() }
    }

    /// Whether other questions will fare no better now. A server that fails at one file may have all others.
    pub(super) fn is_of_whole_cache(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Cut { .. } => true,
            Self::Status { status, .. } => matches!(status.as_u16(), 429 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether the same question may get another answer later.
    pub fn is_temporary(&self) -> bool {
        match self {
            // Where redirects do not end, asking again does not either.
            Self::Unreachable { source, .. } => !source.is_redirect() && !source.is_builder(),
            Self::Paused { .. } | Self::Cut { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
            }
            Self::Gone { .. }
            | Self::Unauthorized { .. }
            | Self::File { .. }
            | Self::StoreDir { .. }
            | Self::Encoding { .. }
            | Self::Undecodable { .. }
            | Self::TooLong { .. }
            | Self::NarInfo { .. }
            | Self::OtherPath { .. }
            | Self::NarUrl { .. } => false,
        }
    }
}

/// Why a closure did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Every cache said that it does not have it.
    #[error("no cache has {path} (asked: {caches}); is it pushed, and is the path right?")]
    NotFound {
        /// What is missing.
        path: StorePath,
        /// Who was asked.
        caches: String,
    },
    /// A cache has something, but not a narinfo that can be used.
    #[error("cannot ask for {path}")]
    Lookup {
        /// What was asked for.
        path: StorePath,
        /// What the cache said.
        source: CacheError,
    },
    /// No trusted signature.
    #[error("{path} from {cache} is not trusted")]
    Untrusted {
        /// The path.
        path: StorePath,
        /// Who offers it.
        cache: String,
        /// What is wrong with its signatures.
        source: SignatureError,
    },
    /// The transfer failed.
    #[error("cannot download {path} from {cache}")]
    Download {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What went wrong.
        source: CacheError,
    },
    /// What came cannot be decompressed.
    #[error("cannot decompress {path} from {cache}")]
    Decode {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What the decoder said.
        source: io::Error,
    },
    /// What came is not a NAR.
    #[error("{path} from {cache} is not a valid NAR")]
    Nar {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What is wrong with it.
        source: NarError,
    },
    /// Another number of bytes than was signed.
    #[error("{path} from {cache} does not have the {expected} bytes that were signed")]
    Size {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// How many there should be.
        expected: u64,
    },
    /// Other bytes than were signed.
    #[error("{path} from {cache} has hash {found}, signed was {expected}")]
    Hash {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What was signed.
        expected: NarHash,
        /// What came.
        found: NarHash,
    },
    /// Other content than its own address says.
    #[error("{path} from {cache} is not signed, and does not prove itself")]
    ContentAddress {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What differs.
        source: ContentError,
    },
    /// A decoder would need more memory than a node gives to one.
    #[error("{path} from {cache} needs a window of {window} bytes to decompress, at most {limit} are given")]
    Window {
        /// The path.
        path: StorePath,
        /// From where.
        cache: String,
        /// What it needs.
        window: u64,
        /// The most there is.
        limit: u64,
    },
    /// The disk cannot take it.
    #[error("no space for {path}")]
    NoSpace {
        /// The path.
        path: StorePath,
        /// How much is missing.
        source: NoSpace,
    },
    /// The disk did not take it.
    #[error("cannot restore {path}")]
    Restore {
        /// The path.
        path: StorePath,
        /// What the system said.
        source: io::Error,
    },
    /// No directory to restore into.
    #[error("cannot make a staging directory")]
    Staging(#[source] io::Error),
    /// The store did not take it.
    #[error("cannot register the closure")]
    Register(#[from] RegisterError),
    /// The store did not answer.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Nobody can say who may see it.
    #[error(transparent)]
    Provenance(#[from] ProvenanceError),
    /// What is here is private to others, and not the same.
    #[error(
        "{path} is on this node with another content than {cache} has; it can be used when it was collected here"
    )]
    OtherContent {
        /// The path.
        path: StorePath,
        /// Who would give it.
        cache: String,
    },
    /// More than a node should be asked for.
    #[error("the closure has more than {limit} paths, which is this node's max-closure-paths")]
    TooManyPaths {
        /// The most.
        limit: usize,
    },
    /// Larger than a node should be asked for.
    #[error("the closure has more than {limit} bytes, which is this node's max-closure-size")]
    TooManyBytes {
        /// The most.
        limit: u64,
    },
    /// The work was ended from outside.
    #[error("the fetch was stopped before it was complete")]
    Stopped,
    /// Another call's fetch of the same paths failed.
    #[error(transparent)]
    Shared(Arc<FetchError>),
}

impl FetchError {
    /// Whether the same cache may do better the next time.
    pub(super) fn is_temporary(&self) -> bool {
        matches!(self, Self::Lookup { source, .. } | Self::Download { source, .. } if source.is_temporary())
    }

    /// Whether another cache may do better: what this one sent is at fault, not this node.
    pub(super) fn is_of_cache(&self) -> bool {
        match self {
            Self::NotFound { .. }
            | Self::Lookup { .. }
            | Self::Untrusted { .. }
            | Self::Download { .. }
            | Self::Decode { .. }
            | Self::Nar { .. }
            | Self::Size { .. }
            | Self::ContentAddress { .. }
            | Self::Window { .. }
            | Self::Hash { .. } => true,
            Self::OtherContent { .. }
            | Self::Provenance(_)
            | Self::Restore { .. }
            | Self::NoSpace { .. }
            | Self::Staging(_)
            | Self::Register(_)
            | Self::Database(_)
            | Self::TooManyPaths { .. }
            | Self::TooManyBytes { .. }
            | Self::Stopped
            | Self::Shared(_) => false,
        }
    }

    /// The error itself, whoever's fetch it was.
    pub fn root(&self) -> &Self {
        match self {
            Self::Shared(error) => error.root(),
            error => error,
        }
    }
}
