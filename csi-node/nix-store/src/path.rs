//! Store paths: `/nix/store/<32 characters of base 32>-<name>`.

use std::fmt;
use std::str::FromStr;

use crate::base32;

/// Where every store path begins, on every cache and in every pod. A node keeps the files elsewhere.
pub const STORE_DIR: &str = "/nix/store";

pub(crate) const HASH_LEN: usize = 32;
pub(crate) const MAX_NAME_LEN: usize = 211;

/// Why a text is not a store path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseStorePathError {
    /// Does not begin with `/nix/store/`.
    #[error("expected /nix/store/<hash>-<name>")]
    NotInStore,
    /// The part before the first dash is not 32 characters of Nix base 32.
    #[error("the hash part is not 32 characters of Nix base 32 (no e, o, u, t)")]
    Hash,
    /// No dash, or nothing behind it.
    #[error("no name after the hash part")]
    NoName,
    /// More than 211 characters.
    #[error("the name is longer than 211 characters")]
    NameTooLong,
    /// `.`, `..`, or a name that begins with `.-` or `..-`.
    #[error("a name may not be or begin like `.` or `..`")]
    NameDots,
    /// A character that a name may not contain.
    #[error("{0:?} may not stand in a store path's name")]
    NameCharacter(char),
}

/// The 32 characters that name a path in a binary cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePathHash([u8; HASH_LEN]);

impl StorePathHash {
    /// The characters.
    pub fn as_str(&self) -> &str {
        // Only base 32 characters get in, so this is ASCII.
        str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A checked store path. Kept as its base name, since the directory is always the same.
///
/// Safe to use as one component of a file name: no slash, no NUL, never `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePath(Box<str>);

impl StorePath {
    /// Reads a base name, `<hash>-<name>`, as in a narinfo's `References`.
    pub fn from_base_name(base: &str) -> Result<Self, ParseStorePathError> {
        let bytes = base.as_bytes();
        let hash = bytes.get(..HASH_LEN).ok_or(ParseStorePathError::Hash)?;
        if !base32::is_base32(hash) {
            return Err(ParseStorePathError::Hash);
        }
        let name = match bytes.get(HASH_LEN) {
            Some(b'-') => &base[HASH_LEN + 1..],
            Some(_) => return Err(ParseStorePathError::Hash),
            None => return Err(ParseStorePathError::NoName),
        };
        check_name(name)?;
        Ok(Self(base.into()))
    }

    /// Reads a path that may go on below the store path: `/nix/store/<hash>-<name>[/<below>]`.
    ///
    /// What is below comes back without its leading slash, and unchecked.
    pub fn split(text: &str) -> Result<(Self, Option<&str>), ParseStorePathError> {
        let rest = text
            .strip_prefix(STORE_DIR)
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or(ParseStorePathError::NotInStore)?;
        let (base, below) = rest.split_once('/').map_or((rest, None), |(base, below)| (base, Some(below)));
        Ok((Self::from_base_name(base)?, below))
    }

    /// `<hash>-<name>`.
    pub fn base_name(&self) -> &str {
        &self.0
    }

    /// The part that a binary cache is asked for.
    pub fn hash(&self) -> StorePathHash {
        let mut hash = [0; HASH_LEN];
        hash.copy_from_slice(&self.0.as_bytes()[..HASH_LEN]);
        StorePathHash(hash)
    }

    /// What stands behind the hash: `hello-2.12.1`.
    pub fn name(&self) -> &str {
        &self.0[HASH_LEN + 1..]
    }

    /// The name without its version, as `builtins.parseDrvName` cuts it: `hello`.
    pub fn pname(&self) -> &str {
        let name = self.name();
        let version = name.char_indices().find(|(at, c)| {
            *c == '-' && name[at + 1..].chars().next().is_some_and(|n| !n.is_ascii_alphabetic())
        });
        version.map_or(name, |(at, _)| &name[..at])
    }

    /// Whether this is a derivation, which is a recipe and not something to run.
    pub fn is_derivation(&self) -> bool {
        std::path::Path::new(&*self.0).extension().is_some_and(|extension| extension == "drv")
    }
}

fn check_name(name: &str) -> Result<(), ParseStorePathError> {
    if name.is_empty() {
        return Err(ParseStorePathError::NoName);
    }
    if name.len() > MAX_NAME_LEN {
        return Err(ParseStorePathError::NameTooLong);
    }
    if matches!(name, "." | "..") || name.starts_with(".-") || name.starts_with("..-") {
        return Err(ParseStorePathError::NameDots);
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || "+-._?=".contains(*c))) {
        Some(c) => Err(ParseStorePathError::NameCharacter(c)),
        None => Ok(()),
    }
}

impl FromStr for StorePath {
    type Err = ParseStorePathError;

    /// Reads `/nix/store/<hash>-<name>` and nothing behind it.
    fn from_str(text: &str) -> Result<Self, ParseStorePathError> {
        match Self::split(text)? {
            (path, None) => Ok(path),
            (_, Some(_)) => Err(ParseStorePathError::NameCharacter('/')),
        }
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE_DIR}/{}", self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const HASH: &str = "00bgd045z0d4icpbc2yyz4gx48ak44la";

    #[rstest]
    #[case::plain("hello-2.12.1", "hello")]
    #[case::no_version("source", "source")]
    #[case::dashes("python3.11-requests-2.32.3", "python3.11-requests")]
    #[case::dash_then_letters("gcc-wrapper-13.2.0-lib", "gcc-wrapper")]
    #[case::every_character("a+b-c._?=Z9", "a+b-c._?=Z9")]
    #[case::leading_dot(".config", ".config")]
    fn good_names(#[case] name: &str, #[case] pname: &str) {
        let path: StorePath = format!("/nix/store/{HASH}-{name}").parse().unwrap();
        assert_eq!((path.name(), path.pname(), path.hash().as_str()), (name, pname, HASH));
        assert_eq!(path.to_string(), format!("/nix/store/{HASH}-{name}"));
    }

    #[rstest]
    #[case::bare_name("hello", ParseStorePathError::NotInStore)]
    #[case::the_store_itself("/nix/store/", ParseStorePathError::Hash)]
    #[case::hash_too_short("/nix/store/abc-hello", ParseStorePathError::Hash)]
    #[case::letter_outside_the_alphabet(
        "/nix/store/e0bgd045z0d4icpbc2yyz4gx48ak44la-x",
        ParseStorePathError::Hash
    )]
    #[case::hash_only("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la", ParseStorePathError::NoName)]
    #[case::empty_name("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-", ParseStorePathError::NoName)]
    #[case::dots("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-..", ParseStorePathError::NameDots)]
    #[case::dots_dash("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-.-x", ParseStorePathError::NameDots)]
    #[case::space("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a b", ParseStorePathError::NameCharacter(' '))]
    #[case::not_ascii(
        "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-ä",
        ParseStorePathError::NameCharacter('ä')
    )]
    #[case::below(
        "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a/bin",
        ParseStorePathError::NameCharacter('/')
    )]
    fn bad_paths(#[case] text: &str, #[case] error: ParseStorePathError) {
        assert_eq!(text.parse::<StorePath>(), Err(error));
    }

    #[test]
    fn names_end_at_211() {
        let path = |n| StorePath::from_base_name(&format!("{HASH}-{}", "a".repeat(n)));
        assert!(path(211).is_ok());
        assert_eq!(path(212), Err(ParseStorePathError::NameTooLong));
    }

    #[test]
    fn what_is_below_comes_apart() {
        let text = format!("/nix/store/{HASH}-hello/bin/hello");
        let (path, below) = StorePath::split(&text).unwrap();
        assert_eq!((path.name(), below), ("hello", Some("bin/hello")));
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "(/nix/store/)?.{0,80}") {
            if let Ok(path) = text.parse::<StorePath>() {
                prop_assert_eq!(path.to_string(), text);
                prop_assert!(!path.base_name().contains('/'));
            }
        }
    }
}
