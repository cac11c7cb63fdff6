//! Volumes that kubelet has forgotten: a pod that was deleted by force while the driver was away, or a node that was
//! rebuilt around the directory. At start, and now and then.

use std::collections::HashSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::driver::Driver;
use crate::mount;
use crate::path_error::PathError;
use crate::publish::PublishError;
use crate::volume::VolumeError;

impl Driver {
    /// Removes what is left of volumes that kubelet does not know. Gives back how many.
    pub(crate) fn reconcile(&self) -> Result<usize, PublishError> {
        let pods = &self.options.pods_dir;
        // If it cannot be seen, nobody knows what kubelet knows.
        let read = |error| PublishError::Target(PathError::on("read", pods)(error));
        fs::read_dir(pods).map_err(read)?;
        let mut handles = None;
        let mut removed = 0;
        for id in self.volumes.ids()? {
            // Somebody works with it, so it is not forgotten.
            let Ok(_operation) = self.ops.begin(&id) else { continue };
            // Only now: until here another call may have changed it.
            let record = match self.volumes.read(&id) {
                Ok(record) => record,
                Err(VolumeError::Damaged { .. }) => None,
                // What cannot be read now is not gone.
                Err(VolumeError::Io(_)) => continue,
            };
            let at_target = match &record {
                Some(record) => mount::is_mount_point(&record.target)?,
                None => false,
            };
            let is_known = match (&record, &handles) {
                (Some(record), _) => pods.join(&record.pod.uid).try_exists().map_err(read)?,
                // It may be published again, and then it has its files again.
                (None, None) => handles.insert(handles_in(pods).map_err(read)?).contains(id.as_str()),
                (None, Some(handles)) => handles.contains(id.as_str()),
            };
            // One that is mounted is somebody's, and kubelet asks for the end of each that it knows.
            let is_overlaid = || {
                mount::names_below(&self.store.layout().volumes()).map(|names| names.contains(id.as_str()))
            };
            if at_target || is_known {
                continue;
            }
            // What a call left that was killed there; an overlay would have the memory without it.
            mount::unmount_and_remove(&self.volumes.memory(&id))?;
            if is_overlaid()? {
                continue;
            }
            let pod = record.map(|record| format!("{}/{}", record.pod.namespace, record.pod.name));
            tracing::info!(volume.id = %id, pod, "kubelet does not know this volume any more");
            self.forget(&id)?;
            removed += 1;
        }
        if removed > 0 {
            self.store.empty_trash_later();
        }
        Ok(removed)
    }
}

/// The volumes that kubelet has written down, by the ids that it gave them.
fn handles_in(pods: &Path) -> io::Result<HashSet<String>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct VolumeData {
        volume_handle: String,
    }
    let mut handles = HashSet::new();
    for pod in below(pods)? {
        for volume in below(&pod.join("volumes/kubernetes.io~csi"))? {
            match fs::read(volume.join("vol_data.json")) {
                // One that is torn names nothing, to kubelet neither.
                Ok(text) => handles
                    .extend(serde_json::from_slice::<VolumeData>(&text).ok().map(|data| data.volume_handle)),
                Err(error) if is_not_there(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(handles)
}

fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if is_not_there(&error) => Ok(Vec::new()),
        entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
    }
}

fn is_not_there(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubelet_wrote_down_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("uid/volumes/kubernetes.io~csi/nix");
        fs::create_dir_all(&volume).unwrap();
        fs::create_dir_all(dir.path().join("other/volumes/kubernetes.io~csi/torn")).unwrap();
        fs::write(volume.join("vol_data.json"), r#"{"driverName":"x","volumeHandle":"csi-1"}"#).unwrap();
        fs::write(dir.path().join("other/volumes/kubernetes.io~csi/torn/vol_data.json"), "{").unwrap();
        assert_eq!(handles_in(dir.path()).unwrap(), HashSet::from(["csi-1".to_owned()]));
    }
}
