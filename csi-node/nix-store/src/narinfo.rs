//! `<hash>.narinfo`: what a binary cache says about one path.

use std::fmt;
use std::str::FromStr;

use crate::hash::{NarHash, ParseHashError};
use crate::path::{ParseStorePathError, StorePath};
use crate::signature::{Signature, fingerprint};

/// Larger answers are not narinfos. A path with 4,000 references is still below this.
const MAX_LEN: usize = 256 * 1024;

/// How the NAR file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// XZ: the default of `nix copy`.
    Xz,
    /// Zstandard.
    Zstd,
    /// bzip2: also what an absent field means.
    Bzip2,
    /// gzip.
    Gzip,
    /// Brotli.
    Brotli,
}

impl Compression {
    /// The word in the narinfo.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Gzip => "gzip",
            Self::Brotli => "br",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why an answer is not a narinfo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseNarInfoError {
    /// Longer than any real one.
    #[error("it is longer than 256 KiB")]
    TooLong,
    /// A line without `: `, or a last line without an end.
    #[error("line {0} is not `<field>: <value>`")]
    Line(usize),
    /// A field that must be there is not.
    #[error("the field {0} is missing")]
    Missing(&'static str),
    /// A field that may stand once stands twice.
    #[error("the field {0} stands twice")]
    Repeated(&'static str),
    /// Not a store path.
    #[error("{field}: {value:?} is not a store path")]
    Path {
        /// The field it stands in.
        field: &'static str,
        /// What stands there.
        value: String,
        /// Why it is none.
        source: ParseStorePathError,
    },
    /// Not a SHA-256 hash.
    #[error("NarHash")]
    Hash(#[from] ParseHashError),
    /// Not a number, or zero where that cannot be.
    #[error("{field}: {value:?} is not a size")]
    Size {
        /// The field it stands in.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// A compression that we cannot undo.
    #[error("compression {0:?} is not supported (none, zstd, xz, bzip2, gzip and br are)")]
    Compression(String),
}

/// What a cache says about one path. Of this, a signature covers only the path, hash, size and references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// The path.
    pub path: StorePath,
    /// Where the NAR is, relative to the cache or absolute.
    pub url: String,
    /// How it is compressed.
    pub compression: Compression,
    /// The length of the compressed file, where the cache says it. A hint, never trusted.
    pub file_size: Option<u64>,
    /// SHA-256 of the NAR.
    pub nar_hash: NarHash,
    /// Length of the NAR, greater than zero.
    pub nar_size: u64,
    /// What the path refers to, itself included, sorted, each once.
    pub references: Vec<StorePath>,
    /// The derivation that built it.
    pub deriver: Option<StorePath>,
    /// Signatures over the fingerprint.
    pub signatures: Vec<Signature>,
    /// The content address, as it stands there.
    pub ca: Option<String>,
}

impl NarInfo {
    /// What the signatures must have signed.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.path, self.nar_hash, self.nar_size, &self.references)
    }
}

/// The fields while they are being read.
#[derive(Default)]
struct Fields<'a> {
    store_path: Option<&'a str>,
    url: Option<&'a str>,
    compression: Option<&'a str>,
    file_size: Option<&'a str>,
    nar_hash: Option<&'a str>,
    nar_size: Option<&'a str>,
    references: Option<&'a str>,
    deriver: Option<&'a str>,
    ca: Option<&'a str>,
    signatures: Vec<Signature>,
}

impl<'a> Fields<'a> {
    fn read(text: &'a str) -> Result<Self, ParseNarInfoError> {
        let mut fields = Self::default();
        let Some(body) = text.strip_suffix('\n') else {
            return Err(ParseNarInfoError::Line(text.lines().count()));
        };
        for (n, line) in body.split('\n').enumerate() {
            let (field, value) = line.split_once(':').ok_or(ParseNarInfoError::Line(n + 1))?;
            // An empty `References:` may have lost the space behind it.
            let value = value.strip_prefix(' ').unwrap_or(value);
            let (slot, name) = match field {
                "StorePath" => (&mut fields.store_path, "StorePath"),
                "URL" => (&mut fields.url, "URL"),
                "Compression" => (&mut fields.compression, "Compression"),
                "FileSize" => (&mut fields.file_size, "FileSize"),
                "NarHash" => (&mut fields.nar_hash, "NarHash"),
                "NarSize" => (&mut fields.nar_size, "NarSize"),
                "References" => (&mut fields.references, "References"),
                "Deriver" => (&mut fields.deriver, "Deriver"),
                "CA" => (&mut fields.ca, "CA"),
                // One that cannot be read does not count; it may be of a kind that comes later.
                "Sig" => {
                    fields.signatures.extend(value.parse::<Signature>());
                    continue;
                }
                // FileHash and whatever comes later: not signed, not needed.
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return Err(ParseNarInfoError::Repeated(name));
            }
        }
        Ok(fields)
    }
}

fn size(field: &'static str, value: &str) -> Result<u64, ParseNarInfoError> {
    // `parse` alone would take a leading plus.
    value
        .parse()
        .ok()
        .filter(|_| value.bytes().all(|b| b.is_ascii_digit()))
        .ok_or_else(|| ParseNarInfoError::Size { field, value: value.to_owned() })
}

fn base_name(field: &'static str, value: &str) -> Result<StorePath, ParseNarInfoError> {
    StorePath::from_base_name(value).map_err(|source| ParseNarInfoError::Path {
        field,
        value: value.to_owned(),
        source,
    })
}

impl FromStr for NarInfo {
    type Err = ParseNarInfoError;

    fn from_str(text: &str) -> Result<Self, ParseNarInfoError> {
        use ParseNarInfoError::Missing;
        if text.len() > MAX_LEN {
            return Err(ParseNarInfoError::TooLong);
        }
        let fields = Fields::read(text)?;
        let store_path = fields.store_path.ok_or(Missing("StorePath"))?;
        let path = store_path.parse().map_err(|source| ParseNarInfoError::Path {
            field: "StorePath",
            value: store_path.to_owned(),
            source,
        })?;
        let compression = match fields.compression.unwrap_or_default() {
            "none" => Compression::None,
            "xz" => Compression::Xz,
            "zstd" => Compression::Zstd,
            "" | "bzip2" => Compression::Bzip2,
            "gzip" => Compression::Gzip,
            "br" => Compression::Brotli,
            other => return Err(ParseNarInfoError::Compression(other.to_owned())),
        };
        let nar_size = match size("NarSize", fields.nar_size.ok_or(Missing("NarSize"))?)? {
            0 => return Err(ParseNarInfoError::Size { field: "NarSize", value: "0".to_owned() }),
            size => size,
        };
        let mut references = fields
            .references
            .unwrap_or_default()
            .split(' ')
            .filter(|name| !name.is_empty())
            .map(|name| base_name("References", name))
            .collect::<Result<Vec<_>, _>>()?;
        references.sort_unstable();
        references.dedup();
        Ok(Self {
            path,
            url: fields.url.filter(|url| !url.is_empty()).ok_or(Missing("URL"))?.to_owned(),
            compression,
            file_size: fields.file_size.map(|value| size("FileSize", value)).transpose()?,
            nar_hash: fields.nar_hash.ok_or(Missing("NarHash"))?.parse()?,
            nar_size,
            references,
            deriver: match fields.deriver {
                None | Some("" | "unknown-deriver") => None,
                Some(name) => Some(base_name("Deriver", name)?),
            },
            signatures: fields.signatures,
            ca: fields.ca.filter(|ca| !ca.is_empty()).map(str::to_owned),
        })
    }
}

impl fmt::Display for NarInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "StorePath: {}", self.path)?;
        writeln!(f, "URL: {}", self.url)?;
        writeln!(f, "Compression: {}", self.compression)?;
        if let Some(size) = self.file_size {
            writeln!(f, "FileSize: {size}")?;
        }
        writeln!(f, "NarHash: {}", self.nar_hash)?;
        writeln!(f, "NarSize: {}", self.nar_size)?;
        let references: Vec<_> = self.references.iter().map(StorePath::base_name).collect();
        writeln!(f, "References: {}", references.join(" "))?;
        if let Some(deriver) = &self.deriver {
            writeln!(f, "Deriver: {}", deriver.base_name())?;
        }
        for signature in &self.signatures {
            writeln!(f, "Sig: {signature}")?;
        }
        self.ca.as_ref().map_or(Ok(()), |ca| writeln!(f, "CA: {ca}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const GOOD: &str = "\
StorePath: /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432
URL: nar/1094wph9z4nwlgvsd53abfz8i117ykiv5dwnq9nnhz846s7xqd7d.nar.xz
Compression: xz
FileHash: sha256:1094wph9z4nwlgvsd53abfz8i117ykiv5dwnq9nnhz846s7xqd7d
FileSize: 114980
NarHash: sha256:0lxjvvpr59c2mdram7ympy5ay741f180kv3349hvfc3f8nrmbqf6
NarSize: 464152
References: 7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27
Deriver: 10dx1q4ivjb115y3h90mipaaz533nr0d-net-tools-1.60_p20170221182432.drv
Sig: cache.nixos.org-1:sn5s/RrqEI+YG6/PjwdbPjcAC7rcta7sJU4mFOawGvJBLsWkyLtBrT2EuFt/LJjWkTZ+ZWOI9NTtjo/woMdvAg==
";
    const KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

    #[test]
    fn a_real_one_is_read_and_its_signature_holds() {
        let info: NarInfo = GOOD.parse().unwrap();
        assert_eq!(info.path.pname(), "net-tools");
        assert_eq!(
            (info.nar_size, info.file_size, info.compression),
            (464_152, Some(114_980), Compression::Xz)
        );
        let trusted: crate::TrustedKeys = [KEY.parse().unwrap()].into_iter().collect();
        assert_eq!(trusted.verify(&info.fingerprint(), &info.signatures), Ok("cache.nixos.org-1"));
        let grown = NarInfo { nar_size: 464_153, ..info };
        assert!(trusted.verify(&grown.fingerprint(), &grown.signatures).is_err());
    }

    #[test]
    fn a_signature_that_cannot_be_read_does_not_count() {
        let text = with("Sig: cache", "Sig: new-kind-of:signature\nSig: cache");
        assert_eq!(text.parse::<NarInfo>().unwrap().signatures.len(), 1);
    }

    #[test]
    fn printed_and_read_again() {
        let info: NarInfo = GOOD.parse().unwrap();
        assert_eq!(info.to_string().parse(), Ok(info));
    }

    fn with(line: &str, instead: &str) -> String {
        assert!(GOOD.contains(line), "{line}");
        GOOD.replace(line, instead)
    }

    #[rstest]
    #[case::no_compression_is_bzip2("Compression: xz\n", "", Compression::Bzip2)]
    #[case::empty_compression_is_bzip2("Compression: xz", "Compression: ", Compression::Bzip2)]
    #[case::unknown_fields_are_skipped("Compression: xz", "Compression: zstd\nNew: 1", Compression::Zstd)]
    fn what_is_forgiven(#[case] line: &str, #[case] instead: &str, #[case] compression: Compression) {
        assert_eq!(with(line, instead).parse::<NarInfo>().unwrap().compression, compression);
    }

    #[rstest]
    #[case::no_path("StorePath", "X", ParseNarInfoError::Missing("StorePath"))]
    #[case::no_url("URL: nar", "X: nar", ParseNarInfoError::Missing("URL"))]
    #[case::empty_size("NarSize: 464152", "NarSize: ", ParseNarInfoError::Size { field: "NarSize", value: String::new() })]
    #[case::no_bytes("NarSize: 464152", "NarSize: 0", ParseNarInfoError::Size { field: "NarSize", value: "0".into() })]
    #[case::signed_size("NarSize: 464152", "NarSize: +464152", ParseNarInfoError::Size { field: "NarSize", value: "+464152".into() })]
    #[case::two_sizes("NarSize: 464152", "NarSize: 1\nNarSize: 2", ParseNarInfoError::Repeated("NarSize"))]
    #[case::odd_compression("Compression: xz", "Compression: lzip", ParseNarInfoError::Compression("lzip".into()))]
    #[case::no_colon("Compression: xz", "Compression", ParseNarInfoError::Line(3))]
    fn what_is_refused(#[case] line: &str, #[case] instead: &str, #[case] error: ParseNarInfoError) {
        assert_eq!(with(line, instead).parse::<NarInfo>(), Err(error));
    }

    #[rstest]
    #[case::reference_with_slash(with("7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27", "../../etc/passwd"))]
    #[case::reference_is_a_full_path(with("References: ", "References: /nix/store/"))]
    #[case::cut_off(GOOD.trim_end().to_owned())]
    #[case::too_long(format!("{GOOD}{}\n", "X: y\n".repeat(60_000)))]
    #[case::nothing(String::new())]
    fn what_is_refused_too(#[case] text: String) {
        assert!(text.parse::<NarInfo>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "((StorePath|URL|NarHash|NarSize|References|Sig|CA|Deriver): ?[ -~é]{0,40}\n){0,9}") {
            let _ = text.parse::<NarInfo>();
        }

        #[test]
        fn a_damaged_one_is_an_answer(at in 0..GOOD.len(), byte in 0u8..128) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = String::from_utf8(bytes).unwrap().parse::<NarInfo>();
        }
    }
}
