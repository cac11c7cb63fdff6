//! The driver behind its real socket, with real mounts. Runs in a mount namespace that ends with it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::{NODE, channel, mounts_below};
use nix_csi_e2e::{ApiServer, Fixtures, StandIn, StaticServer, nix, node_program, tree};
use nix_csi_node::config::Config;
use nix_csi_node::store::{NodeStore, RootLock};
use nix_csi_node::{Driver, DriverOptions, Kubernetes, Limits, Sockets, serve, start_substituter};
use nix_csi_proto::System;
use nix_csi_proto::csi::identity_client::IdentityClient;
use nix_csi_proto::csi::node_client::NodeClient;
use nix_csi_proto::csi::{
    GetPluginInfoRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use nix_csi_proto::registration::registration_client::RegistrationClient;
use nix_csi_proto::registration::{InfoRequest, RegistrationStatus};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// A driver on a fresh root, with a fixture cache and its sockets.
struct Setup {
    fixtures: Fixtures,
    dir: TempDir,
    server: StaticServer,
    api: ApiServer,
    sockets: Sockets,
    node: NodeClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<Result<(), nix_csi_node::ServeError>>>,
    _lock: RootLock,
}

impl Setup {
    async fn new() -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let fixtures = Fixtures::find()?;
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        let pods = dir.path().join("pods");
        fs::create_dir(&pods)?;
        let api = ApiServer::start()?;
        let server = StaticServer::start(&fixtures.cache("zstd"))?;
        let lock = RootLock::acquire(&root, "the driver of a test")?;
        let store = Arc::new(NodeStore::open(&root)?);
        let config = Config {
            substituters: vec![server.url().parse()?],
            trusted_public_keys: vec![fixtures.public_key()?.parse()?],
            // The server takes few connections at once, and a machine that is busy takes its time.
            connect_timeout: Duration::from_mins(1),
            download_attempts: 3,
            ..Config::default()
        };
        let substituter = start_substituter(Arc::clone(&store), &config)?;
        let driver = Driver::new(
            store,
            substituter,
            DriverOptions {
                node_name: NODE.into(),
                system: System::X86_64Linux,
                pods_dir: pods,
                patience: Duration::from_mins(5),
                limits: Limits { min_free: Some(0), max_free: None },
                max_size_limit: None,
                remove_startup_taint: true,
                kubernetes: Kubernetes::at(&api.url(), NODE)?,
            },
        );
        // Free a moment ago.
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let sockets = Sockets {
            csi: dir.path().join("csi.sock"),
            csi_on_host: "/host/csi.sock".into(),
            registration: Some(dir.path().join("reg.sock")),
            http: Some(address),
        };
        let (stop, stopped) = oneshot::channel();
        let serving = {
            let sockets = sockets.clone();
            tokio::spawn(async move {
                serve(driver, &sockets, async {
                    let _ = stopped.await;
                })
                .await
            })
        };
        let start = Instant::now();
        while !sockets.csi.exists() || sockets.registration.as_ref().is_some_and(|path| !path.exists()) {
            ensure!(!serving.is_finished(), "the driver ended: {:?}", serving.await);
            ensure!(start.elapsed() < Duration::from_mins(1), "the driver makes no sockets");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let node = NodeClient::new(channel(&sockets.csi).await?);
        Ok(Self {
            fixtures,
            dir,
            server,
            api,
            sockets,
            node,
            stop: Some(stop),
            serving: Some(serving),
            _lock: lock,
        })
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn target(&self, pod: &str) -> PathBuf {
        self.dir.path().join("pods").join(pod).join("mount")
    }

    fn path(&self, name: &str) -> String {
        self.fixtures.get(name).expect("a fixture").path.to_string()
    }

    /// A request as kubelet makes it, and the directory it makes before.
    fn request(&self, pod: &str, paths: &str, readonly: bool) -> Result<NodePublishVolumeRequest> {
        let target = self.target(pod);
        fs::create_dir_all(target.parent().context("below pods")?)?;
        let context = [
            ("paths", paths),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", pod),
            ("csi.storage.k8s.io/pod.namespace", "shop"),
            ("csi.storage.k8s.io/pod.uid", "1"),
        ];
        Ok(NodePublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: target.to_str().context("a path of this test")?.into(),
            volume_capability: Some(VolumeCapability::default()),
            readonly,
            volume_context: context.map(|(key, value)| (key.into(), value.into())).into(),
            ..Default::default()
        })
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.node.clone().node_publish_volume(request).await.map(drop)
    }

    async fn unpublish(&self, pod: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
        };
        self.node.clone().node_unpublish_volume(request).await.map(drop)
    }

    /// Nothing mounted, nothing recorded, nothing half done. What a call ended for may still be ending beside.
    fn assert_empty(&self) -> Result<()> {
        ensure!(mounts_below(self.dir.path())?.is_empty(), "still mounted");
        let left: Vec<_> = fs::read_dir(self.root().join("volumes"))?.collect();
        ensure!(left.is_empty(), "left in volumes: {left:?}");
        tree::wait_until_clean(&self.root())
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        for line in mounts_below(self.dir.path()).unwrap_or_default() {
            let _ = rustix::mount::unmount(&line.target, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

fn inode(path: &Path) -> Result<(u64, u64)> {
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok((meta.dev(), meta.ino()))
}

/// What HTTP says at a path: the status, and all that was sent.
async fn http(setup: &Setup, path: &str) -> Result<(u16, String)> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = setup.sockets.http.context("an address")?;
    let mut connection = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    connection.read_to_string(&mut text).await?;
    let status = text.split(' ').nth(1).context("a status")?.parse()?;
    Ok((status, text))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_how_it_is_and_what_it_did() -> Result<()> {
    let setup = Setup::new().await?;
    assert_eq!(http(&setup, "/livez").await?.0, 200);
    let (status, text) = http(&setup, "/readyz").await?;
    assert!(status == 503 && text.contains("kubelet has not registered"), "{text}");
    let registration = setup.sockets.registration.as_ref().context("a registration socket")?;
    let mut kubelet = RegistrationClient::new(channel(registration).await?);
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    kubelet.notify_registration_status(registered).await?;
    let start = Instant::now();
    while http(&setup, "/readyz").await?.0 != 200 {
        ensure!(start.elapsed() < Duration::from_mins(1), "it is not ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let hello = setup.fixtures.get("hello")?;
    for pod in ["a", "b"] {
        setup.publish(setup.request(pod, &hello.path.to_string(), true)?).await?;
    }
    setup
        .publish(setup.request("c", "/nix/store/00000000000000000000000000000000-none", true)?)
        .await
        .unwrap_err();
    let (_, text) = http(&setup, "/metrics").await?;
    for line in [
        "nix_csi_calls_total{call=\"publish\",code=\"Ok\"} 2",
        "nix_csi_calls_total{call=\"publish\",code=\"NotFound\"} 1",
        "nix_csi_publish_duration_seconds_count{view=\"cold\"} 1",
        "nix_csi_publish_duration_seconds_count{view=\"warm\"} 1",
        &format!("nix_csi_fetched_paths_total {}", hello.closure.len()),
        "nix_csi_volumes 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
    for pod in ["a", "b"] {
        setup.unpublish(pod).await?;
    }
    setup.assert_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_volume_is_the_view_itself() -> Result<()> {
    let setup = Setup::new().await?;
    let hello = setup.fixtures.get("hello")?;
    let request = setup.request("a", &hello.path.to_string(), true)?;
    setup.publish(request.clone()).await?;
    let mounts = mounts_below(setup.dir.path())?;
    let [mount] = &mounts[..] else { anyhow::bail!("{} mounts", mounts.len()) };
    for flag in ["ro", "nosuid", "nodev"] {
        assert!(mount.options.split(',').any(|option| option == flag), "{}", mount.options);
    }
    assert!(!mount.options.contains("noexec"));

    let nix = setup.target("a");
    let mut seen: Vec<_> = fs::read_dir(nix.join("store"))?
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()?;
    seen.sort();
    let closure: Vec<_> = hello.closure.iter().map(|path| path.base_name().to_owned()).collect();
    assert_eq!(seen, closure, "the closure and nothing else");
    assert_eq!(fs::read_link(nix.join("var/result"))?, Path::new(&hello.path.to_string()));
    assert_eq!(fs::read_link(nix.join("nix"))?, Path::new("."));

    let program = Path::new("nix/store").join(hello.path.base_name()).join("bin/hello");
    assert_eq!(fs::metadata(nix.join(&program))?.ino(), fs::metadata(setup.root().join(&program))?.ino());
    // This test is root with every capability: only the mount is in its way.
    for attempt in [
        fs::write(nix.join("x"), "x"),
        fs::write(nix.join(&program), "x"),
        fs::remove_file(nix.join(&program)),
        fs::set_permissions(nix.join(&program), fs::metadata(nix.join(&program))?.permissions()),
    ] {
        assert_eq!(attempt.expect_err("read-only").kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }

    // Again, as after a restart of kubelet.
    setup.publish(request).await?;
    assert_eq!(mounts_below(setup.dir.path())?.len(), 1);
    setup.unpublish("a").await?;
    assert!(!setup.target("a").exists());
    setup.unpublish("a").await?;
    setup.unpublish("never-was").await?;
    setup.assert_empty()?;
    nix::verify(&setup.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_write_volume_keeps_its_writes_to_itself() -> Result<()> {
    let setup = Setup::new().await?;
    let hello = setup.fixtures.get("hello")?;
    for (pod, readonly) in [("writer", false), ("other", false), ("reader", true)] {
        setup.publish(setup.request(pod, &hello.path.to_string(), readonly)?).await?;
    }
    let program = Path::new("store").join(hello.path.base_name()).join("bin/hello");
    let before = fs::read(setup.target("reader").join(&program))?;
    fs::write(setup.target("writer").join("store/new"), "mine")?;
    fs::remove_file(setup.target("writer").join(&program))?;
    fs::write(setup.target("writer").join(&program), "changed")?;
    for pod in ["other", "reader"] {
        assert!(!setup.target(pod).join("store/new").exists(), "{pod} sees it");
        assert_eq!(fs::read(setup.target(pod).join(&program))?, before);
    }
    let overlays = mounts_below(setup.dir.path())?;
    let overlays: Vec<_> = overlays.iter().filter(|mount| mount.kind == "overlay").collect();
    assert_eq!(overlays.len(), 2);
    assert!(overlays.iter().all(|mount| mount.options.contains("nosuid") && mount.options.contains("nodev")));
    nix::verify(&setup.root())?;
    for pod in ["writer", "other", "reader"] {
        setup.unpublish(pod).await?;
    }
    setup.assert_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_outlive_a_reboot() -> Result<()> {
    let setup = Setup::new().await?;
    let request = setup.request("a", &setup.path("hello"), false)?;
    setup.publish(request.clone()).await?;
    fs::write(setup.target("a").join("note"), "kept")?;
    // All that a reboot does to a volume: the mount is gone, everything on disk is there.
    rustix::mount::unmount(setup.target("a"), rustix::mount::UnmountFlags::empty())?;
    setup.publish(request).await?;
    assert_eq!(fs::read_to_string(setup.target("a").join("note"))?, "kept");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_with_the_same_packages_share_inodes() -> Result<()> {
    let setup = Setup::new().await?;
    let (hello, bash) = (setup.path("hello"), setup.path("bash"));
    setup.publish(setup.request("a", &hello, true)?).await?;
    setup.publish(setup.request("b", &hello, true)?).await?;
    setup.publish(setup.request("c", &format!("{bash}\n{hello}"), true)?).await?;
    let program = |pod: &str| setup.target(pod).join(hello.trim_start_matches("/nix/")).join("bin/hello");
    assert_eq!(inode(&program("a"))?, inode(&program("b"))?);
    assert_eq!(inode(&program("a"))?, inode(&program("c"))?, "another view, the same file");
    assert_eq!(fs::read_dir(setup.root().join("views"))?.count(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_again_must_be_the_same() -> Result<()> {
    let setup = Setup::new().await?;
    let (hello, jq) = (setup.path("hello"), setup.path("jq"));
    setup.publish(setup.request("a", &hello, true)?).await?;
    let code = |result: Result<(), Status>| result.expect_err("refused").code();
    assert_eq!(code(setup.publish(setup.request("a", &jq, true)?).await), Code::AlreadyExists);
    assert_eq!(code(setup.publish(setup.request("a", &hello, false)?).await), Code::AlreadyExists);
    let elsewhere = NodePublishVolumeRequest {
        target_path: setup.request("b", &hello, true)?.target_path,
        ..setup.request("a", &hello, true)?
    };
    assert_eq!(code(setup.publish(elsewhere).await), Code::FailedPrecondition);
    let taken =
        NodePublishVolumeRequest { volume_id: "csi-other".into(), ..setup.request("a", &hello, true)? };
    assert_eq!(code(setup.publish(taken).await), Code::AlreadyExists);
    assert_eq!(mounts_below(setup.dir.path())?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_published_says_why_and_leaves_nothing() -> Result<()> {
    let mut setup = Setup::new().await?;
    let unknown = "/nix/store/00000000000000000000000000000000-unknown";
    for (paths, code, part) in [
        (
            "hello",
            Code::InvalidArgument,
            "volume attribute `paths`: line 1, column 1: \"hello\" is not a store path",
        ),
        (unknown, Code::NotFound, "no cache has /nix/store/00000000000000000000000000000000-unknown"),
        (&setup.path("unsigned"), Code::FailedPrecondition, "is not trusted: it has no signature"),
        (&setup.path("tampered"), Code::DataLoss, "has hash sha256:"),
        (&setup.path("other-path"), Code::DataLoss, "not about the path it was asked for"),
        (&setup.path("missing-nar"), Code::NotFound, "is gone, although its narinfo is there"),
    ] {
        let refused = setup.publish(setup.request("a", paths, true)?).await.expect_err(paths);
        assert_eq!(refused.code(), code, "{refused:?}");
        assert!(refused.message().contains(part), "{part:?} is not in {:?}", refused.message());
        assert!(!setup.target("a").exists());
    }
    let mut ambiguous = setup.request("a", &setup.path("coreutils"), true)?;
    ambiguous.volume_context.insert("entrypoint.web".into(), "auto".into());
    let refused = setup.publish(ambiguous).await.expect_err("which of them?");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("nix.lillecarl.com/command.web"), "{}", refused.message());
    setup.server.stop()?;
    let refused = setup.publish(setup.request("a", &setup.path("jq"), true)?).await.expect_err("no cache");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    setup.assert_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_point_is_found_where_the_files_are() -> Result<()> {
    let setup = Setup::new().await?;
    let mut request = setup.request("a", &setup.path("hello"), true)?;
    request.volume_context.insert("entrypoint.web".into(), "auto".into());
    setup.publish(request).await?;
    let link = fs::read_link(setup.target("a").join("var/entry/web"))?;
    assert_eq!(link, PathBuf::from(format!("{}/bin/hello", setup.path("hello"))));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_volumes_at_once() -> Result<()> {
    let setup = Setup::new().await?;
    let mut calls = Vec::new();
    for n in 0..40 {
        let name = ["hello", "jq", "python3"][n % 3];
        let request = setup.request(&format!("pod-{n}"), &setup.path(name), n % 2 == 0)?;
        let mut node = setup.node.clone();
        calls.push(tokio::spawn(async move { node.node_publish_volume(request).await }));
    }
    for call in calls {
        call.await??;
    }
    assert_eq!(mounts_below(setup.dir.path())?.len(), 40);
    assert_eq!(fs::read_dir(setup.root().join("views"))?.count(), 3);
    for n in 0..40 {
        setup.unpublish(&format!("pod-{n}")).await?;
    }
    setup.assert_empty()?;
    nix::verify(&setup.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_is_told_who_this_is() -> Result<()> {
    let mut setup = Setup::new().await?;
    let info = IdentityClient::new(channel(&setup.sockets.csi).await?)
        .get_plugin_info(GetPluginInfoRequest {})
        .await?
        .into_inner();
    assert_eq!(info.name, "nix-csi.lillecarl.com");
    let registration = setup.sockets.registration.clone().context("set above")?;
    let mut registrar = RegistrationClient::new(channel(&registration).await?);
    let plugin = registrar.get_info(InfoRequest {}).await?.into_inner();
    assert_eq!((plugin.r#type.as_str(), plugin.endpoint.as_str()), ("CSIPlugin", "/host/csi.sock"));
    assert_eq!((plugin.name, plugin.supported_versions), (info.name, vec!["1.0.0".to_owned()]));
    registrar
        .notify_registration_status(RegistrationStatus { plugin_registered: true, error: String::new() })
        .await?;
    // Asked to stop, it ends well and takes its sockets with it.
    drop(registrar);
    setup.node = NodeClient::new(Endpoint::from_static("http://[::]:1").connect_lazy());
    setup.stop.take().context("once")?.send(()).ok();
    tokio::time::timeout(Duration::from_mins(1), setup.serving.take().context("once")?).await???;
    assert!(!setup.sockets.csi.exists() && !registration.exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_startup_taint_goes_when_kubelet_knows_the_driver() -> Result<()> {
    let setup = Setup::new().await?;
    let at = format!("/api/v1/nodes/{NODE}");
    let taint = |key: &str| serde_json::json!({"key": key, "effect": "NoSchedule"});
    let (ours, others) = (taint("nix.lillecarl.com/agent-not-ready"), taint("example.com/other"));
    let node = |taints: &[&serde_json::Value]| {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"taints": taints},
        })
    };
    setup.api.put(&at, node(&[&others, &ours, &others]));
    let registration = setup.sockets.registration.as_ref().context("a registration socket")?;
    let mut kubelet = RegistrationClient::new(channel(registration).await?);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(setup.api.get(&at), Some(node(&[&others, &ours, &others])), "nobody has registered it yet");
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    kubelet.notify_registration_status(registered).await?;
    let start = Instant::now();
    while setup.api.get(&at) != Some(node(&[&others, &others])) {
        ensure!(start.elapsed() < Duration::from_secs(30), "{:?}", setup.api.get(&at));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_keeps_off_a_root_in_use() -> Result<()> {
    let setup = Setup::new().await?;
    let program = node_program()?;
    let run = |args: &[&str]| Command::new(&program).arg("--root").arg(setup.root()).args(args).output();
    let hello = setup.path("hello");
    for command in [&["fetch", &hello][..], &["view", &hello], &["delete-node-data", "--yes"]] {
        let output = run(command)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(text.contains("is in use by the driver of a test"), "{text}");
    }
    setup.publish(setup.request("a", &hello, true)?).await?;
    let listed = run(&["volumes"])?;
    let record: HashMap<String, serde_json::Value> = serde_json::from_slice(&listed.stdout)?;
    assert_eq!(record["volume"], "csi-a");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_sanity() -> Result<()> {
    let setup = Setup::new().await?;
    let program = std::env::var("CSI_SANITY").context("CSI_SANITY is not set: run `make kernel`")?;
    let pods = setup.dir.path().join("pods");
    let context = setup.request("sanity-volume", &setup.path("hello"), false)?.volume_context;
    let socket = setup.dir.path().join("stand-in.sock");
    let _stand_in = StandIn::start(&setup.sockets.csi, &socket, context).await?;
    // Skipped are the tests of controllers: the one here only hands out names, since an ephemeral driver has none.
    let output = tokio::process::Command::new(program)
        .arg(format!("--csi.endpoint=unix://{}", socket.display()))
        .arg(format!("--csi.mountdir={}", pods.join("sanity").display()))
        .arg(format!("--csi.stagingdir={}", pods.join("staging").display()))
        .args(["--ginkgo.no-color", "--ginkgo.v", "--ginkgo.skip=Controller"])
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{text}");
    let summary = text.lines().find(|line| line.starts_with("Ran ")).context("csi-sanity ran nothing")?;
    let ran: u32 = summary.split(' ').nth(1).context("a count")?.parse()?;
    ensure!(ran >= 16, "only {ran} tests of csi-sanity apply? {summary}");
    for name in ["should work", "should be idempotent", "should remove target path"] {
        let line =
            text.lines().find(|line| line.contains(name)).with_context(|| format!("{name}: {text}"))?;
        ensure!(!line.contains("SKIPPED"), "{line}");
    }
    setup.assert_empty()
}
