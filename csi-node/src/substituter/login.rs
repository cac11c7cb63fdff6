//! Who this node is to which host.

use std::collections::BTreeMap;

use data_encoding::BASE64;
use nix_csi_store::Netrc;
use reqwest::Url;
use reqwest::header::HeaderValue;

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

    #[test]
    fn a_line_without_a_token_is_an_error() {
        assert_eq!(Logins::new(Netrc::default(), "\na.example\n").unwrap_err(), ParseTokensError(2));
    }
}
