//! Volumes that kubelet has forgotten: a pod that was deleted by force while the driver was away, or a node that was
//! rebuilt around the directory. At start, and now and then.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::driver::Driver;
use crate::mount;
use crate::path_error::PathError;
use crate::publish::PublishError;

impl Driver {
    /// Removes what is left of volumes that kubelet does not know. Gives back how many.
    pub(crate) fn reconcile(&self) -> Result<usize, PublishError> {
        let pods = &self.options.pods_dir;
        // If it cannot be seen, nobody knows what kubelet knows.
        std::fs::read_dir(pods).map_err(|error| PublishError::Target(PathError::on("read", pods)(error)))?;
        let overlays = mount::names_below(&self.store.layout().volumes())?;
        let mut handles = None;
        let mut removed = 0;
        for (id, record) in self.volumes.all()? {
            // Somebody works with it, so it is not forgotten.
            let Ok(_operation) = self.ops.begin(&id) else { continue };
            let record = record.ok().flatten();
            let at_target = match &record {
                Some(record) => mount::is_mount_point(&record.target)?,
                None => false,
            };
            let is_known = match &record {
                Some(record) => pods.join(&record.pod.uid).exists(),
                // It may be published again, and then it has its files again.
                None => handles.get_or_insert_with(|| handles_in(pods)).contains(id.as_str()),
            };
            // One that is mounted is somebody's, and kubelet asks for the end of each that it knows.
            if at_target || overlays.contains(id.as_str()) || is_known {
                continue;
            }
            let pod = record.map(|record| format!("{}/{}", record.pod.namespace, record.pod.name));
            tracing::info!(volume.id = %id, pod, "kubelet does not know this volume any more");
            self.volumes.remove(&self.store, &id)?;
            removed += 1;
        }
        if removed > 0 {
            self.store.empty_trash_later();
        }
        Ok(removed)
    }
}

/// The volumes that kubelet has written down, by the ids that it gave them.
fn handles_in(pods: &Path) -> HashSet<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct VolumeData {
        volume_handle: String,
    }
    let below = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let volumes =
        below(pods).flat_map(|pod| below(&pod.join("volumes/kubernetes.io~csi")).collect::<Vec<_>>());
    let data = volumes.filter_map(|volume| fs::read(volume.join("vol_data.json")).ok());
    data.filter_map(|text| serde_json::from_slice::<VolumeData>(&text).ok())
        .map(|data| data.volume_handle)
        .collect()
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
        assert_eq!(handles_in(dir.path()), HashSet::from(["csi-1".to_owned()]));
    }
}
