//! `volumeAttributes` of a CSI volume: written by the webhook or by hand, read by the node.

use std::collections::BTreeMap;

use nix_csi_store::StorePath;

use crate::quantity::parse_quantity;
use crate::references::{ParseReferencesError, References};
use crate::system::System;

/// Store paths for nodes of any system.
pub const PATHS: &str = "paths";
/// Store paths that the volume can do without.
pub const OPTIONAL_PATHS: &str = "optionalPaths";
/// What the first part of `entrypoint.<container>` is.
pub const ENTRYPOINT: &str = "entrypoint";
/// The value of an entry point that the node is to find by itself.
pub const ENTRYPOINT_AUTO: &str = "auto";
/// Whether the view has a Nix database of its closure.
pub const DATABASE: &str = "database";
/// How much a pod may write, as a quantity.
pub const SIZE_LIMIT: &str = "sizeLimit";
/// Where a pod's writes are kept, as for an `emptyDir`.
pub const MEDIUM: &str = "medium";
/// Where the link to a container's entry point is, as the container sees it.
pub const ENTRY_DIR: &str = "/nix/var/entry";
/// The merged packages, as the container sees them.
pub const RESULT: &str = "/nix/var/result";

/// What kubelet adds, over whatever the pod's author wrote under these names.
pub const KUBELET_PREFIX: &str = "csi.storage.k8s.io/";
/// The pod's name.
pub const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
/// The pod's namespace.
pub const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
/// The pod's uid.
pub const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
/// `true` for an inline volume.
pub const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

/// Keys of the upstream project that ask a node to evaluate or build.
const EVALUATED: [&str; 4] = ["flakeRef", "nixExpr", "expression", "expr"];

/// Why volume attributes cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseAttributesError {
    /// A list of references that cannot be read.
    #[error("volume attribute `{key}`: {source}")]
    References {
        /// The attribute.
        key: String,
        /// What is wrong with it.
        source: ParseReferencesError,
    },
    /// A value that its attribute does not take.
    #[error("volume attribute `{key}`: {value:?} is not {expected}")]
    Value {
        /// The attribute.
        key: String,
        /// Its value.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// An attribute that asks a node to evaluate Nix.
    #[error(
        "volume attribute `{0}` asks the node to evaluate Nix, which it never does; \
         build the package elsewhere, push it to a binary cache and name its store path in `paths`"
    )]
    Evaluated(String),
    /// An attribute that this node does not know.
    #[error(
        "volume attribute `{0}` is not known here; check its spelling, or upgrade the node driver on this node"
    )]
    Unknown(String),
    /// No attribute names a store path.
    #[error("no volume attribute names a store path; set `paths`")]
    NoPaths,
    /// Nobody knows how much memory.
    #[error("volume attribute `{MEDIUM}`: Memory needs `{SIZE_LIMIT}`, which says how much of it")]
    MemoryWithoutLimit,
    /// Paths, but only for other systems.
    #[error("this node is {node}, and the volume has paths only for {}", .present.join(", "))]
    OtherSystem {
        /// The node's system.
        node: System,
        /// Systems that there are paths for.
        present: Vec<String>,
    },
}

/// What a container without a command runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Entrypoint {
    /// The first package's only program, or the one named like the package.
    Auto,
    /// A program of the packages: `hello`, or below the first package: `bin/hello`.
    Program(String),
}

/// Whether a view has Nix's own database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Database {
    /// If Nix is in the closure.
    #[default]
    WithNix,
    /// In any case.
    Always,
    /// In none.
    Never,
}

/// Where a pod's writes are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// On the node's disk.
    #[default]
    Disk,
    /// In its memory.
    Memory,
}

/// The attributes of one volume, for a node of one system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeAttributes {
    /// The packages, in their order: earlier ones win where two have the same file.
    pub paths: Vec<StorePath>,
    /// More of them, behind the others, as far as they can be had. None of `paths`.
    pub optional: Vec<StorePath>,
    /// Entry points by container.
    pub entrypoints: BTreeMap<String, Entrypoint>,
    /// Whether there is a Nix database.
    pub database: Database,
    /// How many bytes the pod may write, if it says so.
    pub size_limit: Option<u64>,
    /// Where it writes.
    pub medium: Medium,
}

impl VolumeAttributes {
    /// Reads the attributes as a node of `system` must; kubelet's own keys are skipped.
    pub fn parse<'a>(
        attributes: impl IntoIterator<Item = (&'a str, &'a str)>,
        system: System,
    ) -> Result<Self, ParseAttributesError> {
        let mut lists = BTreeMap::new();
        let mut optional = None;
        let mut entrypoints = BTreeMap::new();
        let mut database = Database::default();
        let (mut size_limit, mut medium) = (None, Medium::default());
        for (key, value) in attributes {
            if key.starts_with(KUBELET_PREFIX) {
                continue;
            }
            if key == PATHS || key.parse::<System>().is_ok() {
                lists.insert(key, value);
            } else if key == OPTIONAL_PATHS {
                optional = Some(value);
            } else if let Some((ENTRYPOINT, container)) = key.split_once('.') {
                entrypoints.insert(container.to_owned(), parse_entrypoint(key, container, value)?);
            } else if key == DATABASE {
                database = match value {
                    "true" => Database::Always,
                    "false" => Database::Never,
                    _ => return Err(bad_value(key, value, "`true` or `false`")),
                };
            } else if key == SIZE_LIMIT {
                let bytes = parse_quantity(value.trim());
                size_limit = Some(bytes.ok_or_else(|| bad_value(key, value, "a quantity like 500Mi"))?);
            } else if key == MEDIUM {
                medium = match value {
                    "" => Medium::Disk,
                    "Memory" => Medium::Memory,
                    _ => return Err(bad_value(key, value, "`Memory`, or empty")),
                };
            } else if EVALUATED.contains(&key) {
                return Err(ParseAttributesError::Evaluated(key.to_owned()));
            } else {
                return Err(ParseAttributesError::Unknown(key.to_owned()));
            }
        }
        let own = lists.get_key_value(system.as_str()).or_else(|| lists.get_key_value(PATHS));
        let Some((key, value)) = own else {
            let present: Vec<_> = lists.keys().map(ToString::to_string).collect();
            return Err(if present.is_empty() {
                ParseAttributesError::NoPaths
            } else {
                ParseAttributesError::OtherSystem { node: system, present }
            });
        };
        let paths = parse_paths(key, value, system)?;
        if paths.is_empty() {
            return Err(ParseAttributesError::NoPaths);
        }
        let mut optional = match optional {
            Some(value) => parse_paths(OPTIONAL_PATHS, value, system)?,
            None => Vec::new(),
        };
        optional.retain(|path| !paths.contains(path));
        if medium == Medium::Memory && size_limit.is_none() {
            return Err(ParseAttributesError::MemoryWithoutLimit);
        }
        Ok(Self { paths, optional, entrypoints, database, size_limit, medium })
    }
}

fn bad_value(key: &str, value: &str, expected: &'static str) -> ParseAttributesError {
    ParseAttributesError::Value { key: key.to_owned(), value: value.to_owned(), expected }
}

fn parse_paths(key: &str, value: &str, system: System) -> Result<Vec<StorePath>, ParseAttributesError> {
    let references = References::parse(value)
        .map_err(|source| ParseAttributesError::References { key: key.to_owned(), source })?;
    let mut paths = Vec::new();
    for item in references.items() {
        let path = &item.reference.path;
        if item.system.is_none_or(|of| of == system) && !paths.contains(path) {
            paths.push(path.clone());
        }
    }
    Ok(paths)
}

fn parse_entrypoint(key: &str, container: &str, value: &str) -> Result<Entrypoint, ParseAttributesError> {
    // Both become file names in the view.
    let is_label = |text: &str| {
        !text.is_empty() && text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !is_label(container) {
        return Err(ParseAttributesError::Unknown(key.to_owned()));
    }
    if value == ENTRYPOINT_AUTO {
        return Ok(Entrypoint::Auto);
    }
    if value.is_empty()
        || value.contains('\0')
        || value.split('/').any(|part| matches!(part, "" | "." | ".."))
    {
        let expected = "`auto`, the name of a program, or a path like bin/hello";
        return Err(bad_value(key, value, expected));
    }
    Ok(Entrypoint::Program(value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const A: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a-1.0";
    const B: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-b";

    fn parse(attributes: &[(&str, &str)]) -> Result<VolumeAttributes, ParseAttributesError> {
        VolumeAttributes::parse(attributes.iter().copied(), System::X86_64Linux)
    }

    #[rstest]
    #[case::any_system(&[("paths", A)], &[A])]
    #[case::own_system_is_used_instead(&[("paths", A), ("x86_64-linux", B)], &[B])]
    #[case::other_system_is_not(&[("paths", A), ("aarch64-linux", B)], &[A])]
    #[case::items_for_other_systems(&[("paths", "aarch64-linux=/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-b /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a-1.0")], &[A])]
    #[case::kubelet_adds(&[("paths", A), (POD_NAME, "p"), ("csi.storage.k8s.io/new", "x")], &[A])]
    fn good(#[case] attributes: &[(&str, &str)], #[case] paths: &[&str]) {
        let found: Vec<_> = parse(attributes).unwrap().paths.iter().map(ToString::to_string).collect();
        assert_eq!(found, paths);
    }

    #[rstest]
    #[case::behind_the_others(B, &[B])]
    #[case::needed_in_any_case(A, &[])]
    #[case::for_another_system("aarch64-linux=/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-b", &[])]
    #[case::json("[\"/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-b\"]", &[B])]
    #[case::none("", &[])]
    fn some_can_be_done_without(#[case] value: &str, #[case] paths: &[&str]) {
        let attributes = parse(&[("paths", A), (OPTIONAL_PATHS, value)]).unwrap();
        let found: Vec<_> = attributes.optional.iter().map(ToString::to_string).collect();
        assert_eq!(found, paths);
    }

    #[test]
    fn entrypoints() {
        let found =
            parse(&[("paths", A), ("entrypoint.web", "auto"), ("entrypoint.job", "bin/job")]).unwrap();
        assert_eq!(found.entrypoints["web"], Entrypoint::Auto);
        assert_eq!(found.entrypoints["job"], Entrypoint::Program("bin/job".into()));
    }

    #[test]
    fn a_database_may_be_asked_for() {
        for (value, expected) in [("true", Database::Always), ("false", Database::Never)] {
            assert_eq!(parse(&[("paths", A), (DATABASE, value)]).unwrap().database, expected);
        }
        assert_eq!(parse(&[("paths", A)]).unwrap().database, Database::WithNix);
    }

    #[test]
    fn writes_may_be_limited() {
        let limit = |attributes: &[_]| {
            let attributes = parse(&[&[("paths", A)], attributes].concat()).unwrap();
            (attributes.size_limit, attributes.medium)
        };
        assert_eq!(limit(&[]), (None, Medium::Disk));
        assert_eq!(limit(&[(SIZE_LIMIT, " 64Mi ")]), (Some(64 << 20), Medium::Disk));
        assert_eq!(limit(&[(SIZE_LIMIT, "1k"), (MEDIUM, "")]), (Some(1000), Medium::Disk));
        assert_eq!(limit(&[(SIZE_LIMIT, "1k"), (MEDIUM, "Memory")]), (Some(1000), Medium::Memory));
    }

    #[rstest]
    #[case::not_a_quantity(&[("paths", A), ("sizeLimit", "much")], "volume attribute `sizeLimit`: \"much\" is not a quantity like 500Mi")]
    #[case::no_space(&[("paths", A), ("sizeLimit", "0")], "volume attribute `sizeLimit`: \"0\" is not a quantity like 500Mi")]
    #[case::huge_pages(&[("paths", A), ("sizeLimit", "1Gi"), ("medium", "HugePages")], "volume attribute `medium`: \"HugePages\" is not `Memory`, or empty")]
    #[case::all_memory(&[("paths", A), ("medium", "Memory")], "volume attribute `medium`: Memory needs `sizeLimit`, which says how much of it")]
    #[case::not_a_bool(&[("paths", A), ("database", "yes")], "volume attribute `database`: \"yes\" is not `true` or `false`")]
    #[case::nothing(&[], "no volume attribute names a store path; set `paths`")]
    #[case::only_optional(&[("optionalPaths", A)], "no volume attribute names a store path; set `paths`")]
    #[case::bad_optional(&[("paths", A), ("optionalPaths", "hello")], "volume attribute `optionalPaths`: line 1, column 1: \"hello\" is not a store path; expected /nix/store/<hash>-<name>")]
    #[case::empty(&[("paths", " ")], "no volume attribute names a store path; set `paths`")]
    #[case::other_system(&[("aarch64-linux", A)], "this node is x86_64-linux, and the volume has paths only for aarch64-linux")]
    #[case::misspelt(&[("path", A)], "volume attribute `path` is not known here; check its spelling, or upgrade the node driver on this node")]
    #[case::bad_path(&[("paths", "hello")], "volume attribute `paths`: line 1, column 1: \"hello\" is not a store path; expected /nix/store/<hash>-<name>")]
    #[case::climbing(&[("paths", A), ("entrypoint.a", "../sh")], "volume attribute `entrypoint.a`: \"../sh\" is not `auto`, the name of a program, or a path like bin/hello")]
    #[case::container_with_slash(&[("paths", A), ("entrypoint.a/b", "auto")], "volume attribute `entrypoint.a/b` is not known here; check its spelling, or upgrade the node driver on this node")]
    fn bad(#[case] attributes: &[(&str, &str)], #[case] message: &str) {
        assert_eq!(parse(attributes).unwrap_err().to_string(), message);
    }

    #[rstest]
    #[case("flakeRef")]
    #[case("nixExpr")]
    #[case("expression")]
    fn nothing_is_evaluated(#[case] key: &str) {
        assert_eq!(parse(&[(key, "x")]), Err(ParseAttributesError::Evaluated(key.into())));
    }
}
