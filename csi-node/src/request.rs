//! What kubelet sends, checked. Nothing here does I/O.

use std::path::{Component, Path, PathBuf};

use nix_csi_proto::System;
use nix_csi_proto::csi::{self, volume_capability::AccessType};
use nix_csi_proto::volume::{
    EPHEMERAL, POD_NAME, POD_NAMESPACE, POD_UID, ParseAttributesError, SIZE_LIMIT, VolumeAttributes,
};

use crate::substituter::{Credentials, ParseCredentialsError};
use crate::volume::{Mode, ParseVolumeIdError, Pod, VolumeId};

/// Why a request cannot be served, now or later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A field that must be there.
    #[error("the request has no {0}")]
    Missing(&'static str),
    /// Not an id.
    #[error(transparent)]
    VolumeId(#[from] ParseVolumeIdError),
    /// Not a path that can be mounted on.
    #[error("target path {0:?} is not an absolute path without `..`")]
    Target(String),
    /// Outside of what kubelet may ask for.
    #[error("target path {target} is not below {}", dir.display())]
    OutsideKubelet {
        /// The target.
        target: String,
        /// Kubelet's directory, as this driver was told.
        dir: PathBuf,
    },
    /// A raw block volume.
    #[error("a Nix volume is a file system; `volumeMode: Block` cannot be served")]
    Block,
    /// A persistent volume.
    #[error("this driver serves inline volumes of pods only; write `csi:` into the pod's `volumes`")]
    NotEphemeral,
    /// Nothing can be written there.
    #[error(
        "volume attribute `{0}` is for volumes that the pod can write, and this one is `readOnly: true`; \
         take one of them away"
    )]
    LimitOfReadOnly(&'static str),
    /// A secret that says nothing.
    #[error(transparent)]
    Credentials(#[from] ParseCredentialsError),
    /// Attributes that cannot be served.
    #[error(transparent)]
    Attributes(#[from] ParseAttributesError),
}

/// A checked NodePublishVolumeRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where to mount.
    pub target: PathBuf,
    /// Whether the pod can write.
    pub mode: Mode,
    /// What is to be seen there.
    pub attributes: VolumeAttributes,
    /// For whom.
    pub pod: Pod,
    /// What the pod's author may fetch beside what everybody may.
    pub credentials: Option<Credentials>,
}

/// A checked NodeUnpublishVolumeRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpublishRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where it may be mounted.
    pub target: PathBuf,
}

/// A checked NodeGetVolumeStatsRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatsRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where it should be mounted. Only compared, so any text will do.
    pub path: String,
}

impl StatsRequest {
    /// Checks a request.
    pub fn parse(request: &csi::NodeGetVolumeStatsRequest) -> Result<Self, RequestError> {
        let path = request.volume_path.clone();
        if path.is_empty() {
            return Err(RequestError::Missing("volume path"));
        }
        Ok(Self { volume: volume_id(&request.volume_id)?, path })
    }
}

impl PublishRequest {
    /// Checks a request to a node of `system` whose kubelet keeps its pods in `kubelet_dir`.
    pub fn parse(
        request: &csi::NodePublishVolumeRequest,
        system: System,
        kubelet_dir: &Path,
    ) -> Result<Self, RequestError> {
        let volume = volume_id(&request.volume_id)?;
        let target = target_path(&request.target_path, kubelet_dir)?;
        let capability =
            request.volume_capability.as_ref().ok_or(RequestError::Missing("volume capability"))?;
        if matches!(capability.access_type, Some(AccessType::Block(_))) {
            return Err(RequestError::Block);
        }
        let context = |key| request.volume_context.get(key).map(String::as_str);
        if context(EPHEMERAL) != Some("true") {
            return Err(RequestError::NotEphemeral);
        }
        // Kubelet writes these over whatever the pod's author wrote, as long as podInfoOnMount is true.
        let pod = |key| context(key).map(str::to_owned).ok_or(RequestError::Missing(key));
        let pod = Pod { namespace: pod(POD_NAMESPACE)?, name: pod(POD_NAME)?, uid: pod(POD_UID)? };
        let secret = |key: &str| request.secrets.get(key).map(String::as_str);
        let credentials = (!request.secrets.is_empty()).then(|| Credentials::parse(secret)).transpose()?;
        let attributes = request.volume_context.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let attributes = VolumeAttributes::parse(attributes, system)?;
        let mode = if request.readonly { Mode::ReadOnly } else { Mode::ReadWrite };
        // Nobody is to believe that there is a limit where there is none.
        if mode == Mode::ReadOnly && attributes.size_limit.is_some() {
            return Err(RequestError::LimitOfReadOnly(SIZE_LIMIT));
        }
        Ok(Self { volume, target, mode, attributes, pod, credentials })
    }
}

impl UnpublishRequest {
    /// Checks a request.
    pub fn parse(
        request: &csi::NodeUnpublishVolumeRequest,
        kubelet_dir: &Path,
    ) -> Result<Self, RequestError> {
        Ok(Self {
            volume: volume_id(&request.volume_id)?,
            target: target_path(&request.target_path, kubelet_dir)?,
        })
    }
}

fn volume_id(id: &str) -> Result<VolumeId, RequestError> {
    if id.is_empty() { Err(RequestError::Missing("volume id")) } else { Ok(id.parse()?) }
}

fn target_path(target: &str, kubelet_dir: &Path) -> Result<PathBuf, RequestError> {
    if target.is_empty() {
        return Err(RequestError::Missing("target path"));
    }
    let path = Path::new(target);
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || target.contains('\0') || !path.components().all(plain) {
        return Err(RequestError::Target(target.to_owned()));
    }
    if !path.starts_with(kubelet_dir) || path == kubelet_dir {
        return Err(RequestError::OutsideKubelet { target: target.to_owned(), dir: kubelet_dir.into() });
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix_csi_proto::csi::{NodePublishVolumeRequest, VolumeCapability, volume_capability::BlockVolume};

    fn request() -> NodePublishVolumeRequest {
        let context = [
            (EPHEMERAL, "true"),
            (POD_NAME, "web"),
            (POD_NAMESPACE, "shop"),
            (POD_UID, "1"),
            ("paths", "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/nix/mount".into(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: true,
            volume_context: context.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..Default::default()
        }
    }

    fn parse(request: &NodePublishVolumeRequest) -> Result<PublishRequest, RequestError> {
        PublishRequest::parse(request, System::X86_64Linux, Path::new("/var/lib/kubelet/pods"))
    }

    #[test]
    fn what_kubelet_sends_is_good() {
        let good = parse(&request()).unwrap();
        assert_eq!((good.mode, good.pod.namespace.as_str()), (Mode::ReadOnly, "shop"));
    }

    type Change = fn(&mut NodePublishVolumeRequest);

    #[test]
    fn what_is_refused() {
        let cases: [(Change, &str); 13] = [
            // no id
            (|r| r.volume_id.clear(), "the request has no volume id"),
            // id climbs
            (
                |r| r.volume_id = "../../etc".into(),
                "\"../../etc\" is not a volume id: expected up to 128 letters, digits, `-`, `_` and `.`, not beginning with `.`",
            ),
            // no target
            (|r| r.target_path.clear(), "the request has no target path"),
            // relative
            (
                |r| r.target_path = "pods/1".into(),
                "target path \"pods/1\" is not an absolute path without `..`",
            ),
            // target climbs
            (
                |r| r.target_path = "/var/lib/kubelet/pods/../x".into(),
                "target path \"/var/lib/kubelet/pods/../x\" is not an absolute path without `..`",
            ),
            // target elsewhere
            (|r| r.target_path = "/etc".into(), "target path /etc is not below /var/lib/kubelet/pods"),
            // target is the directory
            (
                |r| r.target_path = "/var/lib/kubelet/pods".into(),
                "target path /var/lib/kubelet/pods is not below /var/lib/kubelet/pods",
            ),
            // no capability
            (|r| r.volume_capability = None, "the request has no volume capability"),
            // block
            (
                |r| {
                    r.volume_capability = Some(VolumeCapability {
                        access_type: Some(AccessType::Block(BlockVolume {})),
                        ..Default::default()
                    });
                },
                "a Nix volume is a file system; `volumeMode: Block` cannot be served",
            ),
            // persistent
            (
                |r| drop(r.volume_context.remove(EPHEMERAL)),
                "this driver serves inline volumes of pods only; write `csi:` into the pod's `volumes`",
            ),
            // no pod
            (|r| drop(r.volume_context.remove(POD_UID)), "the request has no csi.storage.k8s.io/pod.uid"),
            // a limit of nothing
            (
                |r| drop(r.volume_context.insert("sizeLimit".into(), "1Gi".into())),
                "volume attribute `sizeLimit` is for volumes that the pod can write, and this one is `readOnly: true`; take one of them away",
            ),
            // no paths
            (
                |r| drop(r.volume_context.remove("paths")),
                "no volume attribute names a store path; set `paths`",
            ),
        ];
        for (change, message) in cases {
            let mut request = request();
            change(&mut request);
            assert_eq!(parse(&request).unwrap_err().to_string(), message);
        }
    }
}
