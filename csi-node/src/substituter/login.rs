//! Who this node is to which host.

use std::collections::BTreeMap;
use std::sync::Arc;

use data_encoding::BASE64;
use nix_csi_store::Netrc;
use nix_csi_store::ParseNetrcError;
use reqwest::Url;
use reqwest::header::HeaderValue;
use ring::digest::{Context, SHA256};

/// Names and passwords, and tokens, by host. Never printed.
#[derive(Default)]
pub struct Logins {
    netrc: Netrc,
    tokens: BTreeMap<String, String>,
}

/// A line of a file of tokens that is not `<host> <token>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {0} of the bearer tokens is not `<host> <token>`")]
pub struct ParseTokensError(usize);

impl Logins {
    /// From a netrc, and from lines `<host> <token>`, where `#` begins a comment line.
    pub fn new(netrc: Netrc, tokens: &str) -> Result<Self, ParseTokensError> {
        let mut by_host = BTreeMap::new();
        for (n, line) in tokens.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_ascii_whitespace();
            let (Some(host), Some(token), None) = (words.next(), words.next(), words.next()) else {
                return Err(ParseTokensError(n + 1));
            };
            by_host.insert(host.to_ascii_lowercase(), token.to_owned());
        }
        Ok(Self { netrc, tokens: by_host })
    }

    /// What to say to the host of `url`. The client drops it when it is sent on to another host.
    pub(super) fn header(&self, url: &Url) -> Option<HeaderValue> {
        // What stands in the address itself is the client's to send.
        if !url.username().is_empty() || url.password().is_some() {
            return None;
        }
        let host = url.host_str()?;
        let with_port = url.port().map(|port| format!("{host}:{port}"));
        let mut names = with_port.as_deref().into_iter().chain([host]);
        let text = if let Some(token) = names.find_map(|name| self.tokens.get(name)) {
            format!("Bearer {token}")
        } else {
            let login = self.netrc.find(host)?;
            let (name, password) = (login.login().unwrap_or_default(), login.password().unwrap_or_default());
            format!("Basic {}", BASE64.encode(format!("{name}:{password}").as_bytes()))
        };
        let mut value = HeaderValue::from_str(&text).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl std::fmt::Debug for Logins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logins").field("hosts", &self.tokens.keys()).finish_non_exhaustive()
    }
}

/// What a volume's own secret says: logins, and a name for exactly these.
#[derive(Clone)]
pub struct Credentials {
    pub(super) logins: Arc<Logins>,
    pub(super) id: CredentialsId,
}

/// The hash of credentials: the same for two volumes whose secrets say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CredentialsId([u8; 32]);

/// Why a volume's secret cannot be used. No message has any of it in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseCredentialsError {
    /// Nothing that is known.
    #[error("the volume's secret has neither `{NETRC}` nor `{BEARER_TOKENS}`")]
    Empty,
    /// The netrc.
    #[error("`{NETRC}` of the volume's secret")]
    Netrc(#[from] ParseNetrcError),
    /// The tokens.
    #[error("`{BEARER_TOKENS}` of the volume's secret")]
    Tokens(#[from] ParseTokensError),
}

/// Keys of a volume's secret. Others may be there for somebody else.
const NETRC: &str = "netrc";
const BEARER_TOKENS: &str = "bearer-tokens";

impl Credentials {
    /// From what a secret holds under its keys; `None` if there is no secret.
    pub fn parse<'a>(secret: impl Fn(&str) -> Option<&'a str>) -> Result<Self, ParseCredentialsError> {
        let (netrc, tokens) = (secret(NETRC), secret(BEARER_TOKENS));
        if netrc.is_none() && tokens.is_none() {
            return Err(ParseCredentialsError::Empty);
        }
        let (netrc, tokens) = (netrc.unwrap_or_default(), tokens.unwrap_or_default());
        let mut id = Context::new(&SHA256);
        // Where one ends and the other begins must not be movable.
        id.update(&(netrc.len() as u64).to_le_bytes());
        id.update(netrc.as_bytes());
        id.update(tokens.as_bytes());
        let mut hash = [0; 32];
        hash.copy_from_slice(id.finish().as_ref());
        let logins = Arc::new(Logins::new(Netrc::parse(netrc)?, tokens)?);
        Ok(Self { logins, id: CredentialsId(hash) })
    }
}

impl PartialEq for Credentials {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Credentials {}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not even the hash: it would say whether a guess is right.
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::token("https://a.example/x", Some("Bearer secret-a"))]
    #[case::token_of_that_port("https://a.example:8443/", Some("Bearer secret-port"))]
    #[case::password("http://b.example/", Some("Basic bWU6c2VjcmV0"))]
    #[case::nobody("https://c.example/", None)]
    #[case::in_the_address("https://x:y@a.example/", None)]
    fn each_host_hears_its_own(#[case] url: &str, #[case] expected: Option<&str>) {
        let netrc = Netrc::parse("machine b.example login me password secret").unwrap();
        let tokens = "# ours\nA.example secret-a\na.example:8443 secret-port\n";
        let logins = Logins::new(netrc, tokens).unwrap();
        let header = logins.header(&url.parse().unwrap());
        assert_eq!(header.as_ref().map(|value| value.to_str().unwrap()), expected);
        assert!(header.is_none_or(|value| value.is_sensitive()));
    }

    #[rstest]
    #[case::nothing(&[], Err("the volume's secret has neither `netrc` nor `bearer-tokens`"))]
    #[case::something_else(&[("password", "secret")], Err("the volume's secret has neither `netrc` nor `bearer-tokens`"))]
    #[case::netrc(&[("netrc", "machine a.example password secret"), ("other", "x")], Ok("Basic OnNlY3JldA=="))]
    #[case::tokens(&[("bearer-tokens", "a.example secret")], Ok("Bearer secret"))]
    #[case::bad_netrc(&[("netrc", "machine")], Err("`netrc` of the volume's secret: line 1: nothing follows `machine`"))]
    #[case::bad_tokens(&[("bearer-tokens", "secret")], Err("`bearer-tokens` of the volume's secret: line 1 of the bearer tokens is not `<host> <token>`"))]
    fn a_secret_says_who_the_volume_is(
        #[case] secret: &[(&str, &'static str)],
        #[case] expected: Result<&str, &str>,
    ) {
        let find = |key: &str| secret.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
        let found = Credentials::parse(find);
        let text = format!("{found:?}");
        assert!(!text.contains("secret\"") && !text.contains("OnNl"), "{text}");
        let header = found.map(|found| found.logins.header(&"http://a.example".parse().unwrap()).unwrap());
        let chain = |error: ParseCredentialsError| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        };
        let header = header.map_err(chain);
        assert_eq!(header.as_ref().map(|value| value.to_str().unwrap()).map_err(String::as_str), expected);
    }

    #[test]
    fn other_credentials_are_another_scope() {
        let parse = |netrc: &'static str, tokens: &'static str| {
            Credentials::parse(|key| Some(if key == NETRC { netrc } else { tokens })).unwrap()
        };
        assert_eq!(parse("machine a password b", ""), parse("machine a password b", ""));
        assert_ne!(parse("machine a password b", ""), parse("machine a password c", ""));
        assert_ne!(parse("#", "#\na b"), parse("##\na b", ""));
    }

    #[test]
    fn a_line_without_a_token_is_an_error() {
        assert_eq!(Logins::new(Netrc::default(), "\na.example\n").unwrap_err(), ParseTokensError(2));
    }
}
