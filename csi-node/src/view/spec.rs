//! What a view is made of, and the name that follows from it.

use std::collections::BTreeMap;
use std::fmt;

use nix_csi_proto::volume::{Database, Entrypoint};
use nix_csi_store::{StorePath, encode_base32};
use ring::digest::{SHA256, digest};

/// Changes when the same spec would give another tree.
const FORMAT: u32 = 3;

/// Everything that changes a byte of the tree, and nothing else: not the pod, not read-only or read-write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewSpec {
    /// The packages of the profile, in their order.
    pub packages: Vec<StorePath>,
    /// Entry points by container.
    pub entrypoints: BTreeMap<String, Entrypoint>,
    /// Whether there is a Nix database.
    pub database: Database,
}

/// The name of a view: the hash of its spec.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ViewId(String);

impl ViewId {
    /// The name as a directory.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ViewSpec {
    /// Only packages, and the defaults for the rest.
    pub fn of(packages: Vec<StorePath>) -> Self {
        Self { packages, entrypoints: BTreeMap::new(), database: Database::default() }
    }

    /// SHA-256 of the spec in one canonical form.
    pub fn id(&self) -> ViewId {
        let packages: Vec<_> = self.packages.iter().map(StorePath::base_name).collect();
        // The keys of both maps come sorted, so the text is the same every time.
        let canonical = serde_json::json!({
            "format": FORMAT,
            "packages": packages,
            "entrypoints": self.entrypoints,
            "database": match self.database {
                Database::WithNix => "with-nix",
                Database::Always => "always",
                Database::Never => "never",
            },
        });
        ViewId(encode_base32(digest(&SHA256, canonical.to_string().as_bytes()).as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(packages: &[&str]) -> ViewSpec {
        let path = |c: &&str| StorePath::from_base_name(&format!("{}-x", c.repeat(32))).unwrap();
        ViewSpec::of(packages.iter().map(path).collect())
    }

    /// A changed id makes every node build every view again: that has to be meant.
    #[test]
    fn the_id_is_stable() {
        assert_eq!(spec(&["a", "b"]).id().as_str(), "1pg4i9wfkl8j9b3giarcdl5wdfw43za6685qdlwsfx3cdah78n4i");
    }

    #[test]
    fn order_and_entry_points_make_another_view() {
        let plain = spec(&["a", "b"]);
        let mut entry = plain.clone();
        entry.entrypoints.insert("c".into(), Entrypoint::Auto);
        assert_ne!(plain.id(), spec(&["b", "a"]).id());
        assert_ne!(plain.id(), entry.id());
        assert_ne!(plain.id(), ViewSpec { database: Database::Never, ..plain.clone() }.id());
    }
}
