//! Content that proves itself: the hash in a content address, computed again while the content is written.

use nix_csi_store::nar::NarSink;
use nix_csi_store::{ContentAddress, ContentAddressMethod, Hash, HashAlgorithm, NarHash};
use ring::digest::Context;

/// Why content is not what its address says.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A directory, a symlink or an executable, where the address is of a plain file.
    #[error("its content address is of a plain file, it is not one")]
    NotAFile,
    /// Another content.
    #[error("its content does not have the hash of its content address, {0}")]
    Hash(ContentAddress),
}

/// Passes a NAR on, and hashes of it what the content address is about.
pub(super) struct ContentHash<S> {
    sink: S,
    check: Check,
}

enum Check {
    /// A signature vouches for it.
    Nothing,
    /// The hash of the NAR, which is computed in any case.
    Nar(ContentAddress),
    File {
        address: ContentAddress,
        hash: Box<Context>,
        plain: bool,
    },
    /// An address of a kind that is refused before anything is downloaded.
    Never(ContentAddress),
}

/// Whether [`ContentHash`] can check an address of this kind.
pub(super) fn can_check(address: &ContentAddress) -> bool {
    !matches!(check(Some(address)), Check::Never(_))
}

fn check(address: Option<&ContentAddress>) -> Check {
    let Some(address) = address.cloned() else { return Check::Nothing };
    match (address.method(), address.hasher()) {
        (ContentAddressMethod::Recursive, _) if address.hash().algorithm() == HashAlgorithm::Sha256 => {
            Check::Nar(address)
        }
        (ContentAddressMethod::Flat | ContentAddressMethod::Text, Ok(hash)) => {
            Check::File { address, hash: Box::new(hash), plain: true }
        }
        _ => Check::Never(address),
    }
}

impl<S: NarSink> ContentHash<S> {
    pub(super) fn new(sink: S, address: Option<&ContentAddress>) -> Self {
        Self { sink, check: check(address) }
    }

    /// Gives back what it passed the NAR to, if the content is what its address says.
    pub(super) fn finish(self, nar: &NarHash) -> Result<S, ContentError> {
        let same = |digest: &[u8], expected: &Hash| digest == expected.digest();
        match self.check {
            Check::Nothing => Ok(self.sink),
            Check::File { plain: false, .. } => Err(ContentError::NotAFile),
            Check::Nar(address) if same(nar.digest(), address.hash()) => Ok(self.sink),
            Check::File { address, hash, .. } => {
                if same(hash.finish().as_ref(), address.hash()) {
                    Ok(self.sink)
                } else {
                    Err(ContentError::Hash(address))
                }
            }
            Check::Nar(address) | Check::Never(address) => Err(ContentError::Hash(address)),
        }
    }

    /// What it passes the NAR to.
    pub(super) fn inner(&mut self) -> &mut S {
        &mut self.sink
    }

    fn not_plain(&mut self) {
        if let Check::File { plain, .. } = &mut self.check {
            *plain = false;
        }
    }
}

impl<S: NarSink> NarSink for ContentHash<S> {
    type Error = S::Error;

    fn directory(&mut self, name: &[u8]) -> Result<(), S::Error> {
        self.not_plain();
        self.sink.directory(name)
    }

    fn leave(&mut self) -> Result<(), S::Error> {
        self.sink.leave()
    }

    fn file(&mut self, name: &[u8], executable: bool, size: u64) -> Result<(), S::Error> {
        if executable {
            self.not_plain();
        }
        self.sink.file(name, executable, size)
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), S::Error> {
        if let Check::File { hash, .. } = &mut self.check {
            hash.update(bytes);
        }
        self.sink.data(bytes)
    }

    fn file_end(&mut self) -> Result<(), S::Error> {
        self.sink.file_end()
    }

    fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), S::Error> {
        self.not_plain();
        self.sink.symlink(name, target)
    }
}
