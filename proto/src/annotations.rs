//! The annotations (and one label) that people write, and the one that is written back.
//!
//! Whatever stands behind `nix.lillecarl.com/` and is not listed here is refused by name: a misspelt key
//! that is silently ignored costs an afternoon.

/// What every key of ours begins with.
pub const PREFIX: &str = "nix.lillecarl.com/";

/// References of the packages for the chosen containers, or a JSON object of such lists by container.
pub const PACKAGES: &str = "nix.lillecarl.com/packages";
/// Which containers, separated by commas; `*` is all of `spec.containers`.
pub const CONTAINERS: &str = "nix.lillecarl.com/containers";
/// `distroless`, `keep`, or an image.
pub const IMAGE: &str = "nix.lillecarl.com/image";
/// Entry point of containers that have no command: a program name or a JSON array.
pub const COMMAND: &str = "nix.lillecarl.com/command";
/// `ro` or `rw`.
pub const MODE: &str = "nix.lillecarl.com/mode";
/// The Secret of the pod's namespace with credentials for caches.
pub const CACHE_SECRET: &str = "nix.lillecarl.com/cache-secret";
/// How much a read-write volume may hold, as a quantity.
pub const SIZE_LIMIT: &str = "nix.lillecarl.com/size-limit";
/// `enabled` or `disabled`: whether store paths in the pod's text are looked for.
pub const FARM: &str = "nix.lillecarl.com/farm";
/// `enabled` or `disabled`: on a Namespace as label, elsewhere as annotation.
pub const INJECT: &str = "nix.lillecarl.com/inject";
/// A taint, not an annotation: on a node until its driver is registered.
pub const STARTUP_TAINT: &str = "nix.lillecarl.com/agent-not-ready";
/// Written by the webhook: what it did. A record, never a permission.
pub const STATUS: &str = "nix.lillecarl.com/status";

/// A key of ours, told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// [`PACKAGES`], or for one container: `packages.<container>`.
    Packages(Option<&'a str>),
    /// [`COMMAND`], or for one container: `command.<container>`.
    Command(Option<&'a str>),
    /// [`CONTAINERS`].
    Containers,
    /// [`IMAGE`].
    Image,
    /// [`MODE`].
    Mode,
    /// [`CACHE_SECRET`].
    CacheSecret,
    /// [`SIZE_LIMIT`].
    SizeLimit,
    /// [`FARM`].
    Farm,
    /// [`INJECT`].
    Inject,
    /// [`STATUS`].
    Status,
    /// Ours by prefix, and unknown.
    Unknown,
}

impl<'a> Key<'a> {
    /// Which key of ours this is; `None` if it is somebody else's.
    pub fn parse(key: &'a str) -> Option<Self> {
        let name = key.strip_prefix(PREFIX)?;
        Some(match name {
            "packages" => Self::Packages(None),
            "command" => Self::Command(None),
            "containers" => Self::Containers,
            "image" => Self::Image,
            "mode" => Self::Mode,
            "cache-secret" => Self::CacheSecret,
            "size-limit" => Self::SizeLimit,
            "farm" => Self::Farm,
            "inject" => Self::Inject,
            "status" => Self::Status,
            _ => match name.split_once('.') {
                Some(("packages", container)) => Self::Packages(Some(container)),
                Some(("command", container)) => Self::Command(Some(container)),
                _ => Self::Unknown,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("nix.lillecarl.com/packages", Some(Key::Packages(None)))]
    #[case("nix.lillecarl.com/packages.web", Some(Key::Packages(Some("web"))))]
    #[case("nix.lillecarl.com/command.a.b", Some(Key::Command(Some("a.b"))))]
    #[case("nix.lillecarl.com/package", Some(Key::Unknown))]
    #[case("kubernetes.io/packages", None)]
    fn keys(#[case] key: &str, #[case] expected: Option<Key<'_>>) {
        assert_eq!(Key::parse(key), expected);
    }
}
