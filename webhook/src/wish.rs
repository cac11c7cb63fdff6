//! What the annotations of one object say, before anybody looks at its containers.

use std::collections::BTreeMap;

use nix_csi_proto::annotations::{self, Key};
use nix_csi_proto::{ParseReferencesError, References, parse_quantity};

/// Why annotations cannot be understood. Stands alone: it is read far away from the author's editor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WishError {
    /// A list of references that cannot be read.
    #[error("annotation {key}, {source}")]
    References {
        /// The annotation.
        key: String,
        /// What is wrong with it.
        source: ParseReferencesError,
    },
    /// A list without a reference.
    #[error(
        "annotation {key} is empty; to keep nix-csi away from a pod, set {}: disabled",
        annotations::INJECT
    )]
    Empty {
        /// The annotation.
        key: String,
    },
    /// A value that its annotation does not take.
    #[error("annotation {key}: {value:?} is not {expected}")]
    Value {
        /// The annotation.
        key: String,
        /// Its value, shortened.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// Ours by prefix, and unknown.
    #[error("annotation {0} is not known; check its spelling")]
    Unknown(String),
    /// Lists for the same container in two places.
    #[error("container {container} has packages in {} and again in {key}; keep one", annotations::PACKAGES)]
    Twice {
        /// Which container.
        container: String,
        /// The second place.
        key: String,
    },
}

/// Which containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Every entry of `spec.containers`.
    All,
    /// These, wherever they stand.
    Named(Vec<String>),
}

/// What becomes of a container's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// The configured image with nothing to run in it.
    Distroless,
    /// It stays.
    Keep,
    /// This one.
    Own(String),
}

/// Whether a pod may write below `/nix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It may not.
    ReadOnly,
    /// It may, and nobody else sees it.
    ReadWrite,
}

/// What a container without a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A program of the packages.
    Program(String),
    /// The whole command.
    Exact(Vec<String>),
}

/// What the annotations of an object say, or those of several together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wish {
    /// `inject`, if it says so. If it is false, nothing else counts, and nothing else was read.
    pub inject: Option<bool>,
    /// For containers without a list of their own.
    pub packages: Option<References>,
    /// By container.
    pub packages_of: BTreeMap<String, References>,
    /// Which containers, if it says so.
    pub containers: Option<Selection>,
    /// What becomes of the images, if it says so.
    pub image: Option<Image>,
    /// For containers without one of their own.
    pub command: Option<Command>,
    /// By container.
    pub command_of: BTreeMap<String, Command>,
    /// Whether the pod may or may not write below `/nix`, if it says so.
    pub mode: Option<Mode>,
    /// The Secret that kubelet hands to the node, with credentials for caches.
    pub cache_secret: Option<String>,
    /// Whether store paths are to be found in the pod's text, if it says so.
    pub farm: Option<bool>,
    /// How much it may write, as it was written.
    pub size_limit: Option<String>,
}

impl Wish {
    /// Reads all annotations of ours; others are skipped.
    pub fn parse<'a>(all: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, WishError> {
        let mut wish = Self::default();
        let all: Vec<_> = all.into_iter().collect();
        // Whoever wants nothing need not get the rest right.
        if all.iter().any(|(key, value)| *key == annotations::INJECT && switch(value) == Some(false)) {
            wish.inject = Some(false);
            return Ok(wish);
        }
        for (key, value) in all {
            let bad = |expected| WishError::Value {
                key: key.to_owned(),
                value: value.chars().take(100).collect(),
                expected,
            };
            match Key::parse(key) {
                None | Some(Key::Status) => {}
                Some(Key::Unknown) => return Err(WishError::Unknown(key.to_owned())),
                Some(Key::Packages(None)) => wish.parse_packages(key, value)?,
                Some(Key::Packages(Some(container))) => {
                    let list = references(key, value)?;
                    wish.add_packages(key, container, list)?;
                }
                Some(Key::Containers) => {
                    let names = selection(value).ok_or_else(|| bad("a list of container names, or *"))?;
                    wish.containers = Some(names);
                }
                Some(Key::Image) => {
                    wish.image = Some(image(value).ok_or_else(|| bad("distroless, keep, or an image"))?);
                }
                Some(Key::Command(None)) => wish.command = Some(command(value).ok_or_else(|| bad(COMMAND))?),
                Some(Key::Command(Some(container))) => {
                    let command = command(value).ok_or_else(|| bad(COMMAND))?;
                    wish.command_of.insert(container.to_owned(), command);
                }
                Some(Key::Mode) => {
                    wish.mode = match value.trim() {
                        "ro" => Some(Mode::ReadOnly),
                        "rw" => Some(Mode::ReadWrite),
                        _ => return Err(bad("ro or rw")),
                    }
                }
                Some(Key::CacheSecret) => {
                    let name =
                        object_name(value).ok_or_else(|| bad("the name of a Secret of this namespace"))?;
                    wish.cache_secret = Some(name);
                }
                Some(Key::SizeLimit) => {
                    let limit = value.trim();
                    parse_quantity(limit).ok_or_else(|| bad("a quantity like 500Mi"))?;
                    wish.size_limit = Some(limit.to_owned());
                }
                Some(Key::Farm) => wish.farm = Some(switch(value).ok_or_else(|| bad(SWITCH))?),
                Some(Key::Inject) => wish.inject = Some(switch(value).ok_or_else(|| bad(SWITCH))?),
            }
        }
        Ok(wish)
    }

    /// What this says, and where it says nothing, what `farther` says. Packages are never put together of two.
    #[must_use]
    pub fn or(self, farther: Self) -> Self {
        let (packages, packages_of) = if self.wants_packages() {
            (self.packages, self.packages_of)
        } else {
            (farther.packages, farther.packages_of)
        };
        let mut command_of = farther.command_of;
        command_of.extend(self.command_of);
        Self {
            inject: self.inject.or(farther.inject),
            packages,
            packages_of,
            containers: self.containers.or(farther.containers),
            image: self.image.or(farther.image),
            command: self.command.or(farther.command),
            command_of,
            mode: self.mode.or(farther.mode),
            cache_secret: self.cache_secret.or(farther.cache_secret),
            farm: self.farm.or(farther.farm),
            // Whoever writes nothing needs no limit.
            size_limit: self.size_limit.or(farther.size_limit.filter(|_| self.mode != Some(Mode::ReadOnly))),
        }
    }

    /// Every container that is named, with the annotation that does it.
    pub fn named(&self) -> impl Iterator<Item = (String, &str)> {
        let selected = match &self.containers {
            Some(Selection::Named(names)) => names.as_slice(),
            Some(Selection::All) | None => &[],
        };
        let of = |key: &'static str| move |name: &String| format!("{key}.{name}");
        let selected = selected.iter().map(|name| (annotations::CONTAINERS.to_owned(), name.as_str()));
        let packages =
            self.packages_of.keys().map(move |name| (of(annotations::PACKAGES)(name), name.as_str()));
        let commands =
            self.command_of.keys().map(move |name| (of(annotations::COMMAND)(name), name.as_str()));
        selected.chain(packages).chain(commands)
    }

    /// Forgets what it says about other containers.
    pub fn keep_containers(&mut self, keep: impl Fn(&str) -> bool) {
        if let Some(Selection::Named(names)) = &mut self.containers {
            names.retain(|name| keep(name));
        }
        self.packages_of.retain(|name, _| keep(name));
        self.command_of.retain(|name, _| keep(name));
    }

    /// Whether the pod may write below `/nix`.
    pub fn read_write(&self) -> bool {
        self.mode == Some(Mode::ReadWrite)
    }

    /// Whether there is a list of packages at all.
    pub fn wants_packages(&self) -> bool {
        self.packages.is_some() || !self.packages_of.is_empty()
    }

    fn parse_packages(&mut self, key: &str, value: &str) -> Result<(), WishError> {
        if !value.trim_start().starts_with('{') {
            self.packages = Some(references(key, value)?);
            return Ok(());
        }
        let expected = "a JSON object of lists, by container or for *";
        let by_container: BTreeMap<String, Vec<String>> = serde_json::from_str(value).map_err(|_| {
            WishError::Value { key: key.to_owned(), value: value.chars().take(100).collect(), expected }
        })?;
        for (container, list) in by_container {
            let list = references(key, &serde_json::json!(list).to_string())?;
            if container == "*" {
                self.packages = Some(list);
            } else {
                self.add_packages(key, &container, list)?;
            }
        }
        if self.wants_packages() { Ok(()) } else { Err(WishError::Empty { key: key.to_owned() }) }
    }

    fn add_packages(&mut self, key: &str, container: &str, list: References) -> Result<(), WishError> {
        match self.packages_of.insert(container.to_owned(), list) {
            None => Ok(()),
            Some(_) => Err(WishError::Twice { container: container.to_owned(), key: key.to_owned() }),
        }
    }
}

const COMMAND: &str = "the name of a program, or a JSON array of strings";
const SWITCH: &str = "enabled or disabled";

fn references(key: &str, value: &str) -> Result<References, WishError> {
    let list =
        References::parse(value).map_err(|source| WishError::References { key: key.to_owned(), source })?;
    if list.is_empty() { Err(WishError::Empty { key: key.to_owned() }) } else { Ok(list) }
}

fn selection(value: &str) -> Option<Selection> {
    let names: Vec<_> = value.split([',', ' ', '\n', '\t']).filter(|name| !name.is_empty()).collect();
    match names[..] {
        [] => None,
        ["*"] => Some(Selection::All),
        _ if names.contains(&"*") => None,
        _ => Some(Selection::Named(names.into_iter().map(str::to_owned).collect())),
    }
}

fn image(value: &str) -> Option<Image> {
    match value.trim() {
        "distroless" => Some(Image::Distroless),
        "keep" => Some(Image::Keep),
        own if !own.is_empty() && !own.contains(char::is_whitespace) => Some(Image::Own(own.to_owned())),
        _ => None,
    }
}

fn command(value: &str) -> Option<Command> {
    let value = value.trim();
    if value.starts_with('[') {
        let exact: Vec<String> = serde_json::from_str(value).ok()?;
        return exact.first().is_some_and(|program| !program.is_empty()).then_some(Command::Exact(exact));
    }
    let is_program = !value.is_empty()
        && !value.contains(char::is_whitespace)
        && !value.split('/').any(|part| matches!(part, "" | "." | ".."));
    is_program.then(|| Command::Program(value.to_owned()))
}

/// A name that the API server takes for a Secret.
fn object_name(value: &str) -> Option<String> {
    let name = value.trim();
    let is_part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.ends_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    (name.len() <= 253 && name.split('.').all(is_part)).then(|| name.to_owned())
}

fn switch(value: &str) -> Option<bool> {
    match value.trim() {
        "enabled" => Some(true),
        "disabled" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const A: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a-1.0";

    fn wish(key: &str, value: &str) -> Result<Wish, WishError> {
        Wish::parse([(format!("nix.lillecarl.com/{key}").as_str(), value), ("other.io/mode", "?")])
    }

    #[test]
    fn packages_for_all_and_by_container() {
        assert!(wish("packages", A).unwrap().packages.is_some());
        assert!(wish("packages.web", A).unwrap().packages_of.contains_key("web"));
        let object = wish("packages", &format!("{{\"*\": [\"{A}\"], \"a-long-name\": [\"{A}\"]}}")).unwrap();
        assert!(object.packages.is_some() && object.packages_of.contains_key("a-long-name"));
    }

    #[rstest]
    #[case("command", "hello", Command::Program("hello".into()))]
    #[case("command", "bin/hello", Command::Program("bin/hello".into()))]
    #[case("command", "[\"a\", \"b c\"]", Command::Exact(vec!["a".into(), "b c".into()]))]
    fn commands(#[case] key: &str, #[case] value: &str, #[case] command: Command) {
        assert_eq!(wish(key, value).unwrap().command, Some(command));
    }

    #[rstest]
    #[case(
        "packages",
        "",
        "annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled"
    )]
    #[case(
        "packages",
        "# only a comment",
        "annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled"
    )]
    #[case(
        "packages",
        "{}",
        "annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled"
    )]
    #[case(
        "packages",
        "x\nhello",
        "annotation nix.lillecarl.com/packages, line 1, column 1: \"x\" is not a store path; expected /nix/store/<hash>-<name>"
    )]
    #[case(
        "packages",
        "{\"web\": 1}",
        "annotation nix.lillecarl.com/packages: \"{\\\"web\\\": 1}\" is not a JSON object of lists, by container or for *"
    )]
    #[case("package", "x", "annotation nix.lillecarl.com/package is not known; check its spelling")]
    #[case(
        "cache-secret",
        "a/b",
        "annotation nix.lillecarl.com/cache-secret: \"a/b\" is not the name of a Secret of this namespace"
    )]
    #[case(
        "cache-secret",
        "",
        "annotation nix.lillecarl.com/cache-secret: \"\" is not the name of a Secret of this namespace"
    )]
    #[case(
        "size-limit",
        "much",
        "annotation nix.lillecarl.com/size-limit: \"much\" is not a quantity like 500Mi"
    )]
    #[case("mode", "RW", "annotation nix.lillecarl.com/mode: \"RW\" is not ro or rw")]
    #[case("inject", "false", "annotation nix.lillecarl.com/inject: \"false\" is not enabled or disabled")]
    #[case(
        "containers",
        " ",
        "annotation nix.lillecarl.com/containers: \" \" is not a list of container names, or *"
    )]
    #[case(
        "image",
        "a b",
        "annotation nix.lillecarl.com/image: \"a b\" is not distroless, keep, or an image"
    )]
    #[case(
        "command",
        "[]",
        "annotation nix.lillecarl.com/command: \"[]\" is not the name of a program, or a JSON array of strings"
    )]
    #[case(
        "command",
        "../x",
        "annotation nix.lillecarl.com/command: \"../x\" is not the name of a program, or a JSON array of strings"
    )]
    fn errors_stand_alone(#[case] key: &str, #[case] value: &str, #[case] message: &str) {
        assert_eq!(wish(key, value).unwrap_err().to_string(), message);
    }
}
