//! Ed25519 signatures over a path's fingerprint, and the keys that are trusted to make them.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use data_encoding::BASE64;
use ring::signature::{ED25519, UnparsedPublicKey};

use crate::hash::NarHash;
use crate::path::StorePath;

/// Why a text is not a public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// No `<name>:`.
    #[error("{0:?} is not <name>:<base64>")]
    NoName(String),
    /// Not 32 bytes in base 64.
    #[error("key {0:?} is not 32 bytes in base 64")]
    NotAKey(String),
}

/// Why a text is not a signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not <key name>:<64 bytes in base 64>")]
pub struct ParseSignatureError(String);

/// Why no signature of a path counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// No signature at all.
    #[error("it has no signature")]
    Unsigned,
    /// Signed, by keys that are not trusted.
    #[error("it is signed by {}, none of which is in trusted-public-keys", .0.join(", "))]
    UnknownKey(Vec<String>),
    /// A trusted key's name, but not over this content.
    #[error("its signature by {0} is not right")]
    Wrong(String),
}

/// The public half of a signing key: `<name>:<base64>`.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    key: [u8; 32],
}

impl PublicKey {
    /// The name under which signatures of this key are found.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for PublicKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let (name, key) = named(text).ok_or_else(|| ParseKeyError::NoName(text.to_owned()))?;
        let key = decode64(key).ok_or_else(|| ParseKeyError::NotAKey(name.to_owned()))?;
        Ok(Self { name: name.to_owned(), key })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(&self.key))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One `Sig:` line: `<key name>:<base64>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature {
    name: String,
    bytes: [u8; 64],
}

impl FromStr for Signature {
    type Err = ParseSignatureError;

    fn from_str(text: &str) -> Result<Self, ParseSignatureError> {
        let (name, bytes) = named(text)
            .and_then(|(name, bytes)| Some((name, decode64(bytes)?)))
            .ok_or_else(|| ParseSignatureError(text.to_owned()))?;
        Ok(Self { name: name.to_owned(), bytes })
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(&self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The names come from outside and end up in messages and in a space-separated database column.
fn named(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(name, _)| !name.is_empty() && !name.contains(char::is_whitespace))
}

fn decode64<const N: usize>(text: &str) -> Option<[u8; N]> {
    // The length first: a narinfo may hold a very long line.
    if text.len() != N.div_ceil(3) * 4 {
        return None;
    }
    BASE64.decode(text.as_bytes()).ok()?.try_into().ok()
}

/// What a signature vouches for: the path, its content and its references.
///
/// `1;<store path>;sha256:<base 32>;<NAR size>;<reference>,<reference>…`, references sorted by bytes.
pub fn fingerprint(path: &StorePath, hash: NarHash, size: u64, references: &[StorePath]) -> String {
    let mut sorted: Vec<_> = references.iter().collect();
    sorted.sort_unstable();
    sorted.dedup();
    let mut text = format!("1;{path};{hash};{size};");
    for (n, reference) in sorted.into_iter().enumerate() {
        let comma = if n == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(text, "{comma}{reference}");
    }
    text
}

/// The keys of `trusted-public-keys`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedKeys(BTreeMap<String, PublicKey>);

impl TrustedKeys {
    /// The name of the first trusted key that made one of `signatures` over `fingerprint`.
    pub fn verify(&self, fingerprint: &str, signatures: &[Signature]) -> Result<&str, SignatureError> {
        if signatures.is_empty() {
            return Err(SignatureError::Unsigned);
        }
        let mut wrong = None;
        for signature in signatures {
            let Some(key) = self.0.get(&signature.name) else { continue };
            let public = UnparsedPublicKey::new(&ED25519, key.key);
            if public.verify(fingerprint.as_bytes(), &signature.bytes).is_ok() {
                return Ok(&key.name);
            }
            wrong = Some(key.name.clone());
        }
        Err(wrong.map_or_else(
            || SignatureError::UnknownKey(signatures.iter().map(|s| s.name.clone()).collect()),
            SignatureError::Wrong,
        ))
    }
}

impl FromIterator<PublicKey> for TrustedKeys {
    fn from_iter<I: IntoIterator<Item = PublicKey>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| (key.name.clone(), key)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    fn signed(text: &str) -> (PublicKey, Signature) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let key = format!("test-1:{}", BASE64.encode(pair.public_key().as_ref()));
        let signature = format!("test-1:{}", BASE64.encode(pair.sign(text.as_bytes()).as_ref()));
        (key.parse().unwrap(), signature.parse().unwrap())
    }

    #[test]
    fn a_key_is_printed_as_it_was_read() {
        let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        assert_eq!(key.parse::<PublicKey>().unwrap().to_string(), key);
    }

    #[test]
    fn one_good_signature_is_enough() {
        let (key, good) = signed("text");
        let trusted: TrustedKeys = [key].into_iter().collect();
        let foreign: Signature = format!("other-1:{}", BASE64.encode(&[0; 64])).parse().unwrap();
        assert_eq!(trusted.verify("text", &[foreign.clone(), good.clone()]), Ok("test-1"));
        assert_eq!(trusted.verify("text2", &[good]), Err(SignatureError::Wrong("test-1".into())));
        assert_eq!(trusted.verify("text", &[]), Err(SignatureError::Unsigned));
        assert_eq!(
            trusted.verify("text", &[foreign]),
            Err(SignatureError::UnknownKey(vec!["other-1".into()]))
        );
    }

    #[test]
    fn references_are_sorted_and_counted_once() {
        let path = |n: char| StorePath::from_base_name(&format!("{}-x", n.to_string().repeat(32))).unwrap();
        let text = fingerprint(&path('1'), NarHash::new([0; 32]), 9, &[path('z'), path('a'), path('z')]);
        assert_eq!(text, format!("1;{};sha256:{};9;{},{}", path('1'), "0".repeat(52), path('a'), path('z')));
    }

    #[test]
    fn keys_that_are_none() {
        for text in ["", "abc", ":abc", "a:b", "a b:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="] {
            assert!(text.parse::<PublicKey>().is_err(), "{text:?}");
        }
    }
}
