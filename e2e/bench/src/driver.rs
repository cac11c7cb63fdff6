//! A driver as it runs on a node: `nix-csi-node serve` behind its socket, called as kubelet calls it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::channel;
use nix_csi_proto::csi::identity_client::IdentityClient;
use nix_csi_proto::csi::node_client::NodeClient;
use nix_csi_proto::csi::{
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use nix_csi_store::StorePath;
use tonic::Code;
use tonic::transport::Channel;

/// A running driver. It ends with this process, however that ends.
pub(crate) struct Driver {
    child: Child,
    pods: PathBuf,
    node: NodeClient<Channel>,
    identity: IdentityClient<Channel>,
}

impl Driver {
    /// Starts one whose node is `dir`: an empty directory, or that of an earlier driver. `config` is a nix.conf.
    pub(crate) async fn start(program: &Path, dir: &Path, config: &str) -> Result<Self> {
        let kubelet = dir.join("kubelet");
        let pods = kubelet.join("pods");
        fs::create_dir_all(&pods)?;
        fs::write(dir.join("nix.conf"), config)?;
        let (socket, log) = (dir.join("csi.sock"), dir.join("log"));
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(program)
            .arg("--root")
            .arg(dir.join("root"))
            .arg("--config")
            .arg(dir.join("nix.conf"))
            .args(["serve", "--node-name", "bench", "--csi-socket"])
            .arg(&socket)
            .arg("--kubelet-dir")
            .arg(&kubelet)
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("setpriv; e2e/setup.sh installs it")?;
        let channel = loop {
            match channel(&socket).await {
                Ok(channel) => break channel,
                Err(_) if child.try_wait()?.is_none() => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => {
                    return Err(error.context(format!("the driver ended:\n{}", fs::read_to_string(&log)?)));
                }
            }
        };
        Ok(Self {
            child,
            pods,
            node: NodeClient::new(channel.clone()),
            identity: IdentityClient::new(channel),
        })
    }

    /// The least that a call can take.
    pub(crate) async fn probe(&self) -> Result<()> {
        self.identity.clone().probe(ProbeRequest {}).await?;
        Ok(())
    }

    /// The request for a read-only volume of `path`, after kubelet made its directory.
    pub(crate) fn request(&self, pod: &str, path: &StorePath) -> Result<NodePublishVolumeRequest> {
        let target = self.target(pod);
        fs::create_dir_all(target.parent().context("below pods")?)?;
        let attributes = [
            ("paths", path.to_string()),
            ("csi.storage.k8s.io/ephemeral", "true".to_owned()),
            ("csi.storage.k8s.io/pod.name", pod.to_owned()),
            ("csi.storage.k8s.io/pod.namespace", "bench".to_owned()),
            ("csi.storage.k8s.io/pod.uid", pod.to_owned()),
        ];
        Ok(NodePublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: target.to_str().context("a path that is not UTF-8")?.to_owned(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: true,
            volume_context: attributes.map(|(key, value)| (key.to_owned(), value)).into(),
            ..Default::default()
        })
    }

    pub(crate) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<()> {
        self.node.clone().node_publish_volume(request).await?;
        Ok(())
    }

    /// Publishes a volume of `path` for `pod`, asking again as kubelet does while it is being fetched.
    pub(crate) async fn publish_path(&self, pod: &str, path: &StorePath) -> Result<()> {
        let request = self.request(pod, path)?;
        loop {
            match self.node.clone().node_publish_volume(request.clone()).await {
                Err(status) if status.code() == Code::Aborted => {}
                published => return published.map(drop).with_context(|| path.to_string()),
            }
        }
    }

    pub(crate) async fn unpublish(&self, pod: &str) -> Result<()> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
        };
        self.node.clone().node_unpublish_volume(request).await?;
        Ok(())
    }

    fn target(&self, pod: &str) -> PathBuf {
        self.pods.join(pod).join("mount")
    }

    /// From here on, the peak of its memory is counted anew.
    pub(crate) fn forget_peak_memory(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }

    /// The most memory that it had, in MiB.
    pub(crate) fn peak_memory(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kib: u32 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(f64::from(kib) / 1024.0)
    }

    /// Ends it as a cluster does, and waits until its store is on the disk.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.terminate();
        // It waits for this side to close the connection, so this thread must not block.
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        ensure!(status.success(), "the driver ended with {status}");
        Ok(())
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // After an error: nothing of it is needed any more.
        let _ = (self.child.kill(), self.child.wait());
    }
}
