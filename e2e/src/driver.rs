//! A driver behind its real socket, with real mounts. To be used in a mount namespace that ends with the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hyper_util::rt::TokioIo;
use nix_csi_node::config::Config;
use nix_csi_node::store::{NodeStore, RootLock};
use nix_csi_node::volume::Record;
use nix_csi_node::{
    Driver, DriverOptions, Kubernetes, Limits, ServeError, Sockets, serve, start_substituter,
};
use nix_csi_proto::System;
use nix_csi_proto::csi::node_client::NodeClient;
use nix_csi_proto::csi::volume_usage::Unit;
use nix_csi_proto::csi::{
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
    VolumeUsage,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{ApiServer, Fixtures, tree};

/// What the node is called.
pub const NODE: &str = "node-under-test";

/// A client's connection to a socket.
pub async fn channel(socket: &Path) -> Result<Channel> {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    Ok(Endpoint::try_from("http://localhost")?.connect_with_connector(connect).await?)
}

/// A line of `/proc/self/mountinfo`.
pub struct Mount {
    /// Where.
    pub target: PathBuf,
    /// The options of the mount.
    pub options: String,
    /// The kind of filesystem.
    pub kind: String,
}

/// Everything mounted below `dir`.
pub fn mounts_below(dir: &Path) -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let parse = |line: &str| {
        let fields: Vec<_> = line.split(' ').collect();
        let kind = line.split(" - ").nth(1)?.split(' ').next()?;
        Some(Mount { target: fields.get(4)?.into(), options: (*fields.get(5)?).into(), kind: kind.into() })
    };
    Ok(text.lines().filter_map(parse).filter(|mount| mount.target.starts_with(dir)).collect())
}

/// The options of a test: these caches, the fixtures' key, and no second attempt.
pub fn config(caches: &[String]) -> Result<Config> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(Config {
        substituters: caches.iter().map(|url| url.parse()).collect::<Result<_, _>>()?,
        trusted_public_keys: vec![Fixtures::find()?.public_key()?.parse()?],
        download_attempts: 1,
        // How full the disk of whoever tests is must not matter.
        limits: Limits { min_free: Some(0), max_free: None },
        ..Config::default()
    })
}

/// A node: a root, and kubelet's directory of pods. The driver can be started on it again.
pub struct TestNode {
    dir: TempDir,
    kubernetes: Kubernetes,
    running: Option<Running>,
}

struct Running {
    node: NodeClient<Channel>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServeError>>,
    driver: Driver,
    beside: JoinSet<()>,
    _lock: RootLock,
}

/// A volume of a pod, as kubelet asks for it.
#[derive(Debug, Clone)]
pub struct Volume {
    /// The name of the pod; there is one volume in each.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// `volumeAttributes`.
    pub attributes: Vec<(String, String)>,
    /// What its secret holds.
    pub secret: Vec<(String, String)>,
    /// Whether it is read-only.
    pub readonly: bool,
}

impl Volume {
    /// A read-only volume of one path.
    pub fn new(namespace: &str, pod: &str, paths: &str) -> Self {
        Self {
            pod: pod.into(),
            namespace: namespace.into(),
            attributes: vec![("paths".into(), paths.into())],
            secret: Vec::new(),
            readonly: true,
        }
    }

    /// With an attribute, in place of one of that name.
    #[must_use]
    pub fn attribute(mut self, key: &str, value: impl Into<String>) -> Self {
        self.attributes.retain(|(name, _)| name != key);
        self.attributes.push((key.into(), value.into()));
        self
    }

    /// One that the pod can write.
    #[must_use]
    pub fn read_write(mut self) -> Self {
        self.readonly = false;
        self
    }

    /// With a key of its secret.
    #[must_use]
    pub fn secret(mut self, key: &str, value: &str) -> Self {
        self.secret.push((key.into(), value.into()));
        self
    }
}

impl TestNode {
    /// A node on which no driver runs yet.
    pub fn new() -> Result<Self> {
        Self::in_dir(tempfile::tempdir()?)
    }

    /// The same, in an empty directory.
    pub fn in_dir(dir: TempDir) -> Result<Self> {
        fs::create_dir(dir.path().join("pods"))?;
        Ok(Self { dir, kubernetes: Kubernetes::default(), running: None })
    }

    /// From its next start on the driver talks to that server.
    pub fn set_kubernetes(&mut self, server: &ApiServer) -> Result<()> {
        self.kubernetes = Kubernetes::at(&server.url(), NODE)?;
        Ok(())
    }

    /// One with a driver.
    pub async fn start(config: &Config) -> Result<Self> {
        let mut node = Self::new()?;
        node.start_driver(config).await?;
        Ok(node)
    }

    /// Starts the driver as its command does: what an earlier one left is put in order first.
    pub async fn start_driver(&mut self, config: &Config) -> Result<()> {
        self.stop_driver().await?;
        let lock = RootLock::acquire(&self.root(), "the driver of a test")?;
        let store = Arc::new(NodeStore::open(&self.root())?);
        let substituter = start_substituter(Arc::clone(&store), config)?;
        let options = DriverOptions {
            node_name: NODE.into(),
            system: System::X86_64Linux,
            pods_dir: self.dir.path().join("pods"),
            patience: Duration::from_mins(1),
            kubernetes: self.kubernetes.clone(),
            limits: config.limits,
            max_size_limit: config.max_size_limit,
            remove_startup_taint: false,
        };
        let driver = Driver::new(store, substituter, options);
        driver.recover()?;
        let beside = driver.work_beside();
        let csi = self.dir.path().join("csi.sock");
        let sockets = Sockets {
            csi: csi.clone(),
            csi_on_host: "/host/csi.sock".into(),
            registration: None,
            http: None,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let served = driver.clone();
        let serving = tokio::spawn(async move {
            serve(served, &sockets, async {
                let _ = stopped.await;
            })
            .await
        });
        // A socket has a name a moment before anybody listens.
        let channel = loop {
            match channel(&csi).await {
                Ok(channel) => break channel,
                Err(_) if !serving.is_finished() => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(error) => return Err(error.context(format!("the driver ended: {:?}", serving.await))),
            }
        };
        let node = NodeClient::new(channel);
        self.running = Some(Running { node, stop, serving, driver, beside, _lock: lock });
        Ok(())
    }

    /// Ends the driver, if one runs. What is mounted stays.
    pub async fn stop_driver(&mut self) -> Result<()> {
        if let Some(Running { node, stop, serving, driver, beside, _lock }) = self.running.take() {
            drop(node);
            let _ = stop.send(());
            serving.await??;
            drop(beside);
            driver.finish()?;
        }
        Ok(())
    }

    /// A line of the driver's metrics, behind its name and labels.
    pub fn metric(&self, name: &str) -> Result<String> {
        let text = self.running.as_ref().context("no driver runs")?.driver.metrics_text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("{name} is not in {text}"))?.trim().to_owned())
    }

    /// What is written down about the volume of a pod.
    pub fn record(&self, pod: &str) -> Result<Record> {
        let at = self.root().join("volumes").join(format!("csi-{pod}")).join("record.json");
        Ok(serde_json::from_slice(&fs::read(&at).with_context(|| at.display().to_string())?)?)
    }

    /// The node store.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Where the volume of a pod is mounted.
    pub fn target(&self, pod: &str) -> PathBuf {
        self.dir.path().join("pods").join(pod).join("mount")
    }

    /// A client of the driver that runs.
    pub fn client(&self) -> Result<NodeClient<Channel>> {
        Ok(self.running.as_ref().context("no driver runs")?.node.clone())
    }

    /// The request for a volume, after kubelet made its directory.
    pub fn request(&self, volume: &Volume) -> Result<NodePublishVolumeRequest> {
        let target = self.target(&volume.pod);
        fs::create_dir_all(target.parent().context("below pods")?)?;
        let of_kubelet = [
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", &volume.pod),
            ("csi.storage.k8s.io/pod.namespace", &volume.namespace),
            ("csi.storage.k8s.io/pod.uid", &volume.pod),
        ];
        let of_kubelet = of_kubelet.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Ok(NodePublishVolumeRequest {
            volume_id: format!("csi-{}", volume.pod),
            target_path: target.to_str().context("a path of this test")?.into(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: volume.readonly,
            volume_context: volume.attributes.iter().cloned().chain(of_kubelet).collect(),
            secrets: volume.secret.iter().cloned().collect(),
            ..Default::default()
        })
    }

    /// Publishes a volume; the inner error is the driver's.
    pub async fn publish(&self, volume: &Volume) -> Result<Result<(), Status>> {
        let request = self.request(volume)?;
        Ok(self.client()?.node_publish_volume(request).await.map(drop))
    }

    /// The same, of a volume that must not be published: what the driver says, with nothing mounted.
    pub async fn refused(&self, volume: &Volume) -> Result<Status> {
        let status = self.publish(volume).await?.err().context("it was published")?;
        ensure!(mounts_below(&self.target(&volume.pod))?.is_empty(), "it is mounted");
        ensure!(!self.target(&volume.pod).exists(), "its target was made");
        Ok(status)
    }

    /// What the driver says of the volume of a pod: bytes, inodes, and its condition if it is not well.
    pub async fn stats(&self, pod: &str) -> Result<(VolumeUsage, VolumeUsage, Option<String>)> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: format!("csi-{pod}"),
            volume_path: self.target(pod).display().to_string(),
            ..Default::default()
        };
        let stats = self.client()?.node_get_volume_stats(request).await?.into_inner();
        let of = |unit: Unit| stats.usage.iter().find(|usage| usage.unit() == unit).copied();
        let condition = stats.volume_condition.context("a condition")?;
        let bytes = of(Unit::Bytes).context("bytes")?;
        Ok((bytes, of(Unit::Inodes).context("inodes")?, condition.abnormal.then_some(condition.message)))
    }

    /// Unpublishes the volume of a pod.
    pub async fn unpublish(&self, pod: &str) -> Result<()> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
        };
        self.client()?.node_unpublish_volume(request).await?;
        Ok(())
    }

    /// Nothing is mounted, recorded or half done.
    pub fn assert_empty(&self) -> Result<()> {
        ensure!(mounts_below(self.dir.path())?.is_empty(), "still mounted");
        let left: Vec<_> = fs::read_dir(self.root().join("volumes"))?.collect();
        ensure!(left.is_empty(), "left in volumes: {left:?}");
        tree::wait_until_clean(&self.root())
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.serving.abort();
        }
        for mount in mounts_below(self.dir.path()).unwrap_or_default() {
            let _ = rustix::mount::unmount(&mount.target, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
