//! Image references, made whole as Docker does it: `redis` is `docker.io/library/redis:latest`.

use std::fmt;

/// The registry of names without one.
const DOCKER: &str = "docker.io";
/// The same under an older name.
const OLD_DOCKER: &str = "index.docker.io";
/// The tag of names without one.
const LATEST: &str = "latest";
const MAX_LEN: usize = 512;

/// Why a text is not an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseImageError {
    /// Nothing, or more than any image is called.
    #[error("it is empty or longer than {MAX_LEN} characters")]
    Length,
    /// The part with the registry.
    #[error("its registry is not a host name with an optional port")]
    Registry,
    /// The part between registry and tag.
    #[error("its repository is not lower-case words, with `/`, `.`, `_` or `-` between them")]
    Repository,
    /// What stands behind the colon.
    #[error("its tag is not at most 128 letters, digits, `_`, `.` and `-`")]
    Tag,
    /// What stands behind the at sign.
    #[error("its digest is not like sha256:<64 hexadecimal digits>")]
    Digest,
}

/// An image reference with all its parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference {
    /// Registry and name: `docker.io/library/redis`.
    pub repository: String,
    /// `7.2`; `latest` if the reference has neither a tag nor a digest.
    pub tag: Option<String>,
    /// `sha256:…`.
    pub digest: Option<String>,
}

impl ImageReference {
    /// Reads what stands in a container's `image`.
    pub fn parse(text: &str) -> Result<Self, ParseImageError> {
        let mut image = Self::parse_as_written(text)?;
        if image.tag.is_none() && image.digest.is_none() {
            image.tag = Some(LATEST.to_owned());
        }
        Ok(image)
    }

    /// The same, but without a tag where there is none.
    pub(crate) fn parse_as_written(text: &str) -> Result<Self, ParseImageError> {
        if text.is_empty() || text.len() > MAX_LEN {
            return Err(ParseImageError::Length);
        }
        let (name, digest) = text.split_once('@').map_or((text, None), |(name, digest)| (name, Some(digest)));
        if digest.is_some_and(|digest| !is_digest(digest)) {
            return Err(ParseImageError::Digest);
        }
        // A colon before a slash belongs to a port.
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(ParseImageError::Tag);
        }
        let repository = repository(name)?;
        Ok(Self { repository, tag: tag.map(str::to_owned), digest: digest.map(str::to_owned) })
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

/// Registry and name, both written out.
fn repository(name: &str) -> Result<String, ParseImageError> {
    let is_registry =
        |part: &str| part == "localhost" || part.contains(['.', ':']) || part.contains(char::is_uppercase);
    let (registry, name) = match name.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => (DOCKER, name),
    };
    let registry = if registry == OLD_DOCKER { DOCKER } else { registry };
    if !is_host(registry) {
        return Err(ParseImageError::Registry);
    }
    if !name.split('/').all(is_word) {
        return Err(ParseImageError::Repository);
    }
    let library = if registry == DOCKER && !name.contains('/') { "library/" } else { "" };
    Ok(format!("{registry}/{library}{name}"))
}

fn is_host(registry: &str) -> bool {
    // The colons of an address of IPv6 stand in brackets.
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let is_label = |label: &str| {
        !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_address = |address: &str| {
        !address.is_empty() && address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':')
    };
    address.map_or_else(|| host.split('.').all(is_label), is_address)
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Lower-case letters and digits, with one `.`, one or two `_`, or any number of `-` between them.
fn is_word(word: &str) -> bool {
    let is_sign = |c: char| "._-".contains(c);
    let is_edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut between = word.split(is_edge).filter(|signs| !signs.is_empty());
    word.starts_with(is_edge)
        && word.ends_with(is_edge)
        && word.chars().all(|c| is_edge(c) || is_sign(c))
        && between.all(|signs| matches!(signs, "." | "_" | "__") || signs.bytes().all(|byte| byte == b'-'))
}

pub(crate) fn is_tag(tag: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(is_first)
        && tag.bytes().all(|byte| is_first(byte) || b".-".contains(&byte))
}

fn is_digest(digest: &str) -> bool {
    let Some((algorithm, hex)) = digest.split_once(':') else { return false };
    let len = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return false,
    };
    hex.len() == len && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[rstest]
    #[case::name("redis", "docker.io/library/redis:latest")]
    #[case::tag("redis:7", "docker.io/library/redis:7")]
    #[case::user("bitnami/redis:7.2", "docker.io/bitnami/redis:7.2")]
    #[case::registry("docker.io/redis", "docker.io/library/redis:latest")]
    #[case::old_name("index.docker.io/library/redis", "docker.io/library/redis:latest")]
    #[case::other_registry("ghcr.io/a/b/c", "ghcr.io/a/b/c:latest")]
    #[case::one_word_elsewhere("quay.io/redis:7", "quay.io/redis:7")]
    #[case::port("registry:5000/redis", "registry:5000/redis:latest")]
    #[case::port_and_tag("registry.local:5000/x/redis:7", "registry.local:5000/x/redis:7")]
    #[case::localhost("localhost/redis:1", "localhost/redis:1")]
    #[case::upper_case_registry("REGISTRY/redis", "REGISTRY/redis:latest")]
    #[case::address("[fe80::1]:5000/redis", "[fe80::1]:5000/redis:latest")]
    #[case::words("a/b__c.d-e--f", "docker.io/a/b__c.d-e--f:latest")]
    fn are_made_whole(#[case] text: &str, #[case] whole: &str) {
        let image = ImageReference::parse(text).unwrap();
        assert_eq!(image.to_string(), whole);
        assert_eq!(ImageReference::parse(whole), Ok(image));
    }

    #[test]
    fn a_digest_needs_no_tag() {
        let image = ImageReference::parse(&format!("redis@{DIGEST}")).unwrap();
        assert_eq!((image.tag, image.digest.as_deref()), (None, Some(DIGEST)));
        let image = ImageReference::parse(&format!("redis:7@{DIGEST}")).unwrap();
        assert_eq!(image.to_string(), format!("docker.io/library/redis:7@{DIGEST}"));
    }

    #[rstest]
    #[case("", ParseImageError::Length)]
    #[case("Redis", ParseImageError::Repository)]
    #[case("a//b", ParseImageError::Repository)]
    #[case("a/-b", ParseImageError::Repository)]
    #[case("a..b", ParseImageError::Repository)]
    #[case("a/b c", ParseImageError::Repository)]
    #[case("redis:", ParseImageError::Tag)]
    #[case("redis:-7", ParseImageError::Tag)]
    #[case("redis:7*", ParseImageError::Tag)]
    #[case("redis@sha256:abc", ParseImageError::Digest)]
    #[case("registry:port/redis", ParseImageError::Registry)]
    #[case("a..b/redis", ParseImageError::Registry)]
    // A marker of another project, which is no image that a registry could have.
    #[case("nix:0/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-img.tar/", ParseImageError::Repository)]
    fn are_refused(#[case] text: &str, #[case] error: ParseImageError) {
        assert_eq!(ImageReference::parse(text), Err(error));
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "([a-z0-9./:@-]|.){0,80}") {
            if let Ok(image) = ImageReference::parse(&text) {
                prop_assert_eq!(ImageReference::parse(&image.to_string()), Ok(image));
            }
        }
    }
}
