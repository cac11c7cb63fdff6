//! NAR, the one serialisation of a file tree that Nix hashes and signs.
//!
//! ```text
//! str(s)  = u64 length, little endian | s | zeros up to the next multiple of 8
//! nar     = str("nix-archive-1") node
//! node    = "(" "type" ( "regular"   ["executable" ""] "contents" <bytes>
//!                      | "symlink"   "target" <target>
//!                      | "directory" { "entry" "(" "name" <name> "node" node ")" } ) ")"
//! ```
//! Names rise strictly by bytes. There is nothing else in it: no owner, no time, no link count.

mod reader;
mod writer;

pub use reader::{NarError, NarReader, NarSink, PushError};
pub use writer::NarWriter;

const MAGIC: &[u8] = b"nix-archive-1";

/// What `str` adds behind `len` bytes.
const fn padding(len: u64) -> u8 {
    // The last three bits of `-len`.
    (len.wrapping_neg() & 7) as u8
}
