//! The node's options: a `nix.conf`, with Nix's names, meanings and list syntax.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix_csi_store::conf::{self, Statement};
use nix_csi_store::{Netrc, ParseKeyError, ParseNetrcError, PublicKey, TrustedKeys};
use reqwest::Url;

use crate::gc::Limits;
use crate::substituter::{Largest, Logins, ParseTokensError, without_secrets};

/// Why the options cannot be used. The process stops: nothing is silently replaced by a default.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line that is no setting.
    #[error("line {line}: expected `name = value`")]
    Line {
        /// Which line, from one.
        line: usize,
    },
    /// A value that its option does not take.
    #[error("line {line}, column {column}: `{option}`: {value:?} is not {expected}")]
    Value {
        /// Which line, from one.
        line: usize,
        /// Which character, from one.
        column: usize,
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// A key that is none.
    #[error("line {line}, column {column}: `{option}`")]
    Key {
        /// Which line, from one.
        line: usize,
        /// Which character, from one.
        column: usize,
        /// The option.
        option: String,
        /// What is wrong with it.
        source: ParseKeyError,
    },
}

/// Why this node's credentials cannot be used. No message has any of them in it.
#[derive(Debug, thiserror::Error)]
pub enum LoginsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `netrc-file`.
    #[error("the netrc")]
    Netrc(#[from] ParseNetrcError),
    /// `bearer-tokens-file`.
    #[error(transparent)]
    Tokens(#[from] ParseTokensError),
}

/// The options of a node. Without a file: Nix's own defaults, but for `http-connections`.
#[derive(Clone, PartialEq, Eq)]
pub struct Config {
    /// `substituters`: asked in the order of the priorities that they announce.
    pub substituters: Vec<Url>,
    /// `trusted-public-keys`.
    pub trusted_public_keys: Vec<PublicKey>,
    /// `require-sigs`.
    pub require_sigs: bool,
    /// `http-connections`: 64 here and 25 in Nix, because latency is what a cold start waits for.
    pub http_connections: usize,
    /// `connect-timeout`.
    pub connect_timeout: Duration,
    /// `stalled-download-timeout`.
    pub stalled_download_timeout: Duration,
    /// `download-attempts`.
    pub download_attempts: u32,
    /// `ssl-cert-file`: certificate authorities, instead of those that come with this program.
    pub ssl_cert_file: Option<PathBuf>,
    /// `max-closure-paths` and `max-closure-size`, which Nix does not have.
    pub largest: Largest,
    /// `min-free` and `max-free`: when collection begins, and when it ends.
    pub limits: Limits,
    /// `max-size-limit`, which Nix does not have: the most that a read-write volume may ask for, which then must ask.
    pub max_size_limit: Option<u64>,
    /// `netrc-file`: names and passwords for caches.
    pub netrc_file: Option<PathBuf>,
    /// `bearer-tokens-file`, which Nix does not have: lines of `<host> <token>`.
    pub bearer_tokens_file: Option<PathBuf>,
}

impl fmt::Debug for Config {
    /// Without the passwords that may stand in addresses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let substituters: Vec<_> = self.substituters.iter().map(without_secrets).collect();
        f.debug_struct("Config")
            .field("substituters", &substituters)
            .field("trusted_public_keys", &self.trusted_public_keys)
            .field("require_sigs", &self.require_sigs)
            .finish_non_exhaustive()
    }
}

impl Default for Config {
    fn default() -> Self {
        let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        Self {
            substituters: Url::parse("https://cache.nixos.org/").into_iter().collect(),
            trusted_public_keys: key.parse().into_iter().collect(),
            require_sigs: true,
            http_connections: 64,
            connect_timeout: Duration::from_secs(15),
            stalled_download_timeout: Duration::from_mins(5),
            download_attempts: 5,
            ssl_cert_file: None,
            largest: Largest::default(),
            limits: Limits::default(),
            max_size_limit: None,
            netrc_file: None,
            bearer_tokens_file: None,
        }
    }
}

/// One line, with what its errors need.
struct Setting<'a>(conf::Setting<'a>);

impl<'a> Setting<'a> {
    fn bad(&self, value: &str, expected: &'static str) -> ConfigError {
        ConfigError::Value {
            line: self.0.line,
            column: self.0.column,
            option: self.0.name.to_owned(),
            value: value.to_owned(),
            expected,
        }
    }

    fn words(&self) -> impl Iterator<Item = &'a str> {
        self.0.words().map(|(_, word)| word)
    }

    fn number<N: std::str::FromStr>(&self) -> Result<N, ConfigError> {
        self.0.value.parse().map_err(|_| self.bad(self.0.value, "a number"))
    }

    fn seconds(&self) -> Result<Duration, ConfigError> {
        self.number().map(Duration::from_secs)
    }

    /// As Nix reads it: with K, M, G or T behind the number if that is wanted.
    fn bytes(&self) -> Result<u64, ConfigError> {
        let value = self.0.value;
        let (digits, shift) = match value.chars().last().map(|unit| unit.to_ascii_uppercase()) {
            Some('K') => (&value[..value.len() - 1], 10),
            Some('M') => (&value[..value.len() - 1], 20),
            Some('G') => (&value[..value.len() - 1], 30),
            Some('T') => (&value[..value.len() - 1], 40),
            _ => (value, 0),
        };
        let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        bytes.ok_or_else(|| self.bad(value, "a number of bytes"))
    }

    fn bool(&self) -> Result<bool, ConfigError> {
        match self.0.value {
            "true" | "yes" | "1" => Ok(true),
            "false" | "no" | "0" => Ok(false),
            value => Err(self.bad(value, "true or false")),
        }
    }

    /// Nothing, as without the option, if it is empty.
    fn file(&self) -> Option<PathBuf> {
        Some(PathBuf::from(self.0.value)).filter(|path| !path.as_os_str().is_empty())
    }

    fn caches(&self) -> Result<Vec<Url>, ConfigError> {
        self.words()
            .map(|word| {
                let url =
                    Url::parse(word).ok().filter(|url| matches!(url.scheme(), "http" | "https" | "file"));
                // What stands before an `@` may be a password.
                let shown = || word.rsplit_once('@').map_or(word, |(_, behind)| behind);
                url.ok_or_else(|| self.bad(shown(), "the http, https or file address of a binary cache"))
            })
            .collect()
    }

    fn keys(&self) -> Result<Vec<PublicKey>, ConfigError> {
        let key = |word: &str| {
            word.parse().map_err(|source| ConfigError::Key {
                line: self.0.line,
                column: self.0.column,
                option: self.0.name.to_owned(),
                source,
            })
        };
        self.words().map(key).collect()
    }
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let (config, unknown) = Self::parse(&text)?;
        for option in unknown {
            tracing::warn!(option, path = %path.display(), "this option means nothing to a node");
        }
        Ok(config)
    }

    /// Reads options over the defaults; also gives back the names of those that mean nothing here.
    pub fn parse(text: &str) -> Result<(Self, Vec<String>), ConfigError> {
        let mut config = Self::default();
        let mut unknown = Vec::new();
        for statement in conf::statements(text) {
            let setting = match statement {
                Ok(Statement::Setting(setting)) => Setting(setting),
                Ok(Statement::Include(include)) => return Err(ConfigError::Line { line: include.line }),
                Err(error) => return Err(ConfigError::Line { line: error.line() }),
            };
            match setting.0.name {
                "substituters" => config.substituters = setting.caches()?,
                "extra-substituters" => config.substituters.extend(setting.caches()?),
                "trusted-public-keys" => config.trusted_public_keys = setting.keys()?,
                "extra-trusted-public-keys" => config.trusted_public_keys.extend(setting.keys()?),
                "require-sigs" => config.require_sigs = setting.bool()?,
                "http-connections" => config.http_connections = setting.number()?,
                "connect-timeout" => config.connect_timeout = setting.seconds()?,
                "stalled-download-timeout" => config.stalled_download_timeout = setting.seconds()?,
                "download-attempts" => config.download_attempts = setting.number()?,
                "ssl-cert-file" => config.ssl_cert_file = setting.file(),
                "max-closure-paths" => config.largest.paths = setting.number()?,
                "max-closure-size" => config.largest.bytes = setting.bytes()?,
                "min-free" => config.limits.min_free = Some(setting.bytes()?),
                "max-free" => config.limits.max_free = Some(setting.bytes()?),
                "max-size-limit" => config.max_size_limit = Some(setting.bytes()?),
                "netrc-file" => config.netrc_file = setting.file(),
                "bearer-tokens-file" => config.bearer_tokens_file = setting.file(),
                option => unknown.push(option.to_owned()),
            }
        }
        Ok((config, unknown))
    }

    /// Who this node is to which host, read from the files that say so.
    pub fn logins(&self) -> Result<Logins, LoginsError> {
        let read = |path: &Option<PathBuf>| match path {
            Some(path) => {
                fs::read_to_string(path).map_err(|source| LoginsError::Read { path: path.clone(), source })
            }
            None => Ok(String::new()),
        };
        Ok(Logins::new(Netrc::parse(&read(&self.netrc_file)?)?, &read(&self.bearer_tokens_file)?)?)
    }

    /// The keys, ready to verify with.
    pub fn trusted_keys(&self) -> TrustedKeys {
        self.trusted_public_keys.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn options_are_read_over_the_defaults() {
        let text = "# a comment\n\nsubstituters = http://a/ https://b/x\nextra-trusted-public-keys =\nrequire-sigs = false # why\nhttp-connections = 8\nmax-jobs = 4\n";
        let (config, unknown) = Config::parse(text).unwrap();
        assert_eq!(
            config.substituters.iter().map(Url::as_str).collect::<Vec<_>>(),
            ["http://a/", "https://b/x"]
        );
        assert_eq!((config.require_sigs, config.http_connections), (false, 8));
        assert_eq!(config.trusted_public_keys, Config::default().trusted_public_keys);
        assert_eq!(unknown, ["max-jobs"]);
        let (config, _) = Config::parse("max-closure-paths = 10\nmax-closure-size = 2g").unwrap();
        assert_eq!(config.largest, Largest { paths: 10, bytes: 2 << 30 });
        let (config, _) = Config::parse("min-free = 5G\nmax-free = 1024").unwrap();
        assert_eq!(config.limits, Limits { min_free: Some(5 << 30), max_free: Some(1024) });
        assert_eq!(config.max_size_limit, None);
        assert_eq!(Config::parse("max-size-limit = 1G").unwrap().0.max_size_limit, Some(1 << 30));
    }

    #[rstest]
    #[case::no_equals("substituters", "line 1: expected `name = value`")]
    #[case::not_a_cache(
        "\nsubstituters =  s3://x",
        "line 2, column 17: `substituters`: \"s3://x\" is not the http, https or file address of a binary cache"
    )]
    #[case::not_a_bool(
        "require-sigs = maybe",
        "line 1, column 16: `require-sigs`: \"maybe\" is not true or false"
    )]
    #[case::not_a_number(
        "http-connections = -1",
        "line 1, column 20: `http-connections`: \"-1\" is not a number"
    )]
    #[case::not_a_size("min-free = 5X", "line 1, column 12: `min-free`: \"5X\" is not a number of bytes")]
    #[case::not_a_key("trusted-public-keys = abc", "line 1, column 23: `trusted-public-keys`")]
    fn errors_name_line_and_column(#[case] text: &str, #[case] message: &str) {
        assert_eq!(Config::parse(text).unwrap_err().to_string(), message);
    }
}
