//! Volumes: what the node wrote down about each, and the directory a read-write one writes into.
//!
//! ```text
//! volumes/<volume id>/record.json   written before the mount, removed last
//! volumes/<volume id>/{upper,work}  read-write volumes
//! volumes/<volume id>/memory        empty: those that write into memory
//! ```
//! **Invariant:** whatever is mounted has a record, so a crash at any point leaves something to find it by.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix_csi_proto::volume::Medium;
use serde::{Deserialize, Serialize};

use crate::path_error::PathError;
use crate::store::NodeStore;

/// A volume id that can be the name of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

/// Not an id that kubelet would give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a volume id: expected up to 128 letters, digits, `-`, `_` and `.`, not beginning with `.`"
)]
pub struct ParseVolumeIdError(String);

impl VolumeId {
    /// The id as kubelet gave it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeId {
    type Err = ParseVolumeIdError;

    fn from_str(text: &str) -> Result<Self, ParseVolumeIdError> {
        let good = !text.is_empty()
            && text.len() <= 128
            && !text.starts_with('.')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseVolumeIdError(text.chars().take(200).collect()))
        }
    }
}

impl TryFrom<String> for VolumeId {
    type Error = ParseVolumeIdError;

    fn try_from(text: String) -> Result<Self, ParseVolumeIdError> {
        text.parse()
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether the pod can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The view itself.
    ReadOnly,
    /// An overlay over it.
    ReadWrite,
}

/// The pod a volume is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What the node wrote down about a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is mounted, or about to be.
    pub target: PathBuf,
    /// The view that it shows.
    pub view: String,
    /// Whether the pod can write.
    pub mode: Mode,
    /// Whose it is.
    pub pod: Pod,
    /// What it can do without, if there is anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optional: Option<Optional>,
    /// How much the pod may write, if there is a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
}

/// How much a pod may write, and where it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// So many bytes.
    pub bytes: u64,
    /// Whose.
    pub medium: Medium,
}

/// What a volume can do without: so the view alone does not say what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Optional {
    /// The view with all of them in it.
    pub complete: String,
    /// Which ones, by their base names.
    pub paths: Vec<String>,
    /// Those that the view of the record does not have.
    pub left_out: Vec<String>,
}

impl Record {
    /// Whether this was written for the same request as `wanted`. What of the optional paths was there may differ.
    pub(crate) fn is_for(&self, wanted: &Self) -> bool {
        let mut same = self.clone();
        if let (Some(optional), Some(other)) = (&mut same.optional, &wanted.optional) {
            optional.left_out.clone_from(&other.left_out);
            same.view.clone_from(&wanted.view);
        }
        same == *wanted
    }
}

/// Why a record is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// Somebody damaged it.
    #[error("{} is not a volume record; delete it once nothing is mounted there", path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The volumes of a node store.
#[derive(Clone)]
pub struct Volumes {
    dir: PathBuf,
}

impl Volumes {
    /// The volumes of `store`.
    pub fn new(store: &NodeStore) -> Self {
        Self { dir: store.layout().volumes() }
    }

    /// The volumes under the root of a store that somebody else may have open.
    pub fn at(root: &Path) -> Self {
        Self { dir: root.join("volumes") }
    }

    fn volume(&self, id: &VolumeId) -> PathBuf {
        self.dir.join(&id.0)
    }

    /// Where a read-write volume's own files are: `upper` and `work`.
    pub fn upper_and_work(&self, id: &VolumeId) -> (PathBuf, PathBuf) {
        let dir = self.volume(id);
        (dir.join("upper"), dir.join("work"))
    }

    /// Where a filesystem in memory is for a moment, until an overlay has it.
    pub fn memory(&self, id: &VolumeId) -> PathBuf {
        self.volume(id).join("memory")
    }

    /// Whether there is anything of `id`.
    pub fn exists(&self, id: &VolumeId) -> bool {
        self.volume(id).exists()
    }

    /// What is written down about `id`.
    pub fn read(&self, id: &VolumeId) -> Result<Option<Record>, VolumeError> {
        let path = self.volume(id).join("record.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| VolumeError::Damaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(PathError::on("read", &path)(error).into()),
        }
    }

    /// Writes `record`, and makes what its mode needs. An upper that is there keeps its files.
    pub fn write(&self, record: &Record) -> Result<(), VolumeError> {
        let dir = self.volume(&record.volume);
        make_dir(&dir, 0o700)?;
        if record.limit.is_some_and(|limit| limit.medium == Medium::Memory) {
            make_dir(&self.memory(&record.volume), 0o700)?;
        } else if record.mode == Mode::ReadWrite {
            let (upper, work) = self.upper_and_work(&record.volume);
            // The root of the overlay shows the upper's mode: a pod of any user must get through.
            make_dir(&upper, 0o755)?;
            make_dir(&work, 0o700)?;
        }
        let (path, beside) = (dir.join("record.json"), dir.join(".record.json"));
        let text = serde_json::to_vec(record).map_err(PathError::on("write", &path))?;
        fs::write(&beside, text)
            .and_then(|()| fs::rename(&beside, &path))
            .map_err(PathError::on("write", &path))?;
        Ok(())
    }

    /// Forgets `id` and deletes its own files, by way of the trash. Unknown is well too.
    pub fn remove(&self, store: &NodeStore, id: &VolumeId) -> Result<(), VolumeError> {
        let dir = self.volume(id);
        Ok(store.discard_if_there(&dir).map_err(PathError::on("remove", &dir))?)
    }

    /// Every volume that is written down. One that cannot be read is an error of its own, not of the list.
    pub fn list(&self) -> Result<Vec<Result<Record, VolumeError>>, VolumeError> {
        Ok(self.ids()?.iter().filter_map(|id| self.read(id).transpose()).collect())
    }

    /// Every volume of which there is anything.
    pub(crate) fn ids(&self) -> Result<Vec<VolumeId>, VolumeError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(PathError::on("read", &self.dir)(error).into()),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(PathError::on("read", &self.dir))?.file_name();
            ids.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        Ok(ids)
    }
}

fn make_dir(dir: &Path, mode: u32) -> Result<(), VolumeError> {
    match fs::DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(PathError::on("create", dir)(error).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(view: &str, optional: Option<(&str, &[&str])>) -> Record {
        let optional = optional.map(|(complete, left_out)| Optional {
            complete: complete.into(),
            paths: vec!["b".into(), "c".into()],
            left_out: left_out.iter().map(ToString::to_string).collect(),
        });
        Record {
            volume: "csi-1".parse().unwrap(),
            target: "/pods/1/mount".into(),
            view: view.into(),
            mode: Mode::ReadOnly,
            pod: Pod { namespace: "shop".into(), name: "web".into(), uid: "1".into() },
            optional,
            limit: None,
        }
    }

    #[test]
    fn what_is_left_out_does_not_make_another_request() {
        let found = record("small", Some(("all", &["b"])));
        assert!(found.is_for(&record("all", Some(("all", &[])))));
        assert!(!found.is_for(&record("other", Some(("other", &[])))));
        assert!(!found.is_for(&record("small", None)));
        assert!(record("all", None).is_for(&record("all", None)));
        assert!(!record("all", None).is_for(&record("other", None)));
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let text = r#"{"volume":"csi-1","target":"/pods/1/mount","view":"v","mode":"read-only","pod":{"namespace":"shop","name":"web","uid":"1"}}"#;
        assert_eq!(serde_json::from_str::<Record>(text).unwrap(), record("v", None));
        assert_eq!(serde_json::to_string(&record("v", None)).unwrap(), text);
    }

    #[test]
    fn an_id_is_one_component() {
        let kubelet = format!("csi-{}", "0f".repeat(32));
        assert!(kubelet.parse::<VolumeId>().is_ok());
        for bad in ["", ".", "..", "../x", "a/b", "a\0b", ".hidden", &"a".repeat(129), "ä"] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad:?}");
        }
    }
}
