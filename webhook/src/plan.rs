//! What a pod gets, before it gets it.

use std::collections::BTreeMap;

use crate::environment::Environment;
use crate::source::Source;

/// What a pod gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Whose packages they are.
    pub source: Source,
    /// A digest of the annotations that count: which wish is served.
    pub wish: String,
    /// One for each distinct set of packages.
    pub volumes: Vec<VolumePlan>,
    /// In the order of the pod.
    pub containers: Vec<ContainerPlan>,
    /// The status annotation's value.
    pub status: String,
    /// Volumes that an earlier call added and that nobody needs any more.
    pub obsolete: Vec<String>,
    /// The users of the pod, if an image without programs has to know more of them.
    pub passwd: Option<String>,
    /// For the person.
    pub warnings: Vec<String>,
}

/// One CSI volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlan {
    /// Its name in the pod, made from what is in it.
    pub name: String,
    /// Whether it is read-only.
    pub read_only: bool,
    /// The Secret with credentials for caches, if the pod names one.
    pub secret: Option<String>,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
}

/// What one container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPlan {
    /// Its name.
    pub name: String,
    /// The volume at `/nix`.
    pub volume: String,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// The image to set.
    pub image: Option<String>,
    /// The command to set.
    pub command: Option<Vec<String>>,
    /// The arguments to set; none if it is empty.
    pub args: Vec<String>,
    /// Whether the packages come first in `PATH`.
    pub path: bool,
    /// The ImageMap that says what its image is, if one does.
    pub image_map: Option<String>,
    /// What else it needs to run programs of Nix.
    pub environment: Environment,
}

impl Plan {
    pub(crate) fn empty(source: Source, wish: String, warnings: Vec<String>) -> Self {
        Self {
            source,
            wish,
            volumes: Vec::new(),
            containers: Vec::new(),
            status: String::new(),
            obsolete: Vec::new(),
            passwd: None,
            warnings,
        }
    }
}
