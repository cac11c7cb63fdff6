//! Hashes as Nix writes them: base 16, Nix base 32, base 64 and SRI.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};

use crate::base32;

/// Why a text is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseHashError {
    /// Neither `<algorithm>:<digest>` nor `<algorithm>-<base 64>`.
    #[error("{0:?} does not begin with the name of a hash, like `sha256:`")]
    NoAlgorithm(String),
    /// An algorithm that Nix does not know.
    #[error("{0:?} is not a hash algorithm known here (md5, sha1, sha256, sha512)")]
    UnknownAlgorithm(String),
    /// The digest has the wrong length or characters.
    #[error("{0:?} is not a {1} digest in base 16, 32 or 64")]
    Digest(String, HashAlgorithm),
    /// A hash of another algorithm than the one that is needed.
    #[error("a {0} hash where sha256 is needed")]
    NotSha256(HashAlgorithm),
}

/// The algorithms that Nix knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HashAlgorithm {
    /// MD5: only ever met in old fixed-output derivations.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-256: every NAR hash.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl HashAlgorithm {
    const ALL: [Self; 4] = [Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512];

    /// The length of a digest in bytes.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        })
    }
}

/// A digest together with its algorithm.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hash {
    algorithm: HashAlgorithm,
    digest: Vec<u8>,
}

impl Hash {
    /// The algorithm of this hash.
    pub fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    /// The bytes of this hash.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }
}

impl FromStr for Hash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        // SRI separates by `-` and is always base 64; the length tells the other three apart.
        let (name, digest, sri) = match (text.split_once(':'), text.split_once('-')) {
            (Some((name, digest)), _) => (name, digest, false),
            (None, Some((name, digest))) => (name, digest, true),
            (None, None) => return Err(ParseHashError::NoAlgorithm(text.to_owned())),
        };
        let algorithm = HashAlgorithm::ALL
            .into_iter()
            .find(|a| a.to_string() == name)
            .ok_or_else(|| ParseHashError::UnknownAlgorithm(name.to_owned()))?;
        let bad = || ParseHashError::Digest(digest.to_owned(), algorithm);
        let len = algorithm.digest_len();
        let bytes = if !sri && digest.len() == len * 2 {
            HEXLOWER_PERMISSIVE.decode(digest.as_bytes()).map_err(|_| bad())?
        } else if !sri && digest.len() == base32::encoded_len(len) {
            decode_base32(algorithm, digest).ok_or_else(bad)?
        } else {
            BASE64.decode(digest.as_bytes()).map_err(|_| bad())?
        };
        if bytes.len() == len { Ok(Self { algorithm, digest: bytes }) } else { Err(bad()) }
    }
}

fn decode_base32(algorithm: HashAlgorithm, digest: &str) -> Option<Vec<u8>> {
    match algorithm {
        HashAlgorithm::Md5 => base32::decode::<16>(digest).ok().map(Vec::from),
        HashAlgorithm::Sha1 => base32::decode::<20>(digest).ok().map(Vec::from),
        HashAlgorithm::Sha256 => base32::decode::<32>(digest).ok().map(Vec::from),
        HashAlgorithm::Sha512 => base32::decode::<64>(digest).ok().map(Vec::from),
    }
}

impl fmt::Display for Hash {
    /// `sha256:<nix base 32>`, as in a narinfo.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, base32::encode(&self.digest))
    }
}

/// The SHA-256 of a NAR: what a signature vouches for and what decides whether a path is what it says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NarHash([u8; 32]);

impl NarHash {
    /// A digest that was computed.
    pub const fn new(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The bytes of this hash.
    pub const fn digest(&self) -> &[u8] {
        &self.0
    }

    /// `sha256:<64 hexadecimal digits>`, as in Nix's database.
    pub fn to_base16(self) -> String {
        format!("sha256:{}", data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl FromStr for NarHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        let hash: Hash = text.parse()?;
        <[u8; 32]>::try_from(hash.digest())
            .ok()
            .filter(|_| hash.algorithm() == HashAlgorithm::Sha256)
            .map(Self)
            .ok_or(ParseHashError::NotSha256(hash.algorithm()))
    }
}

impl fmt::Display for NarHash {
    /// `sha256:<nix base 32>`, as in a narinfo and in the fingerprint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", base32::encode(&self.0))
    }
}

impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const EMPTY: &str = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    #[rstest]
    #[case::base_32(EMPTY)]
    #[case::base_16("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")]
    #[case::base_64("sha256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=")]
    #[case::sri("sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=")]
    fn every_base_is_the_same_hash(#[case] text: &str) {
        assert_eq!(text.parse::<NarHash>().unwrap().to_string(), EMPTY);
    }

    #[rstest]
    #[case::nothing("")]
    #[case::no_algorithm("0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73")]
    #[case::unknown_algorithm("blake3:00")]
    #[case::short("sha256:00")]
    #[case::other_algorithm("sha1:0000000000000000000000000000000000000000")]
    #[case::not_ascii("sha256:é")]
    fn what_is_no_nar_hash(#[case] text: &str) {
        assert!(text.parse::<NarHash>().is_err());
    }
}
