//! Content addresses: the `CA` of a path whose name was computed from its contents.
//!
//! ```text
//! text:sha256:<hash>         a file that Nix wrote itself: a derivation, `builtins.toFile`
//! fixed:<algorithm>:<hash>   one file, hashed by its bytes
//! fixed:r:<algorithm>:<hash> a file tree, hashed as NAR
//! ```
//! Such a path needs no signature: whoever has the content and the references can compute the path. Two
//! things have to hold, and only both together are a proof. The path derives from this address and the
//! references ([`ContentAddress::proves`]), and the content has this hash ([`ContentAddress::hasher`]).

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use ring::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512};

use crate::base32;
use crate::hash::{Hash, HashAlgorithm, ParseHashError};
use crate::path::{ParseStorePathError, STORE_DIR, StorePath};

/// Why a text is not a content address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseContentAddressError {
    /// Begins with something else than `text:` or `fixed:`, or with a method of `fixed` that is not known
    /// here, like `fixed:git`.
    #[error("content address method {0:?} is not supported (text, fixed and fixed:r are)")]
    Method(String),
    /// A text is always hashed with SHA-256.
    #[error("a text has a sha256 hash, not {0}")]
    Text(HashAlgorithm),
    /// What follows the method is not a hash.
    #[error(transparent)]
    Hash(#[from] ParseHashError),
}

/// Why a content address says nothing about a path. The path may still be good: then a signature says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentAddressError {
    /// The address of a path that contains its own name is a hash of something else than its content.
    #[error("a path that refers to itself cannot be proved by its content, it needs a signature")]
    SelfReference,
    /// There is no MD5 here, and it would prove nothing.
    #[error("md5 cannot be checked, it needs a signature")]
    Md5,
    /// Only texts and trees with SHA-256 can refer to other paths.
    #[error("content addressed by `{0}` cannot have references")]
    References(ContentAddress),
    /// The name is not one of a store path.
    #[error("{name:?} cannot be the name of a store path")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        source: ParseStorePathError,
    },
    /// It is the address of another path.
    #[error("content address and references belong to {0}")]
    OtherPath(StorePath),
}

/// What of a path's content is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ContentAddressMethod {
    /// The bytes of one regular file that Nix wrote. It may have references.
    Text,
    /// The bytes of one regular file. Whether it is executable is **not** hashed: Nix writes it so that it
    /// is not, and an archive that says otherwise is not proved.
    Flat,
    /// The NAR.
    Recursive,
}

/// What a path's name was computed from, together with its name and references.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContentAddress {
    method: ContentAddressMethod,
    hash: Hash,
}

impl ContentAddress {
    /// What is hashed.
    pub fn method(&self) -> ContentAddressMethod {
        self.method
    }

    /// The hash that the content must have.
    pub fn hash(&self) -> &Hash {
        &self.hash
    }

    /// Takes the content, as [`ContentAddress::method`] says, and ends in the digest to compare.
    ///
    /// With `fixed:r:sha256` that is the NAR hash, which is known anyway.
    pub fn hasher(&self) -> Result<digest::Context, ContentAddressError> {
        Ok(digest::Context::new(match self.hash.algorithm() {
            HashAlgorithm::Md5 => return Err(ContentAddressError::Md5),
            // Weak, but what these paths were named with. Nix accepts it too.
            HashAlgorithm::Sha1 => &SHA1_FOR_LEGACY_USE_ONLY,
            HashAlgorithm::Sha256 => &SHA256,
            HashAlgorithm::Sha512 => &SHA512,
        }))
    }

    /// The path that Nix gives to this content under this name, when it refers to `references`.
    pub fn store_path(&self, name: &str, references: &[StorePath]) -> Result<StorePath, ContentAddressError> {
        let own = format!("{}:{}", self.hash.algorithm(), HEXLOWER.encode(self.hash.digest()));
        let is_source =
            self.method == ContentAddressMethod::Recursive && self.hash.algorithm() == HashAlgorithm::Sha256;
        let (kind, hash) = match self.method {
            ContentAddressMethod::Text => (with_references("text", references), own),
            _ if is_source => (with_references("source", references), own),
            _ if !references.is_empty() => return Err(ContentAddressError::References(self.clone())),
            method => {
                let r = if method == ContentAddressMethod::Recursive { "r:" } else { "" };
                let inner = digest::digest(&SHA256, format!("fixed:out:{r}{own}:").as_bytes());
                ("output:out".to_owned(), format!("sha256:{}", HEXLOWER.encode(inner.as_ref())))
            }
        };
        let fingerprint = format!("{kind}:{hash}:{STORE_DIR}:{name}");
        let digest = digest::digest(&SHA256, fingerprint.as_bytes());
        let mut short = [0; 20];
        for (n, byte) in digest.as_ref().iter().enumerate() {
            short[n % 20] ^= byte;
        }
        StorePath::from_base_name(&format!("{}-{name}", base32::encode(&short)))
            .map_err(|source| ContentAddressError::Name { name: name.to_owned(), source })
    }

    /// Says whether `path` is the path of this content, provided that the content has this hash.
    ///
    /// An error does not mean that the path is bad, only that it needs a signature.
    pub fn proves(&self, path: &StorePath, references: &[StorePath]) -> Result<(), ContentAddressError> {
        if self.hash.algorithm() == HashAlgorithm::Md5 {
            return Err(ContentAddressError::Md5);
        }
        if references.contains(path) {
            return Err(ContentAddressError::SelfReference);
        }
        let derived = self.store_path(path.name(), references)?;
        if derived == *path { Ok(()) } else { Err(ContentAddressError::OtherPath(derived)) }
    }
}

/// `<kind>:<reference>:<reference>…`, sorted and each once, as Nix keeps them.
fn with_references(kind: &str, references: &[StorePath]) -> String {
    let mut sorted: Vec<_> = references.iter().collect();
    sorted.sort_unstable();
    sorted.dedup();
    let mut text = kind.to_owned();
    for reference in sorted {
        text.push(':');
        text.push_str(STORE_DIR);
        text.push('/');
        text.push_str(reference.base_name());
    }
    text
}

impl FromStr for ContentAddress {
    type Err = ParseContentAddressError;

    fn from_str(text: &str) -> Result<Self, ParseContentAddressError> {
        use ContentAddressMethod::{Flat, Recursive, Text};
        let other = |method: &str| ParseContentAddressError::Method(method.to_owned());
        let (method, hash) = match text.split_once(':') {
            Some(("text", hash)) => (Text, hash),
            Some(("fixed", rest)) => match rest.split_once(':') {
                Some(("r", hash)) => (Recursive, hash),
                Some((method, hash)) if hash.contains(':') => return Err(other(&format!("fixed:{method}"))),
                _ => (Flat, rest),
            },
            Some((method, _)) => return Err(other(method)),
            None => return Err(other(text)),
        };
        // `Hash` reads SRI too; Nix does not take that here.
        if !hash.contains(':') {
            return Err(ParseHashError::NoAlgorithm(hash.to_owned()).into());
        }
        let hash: Hash = hash.parse()?;
        if method == Text && hash.algorithm() != HashAlgorithm::Sha256 {
            return Err(ParseContentAddressError::Text(hash.algorithm()));
        }
        Ok(Self { method, hash })
    }
}

impl fmt::Display for ContentAddress {
    /// As in a narinfo and in Nix's database, the hash in base 32.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.method {
            ContentAddressMethod::Text => "text",
            ContentAddressMethod::Flat => "fixed",
            ContentAddressMethod::Recursive => "fixed:r",
        };
        write!(f, "{method}:{}", self.hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const HELLO: &str = "sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq";
    const TREE: &str = "fixed:r:sha256:0dqs46avv3rkqqj1l28in7bahrmi73dx3a2v41j2qnvvh89iv7dm";

    fn ca(text: &str) -> ContentAddress {
        text.parse().unwrap()
    }

    fn path(base: &str) -> StorePath {
        StorePath::from_base_name(base).unwrap()
    }

    // Paths of Nix 2.8.0 with what its `nix path-info --json` says of them. The file is "hello\n", the tree
    // has a file, an executable and a symlink. By `nix-store --add` (a file and the tree), `--add-fixed`,
    // `builtins.path` (also with `recursive = false`) and `builtins.toFile`.
    #[rstest]
    #[case::add_a_file(
        "xp0dpr9yz5h0fk5c5lpj7zzqjbdh3w8c-f",
        "fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw",
        &[]
    )]
    #[case::add_a_tree("kxwm7iwl0za1mqswa771phf846d0havv-d", TREE, &[])]
    #[case::path_with_every_kind_of_character("vka9jx9ifc7cswzsfw27giid2zb6lbq7-path+name_1.0?=x", TREE, &[])]
    #[case::flat_path("pn109cwy493w7p3s9k3wzlpkcnvm9a7m-flat-path", &format!("fixed:{HELLO}"), &[])]
    #[case::flat_sha1("q6nl8rpbwbn81kss6kklr86mmwwpxl8s-flat-sha1", "fixed:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm", &[])]
    #[case::flat_sha256("xnn6zlbfipi9n3yiyzlrsgxax38vrxhd-flat-sha256", &format!("fixed:{HELLO}"), &[])]
    #[case::flat_sha512(
        "s5v5nya0hpcw5x4q5kwfnmksc7q1xjf6-flat-sha512",
        "fixed:sha512:0lrc0dwnvipqviibf7qfm1y492qvjwb1zhkcyi05cndmva1mr5gjcgrnz1x36djmk0sfg8djd2n0qv68vib2jg590mwznar9jcjphp7",
        &[]
    )]
    #[case::tree_sha1("22qs93rjl0s2ys07abhsvjn1zp127p5h-rec-sha1", "fixed:r:sha1:kny6c9r6s59xbq79abhlq0qkwbsfxkzy", &[])]
    #[case::tree_sha256("1drjabk99n8rbkfnrmfjcfaxsgx73s3i-rec-sha256", TREE, &[])]
    #[case::tree_sha512(
        "dp5xlvyaypjb7h24s6li19c16c1i706q-rec-sha512",
        "fixed:r:sha512:0n7lnvn5d0qyv82fv2i39dwasp0y4qf7a3yxmsjblcl64jw3babvbbl35f21jkfx2dgn6dy32cl7rirkd14j63a5sj496pz2dgd8896",
        &[]
    )]
    #[case::text("q3laishhmk84vl44j1973qpzkyhmr90c-text", &format!("text:{HELLO}"), &[])]
    #[case::text_with_a_reference(
        "6fjha1khzc205vnzmwgphy8h98n9ywqp-refs",
        "text:sha256:004pcz2bc2bbpa7yhywvjlkfb6ii2vmr977bqm0kqf41rmp69x9i",
        &["q3laishhmk84vl44j1973qpzkyhmr90c-text"]
    )]
    #[case::text_with_two_references(
        "x0gimvnayqr0c2ij0yi14bf8rym4l5rc-two-refs",
        "text:sha256:1h45l4vhbprsfcmsh64xb64dw706rfq59nn742liwiia17rxayic",
        &["q3laishhmk84vl44j1973qpzkyhmr90c-text", "vdaficij2dhahf0pp1hk8hxsmfl5jsbl-other"]
    )]
    // Outputs of derivations, after `nix store make-content-addressed`.
    #[case::tree_with_a_reference(
        "63j7mq8rw3yav5l5nqnxqpgnfb00f6dg-with-reference",
        "fixed:r:sha256:0myqz1lh5bw2159p9m0rcp3c1b7lfwy3x0x7grr992j6zkxcbsz8",
        &["bxmmr41x9c9n77x15xklpqwpv1rrma88-leaf"]
    )]
    #[case::tree_with_two_references(
        "xc8f4qlyr885a1x8nwsqg8hwzykn36ka-with-two",
        "fixed:r:sha256:1r08vz48v5d4v8729b4w9p37dpnqsfv6g8jppj649960fhzm0vmw",
        &["63j7mq8rw3yav5l5nqnxqpgnfb00f6dg-with-reference", "bxmmr41x9c9n77x15xklpqwpv1rrma88-leaf"]
    )]
    fn paths_that_nix_made(#[case] base: &str, #[case] address: &str, #[case] references: &[&str]) {
        let (made, address) = (path(base), ca(address));
        let mut references: Vec<_> = references.iter().map(|base| path(base)).collect();
        assert_eq!(address.proves(&made, &references), Ok(()));
        // Their order does not matter, nor that one stands twice.
        references.reverse();
        references.extend(references.first().cloned());
        assert_eq!(address.store_path(made.name(), &references), Ok(made.clone()));
        let renamed = path(&format!("{}-other", made.hash()));
        assert!(matches!(
            address.proves(&renamed, &references),
            Err(ContentAddressError::OtherPath(derived)) if derived != made
        ));
        let one_more = [references, vec![path("00bgd045z0d4icpbc2yyz4gx48ak44la-more")]].concat();
        assert!(address.proves(&made, &one_more).is_err());
    }

    // Made by the same Nix with `nix-store --add-fixed md5`.
    #[rstest]
    #[case::flat("zdx3x739klpva5cnxlvm0i54v1nqvdcf-flat-md5", "fixed:md5:4425hx5d1mc9y39llj4k4nm55i")]
    #[case::tree("bn90bldcwsl39kn592igyyiszsbvy0gq-rec-md5", "fixed:r:md5:4kflrxg6gcv9afz92y1c0znfqa")]
    fn md5_names_a_path_and_proves_nothing(#[case] base: &str, #[case] address: &str) {
        assert_eq!(ca(address).store_path(path(base).name(), &[]), Ok(path(base)));
        assert_eq!(ca(address).proves(&path(base), &[]), Err(ContentAddressError::Md5));
        assert_eq!(ca(address).hasher().err(), Some(ContentAddressError::Md5));
    }

    #[test]
    fn what_refers_to_itself_needs_a_signature() {
        // By `nix store make-content-addressed`: the hash is that of a NAR with zeros for the own hash part.
        let itself = path("r3ag9mpfllq2kn569r429yjd456m9a9v-with-self");
        let address = ca("fixed:r:sha256:1jia2c4hyyh08av4v6rg3k4114wqa5g7hrxi5zj8mpy386sk0k2p");
        let leaf = path("bxmmr41x9c9n77x15xklpqwpv1rrma88-leaf");
        assert_eq!(
            address.proves(&itself, &[leaf.clone(), itself.clone()]),
            Err(ContentAddressError::SelfReference)
        );
        // A cache that leaves the reference out gets nowhere.
        assert!(matches!(address.proves(&itself, &[leaf]), Err(ContentAddressError::OtherPath(_))));
    }

    #[rstest]
    #[case::flat(&format!("fixed:{HELLO}"))]
    #[case::tree_sha1("fixed:r:sha1:kny6c9r6s59xbq79abhlq0qkwbsfxkzy")]
    fn only_texts_and_sha256_trees_have_references(#[case] address: &str) {
        let reference = path("q3laishhmk84vl44j1973qpzkyhmr90c-text");
        let address = ca(address);
        let error = ContentAddressError::References(address.clone());
        assert_eq!(address.store_path("x", &[reference]), Err(error));
    }

    #[rstest]
    #[case::slash("a/b")]
    #[case::nothing("")]
    #[case::too_long(&"a".repeat(212))]
    fn names_are_checked(#[case] name: &str) {
        assert!(matches!(ca(TREE).store_path(name, &[]), Err(ContentAddressError::Name { .. })));
    }

    #[rstest]
    #[case::text(&format!("text:{HELLO}"), b"hello\n")]
    #[case::flat_sha1("fixed:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm", b"hello\n")]
    #[case::flat_sha512(
        "fixed:sha512:0lrc0dwnvipqviibf7qfm1y492qvjwb1zhkcyi05cndmva1mr5gjcgrnz1x36djmk0sfg8djd2n0qv68vib2jg590mwznar9jcjphp7",
        b"hello\n"
    )]
    fn the_hasher_agrees_with_nix(#[case] address: &str, #[case] content: &[u8]) {
        let mut hasher = ca(address).hasher().unwrap();
        hasher.update(content);
        assert_eq!(hasher.finish().as_ref(), ca(address).hash().digest());
    }

    #[rstest]
    #[case::base_16("fixed:sha1:f572d396fae9206628714fb2ce00f72e94f2258f")]
    #[case::base_64("fixed:sha1:9XLTlvrpIGYocU+yzgD3LpTyJY8=")]
    fn every_base_is_read_and_written_in_base_32(#[case] text: &str) {
        assert_eq!(ca(text).to_string(), "fixed:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm");
    }

    #[rstest]
    #[case::git("fixed:git:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm", ParseContentAddressError::Method("fixed:git".into()))]
    #[case::unknown_method("nar:sha256:00", ParseContentAddressError::Method("nar".into()))]
    #[case::nothing("", ParseContentAddressError::Method(String::new()))]
    #[case::no_hash("fixed:", ParseHashError::NoAlgorithm(String::new()).into())]
    #[case::no_algorithm("fixed:r:iwjz", ParseHashError::NoAlgorithm("iwjz".into()).into())]
    #[case::sri(
        "fixed:sha1-9XLTlvrpIGYocU+yzgD3LpTyJY8=",
        ParseHashError::NoAlgorithm("sha1-9XLTlvrpIGYocU+yzgD3LpTyJY8=".into()).into()
    )]
    #[case::unknown_algorithm("fixed:r:blake3:00", ParseHashError::UnknownAlgorithm("blake3".into()).into())]
    #[case::short_hash("fixed:sha1:00", ParseHashError::Digest("00".into(), HashAlgorithm::Sha1).into())]
    #[case::text_with_sha1(
        "text:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm",
        ParseContentAddressError::Text(HashAlgorithm::Sha1)
    )]
    fn what_is_refused(#[case] text: &str, #[case] error: ParseContentAddressError) {
        assert_eq!(text.parse::<ContentAddress>(), Err(error));
    }

    proptest! {
        #[test]
        fn what_is_in_base_32_is_written_as_it_was(text in "(text:sha256:|fixed:(r:)?sha256:)[01][0-9a-df-np-sv-z]{51}") {
            if let Ok(address) = text.parse::<ContentAddress>() {
                prop_assert_eq!(address.to_string(), text);
            }
        }

        #[test]
        fn any_text_is_an_answer(text in "((text|fixed|r|git|sha1|sha256|md5):){0,4}.{0,60}") {
            if let Ok(address) = text.parse::<ContentAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
