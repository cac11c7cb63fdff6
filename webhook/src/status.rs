//! The record that is written back to a pod: what was done, for people and for the next call.
//!
//! A record, never a permission: it supplies the containers that were there at the first call and their
//! images, and of those only what the pod really looks like.

use std::collections::BTreeMap;

use nix_csi_proto::DRIVER_NAME;
use nix_csi_proto::annotations::STATUS;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The content of the annotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    /// The version of this shape.
    pub(crate) v: u32,
    /// Where the wish stood.
    pub(crate) source: String,
    /// Which wish was served, as a digest.
    #[serde(default)]
    pub(crate) wish: String,
    /// By container: what it got.
    pub(crate) containers: BTreeMap<String, Injected>,
}

/// What one container got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Injected {
    /// The volume with its packages.
    pub(crate) volume: String,
    /// The image it had, if that was replaced.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) image: Option<String>,
    /// The ImageMap that says what that image is, if one does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) image_map: Option<String>,
}

impl Status {
    /// The record on `pod`, if there is one that can be read.
    pub(crate) fn of(pod: &Value) -> Option<Self> {
        let text = pod.pointer("/metadata/annotations")?.get(STATUS)?.as_str()?;
        serde_json::from_str(text).ok().filter(|status: &Self| status.v == 1)
    }

    /// What it says about `container`, if the container really has a volume of ours of that name at `/nix`.
    pub(crate) fn confirmed(&self, pod: &Value, container: &Value) -> Option<&Injected> {
        let injected = self.containers.get(container.get("name")?.as_str()?)?;
        let mounts = container.get("volumeMounts")?.as_array()?;
        let has_it = mounts.iter().any(|mount| is_at_nix(mount, &injected.volume));
        (has_it && is_ours(pod, &injected.volume)).then_some(injected)
    }
}

/// Whether `mount` shows the volume of that name at `/nix`.
pub(crate) fn is_at_nix(mount: &Value, volume: &str) -> bool {
    let field = |name: &str| mount.get(name).and_then(Value::as_str);
    field("name") == Some(volume) && field("mountPath") == Some("/nix")
}

/// Whether the pod's volume of that name is one that an earlier call may have added.
pub(crate) fn is_ours(pod: &Value, name: &str) -> bool {
    let volumes = pod.pointer("/spec/volumes").and_then(Value::as_array);
    let named =
        volumes.into_iter().flatten().find(|volume| volume.get("name").and_then(Value::as_str) == Some(name));
    let driver = named.and_then(|volume| volume.pointer("/csi/driver")).and_then(Value::as_str);
    name.starts_with("nix-csi-") && driver == Some(DRIVER_NAME)
}
