//! What a volume may ask for beside its packages. Runs in a mount namespace that ends with it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Result, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config};
use nix_csi_e2e::{ApiServer, CacheServer, Fixtures, Rule, nix};
use nix_csi_node::config::Config;
use nix_csi_store::StorePath;
use rstest::rstest;
use rustix::mount::{UnmountFlags, unmount};
use tonic::Code;

const TOKEN: &str = "a-token";
const NOWHERE: &str = "/nix/store/00000000000000000000000000000000-nowhere";

/// A node with a driver, the fixtures' zstd cache, and an API server that writes down events.
struct Setup {
    fixtures: Fixtures,
    cache: CacheServer,
    api: ApiServer,
    config: Config,
    node: TestNode,
}

impl Setup {
    async fn new() -> Result<Self> {
        let fixtures = Fixtures::find()?;
        let cache = CacheServer::start(&fixtures.cache("zstd"))?;
        let (api, mut node) = (ApiServer::start()?, TestNode::new()?);
        let config = config(&[cache.url()])?;
        node.set_kubernetes(&api)?;
        node.start_driver(&config).await?;
        Ok(Self { fixtures, cache, api, config, node })
    }

    fn path(&self, name: &str) -> StorePath {
        self.fixtures.get(name).expect("a fixture").path
    }

    /// A volume of hello that can do without `optional`.
    fn volume(&self, pod: &str, optional: &str) -> Volume {
        Volume::new("shop", pod, &self.path("hello").to_string()).attribute("optionalPaths", optional)
    }

    /// Whether the volume of a pod has a fixture in it.
    fn has(&self, pod: &str, name: &str) -> bool {
        self.node.target(pod).join("store").join(self.path(name).base_name()).exists()
    }

    /// The cache gives all it has, and the driver has forgotten what it did not give before.
    async fn behave(&mut self) -> Result<()> {
        self.cache.behave();
        self.node.start_driver(&self.config).await
    }

    fn views(&self) -> Result<usize> {
        Ok(fs::read_dir(self.node.root().join("views"))?.count())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_no_cache_has_is_left_out_until_one_has_it() -> Result<()> {
    let mut setup = Setup::new().await?;
    let jq = setup.path("jq");
    let narinfo = format!("{}.narinfo", jq.hash());
    setup.cache.rule(Rule::on(&narinfo).status(404));
    let volume = |pod: &str| setup.volume(pod, &format!("{jq}\n{NOWHERE}"));
    setup.node.publish(&volume("a")).await??;
    assert!(setup.has("a", "hello") && !setup.has("a", "jq"));
    let told = setup.api.wait_for("NixOptionalMissing")?;
    assert_eq!((told.len(), told[0].pod.as_str(), told[0].kind.as_str()), (1, "a", "Warning"));
    let beginning = format!("the volume does without {jq}, {NOWHERE}: no cache has {jq} (asked: ");
    assert!(told[0].message.starts_with(&beginning), "{}", told[0].message);
    assert_eq!(setup.node.metric("nix_csi_optional_paths_left_out_total")?, "2");
    assert_eq!(setup.node.record("a")?.optional.unwrap().left_out.len(), 2);

    // It is the view of whoever asks for hello alone.
    setup.node.publish(&Volume::new("shop", "b", &setup.path("hello").to_string())).await??;
    assert_eq!(setup.node.record("b")?.view, setup.node.record("a")?.view);
    // Again, as after a restart of kubelet: nothing is asked, nothing changes.
    let asked = setup.cache.requests(".narinfo").len();
    setup.node.publish(&volume("a")).await??;
    assert_eq!(setup.cache.requests(".narinfo").len(), asked);

    // Somebody has pushed it. What is mounted stays as it is, the next pod has it.
    setup.behave().await?;
    let volume = setup.volume("c", &format!("{jq}\n{NOWHERE}"));
    setup.node.publish(&volume).await??;
    assert!(setup.has("c", "jq") && !setup.has("a", "jq"));
    let program = setup.node.target("c").join("var/result/bin/jq");
    assert_eq!(fs::read_link(program)?, Path::new(&jq.to_string()).join("bin/jq"));
    assert_eq!(setup.views()?, 2);
    for pod in ["a", "b", "c"] {
        setup.node.unpublish(pod).await?;
    }
    setup.node.assert_empty()?;
    nix::verify(&setup.node.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn once_all_of_it_is_there_nobody_is_asked() -> Result<()> {
    let setup = Setup::new().await?;
    let volume = |pod: &str| setup.volume(pod, &setup.path("jq").to_string());
    setup.node.publish(&volume("a")).await??;
    assert!(setup.has("a", "hello") && setup.has("a", "jq"));
    setup.cache.rule(Rule::on("").hang_up());
    let asked = setup.cache.requests("").len();
    setup.node.publish(&volume("b")).await??;
    assert_eq!(setup.node.metric("nix_csi_publish_duration_seconds_count{view=\"warm\"}")?, "1");
    assert_eq!(setup.cache.requests("").len(), asked);
    assert_eq!(setup.api.told("NixOptionalMissing"), []);
    // Whether it can be done without makes no other view.
    let both = format!("{} {}", setup.path("hello"), setup.path("jq"));
    setup.node.publish(&Volume::new("shop", "c", &both)).await??;
    assert_eq!(setup.views()?, 1);
    // But another request.
    let other = Volume::new("shop", "b", &both);
    assert_eq!(setup.node.publish(&other).await?.unwrap_err().code(), Code::AlreadyExists);
    Ok(())
}

#[rstest]
#[case::not_signed("unsigned", "is not trusted: it has no signature")]
#[case::other_bytes("tampered", "has hash sha256:")]
#[case::only_a_narinfo("missing-nar", "is gone, although its narinfo is there")]
#[case::a_page("narinfo-html", "is not a valid narinfo")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_path_is_told_and_the_path_is_not_served(
    #[case] name: &str,
    #[case] reason: &str,
) -> Result<()> {
    let setup = Setup::new().await?;
    let (bad, jq) = (setup.path(name), setup.path("jq"));
    setup.node.publish(&setup.volume("a", &format!("{bad} {jq}"))).await??;
    assert!(setup.has("a", "hello") && setup.has("a", "jq"), "one is not in the way of the next");
    assert!(!setup.node.target("a").join("store").join(bad.base_name()).exists());
    let told = setup.api.wait_for("NixOptionalMissing")?;
    let message = &told[0].message;
    assert!(message.contains(&bad.to_string()) && message.contains(reason), "{message}");
    assert!(!message.contains(&format!("without {jq}")), "{message}");
    // What is needed is not optional.
    let refused = setup.node.refused(&Volume::new("shop", "b", &bad.to_string())).await?;
    assert!(refused.message().contains(reason), "{refused}");
    setup.node.unpublish("a").await?;
    setup.node.assert_empty()?;
    nix::verify(&setup.node.root())
}

/// What is on the node for one namespace is not there for another, also where it can be done without.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_private_to_another_namespace_is_left_out() -> Result<()> {
    let setup = Setup::new().await?;
    let jq = setup.fixtures.get("jq")?;
    let hello = setup.fixtures.get("hello")?;
    for path in jq.closure.iter().filter(|path| !hello.closure.contains(path)) {
        let narinfo = format!("{}.narinfo", path.hash());
        setup.cache.rule(Rule::on(narinfo).demand_or(format!("Bearer {TOKEN}"), 404));
    }
    let volume = |namespace: &str, pod: &str| Volume {
        namespace: namespace.into(),
        ..setup.volume(pod, &jq.path.to_string())
    };
    let secret = format!("127.0.0.1 {TOKEN}\n");
    setup.node.publish(&volume("a", "a1").secret("bearer-tokens", &secret)).await??;
    assert!(setup.has("a1", "jq"));
    setup.node.publish(&volume("b", "b1")).await??;
    assert!(setup.has("b1", "hello") && !setup.has("b1", "jq"), "b sees what was given to a");
    let told = setup.api.wait_for("NixOptionalMissing")?;
    assert!(told[0].message.contains(&format!("no cache has {}", jq.path)), "{}", told[0].message);
    assert_eq!(told[0].pod, "b1");
    // The view with all of it is warm for one, and not for the other.
    setup.node.publish(&volume("a", "a2")).await??;
    assert!(setup.has("a2", "jq"));
    setup.node.publish(&volume("b", "b2")).await??;
    assert!(!setup.has("b2", "jq"));
    setup.node.publish(&volume("b", "b3").secret("bearer-tokens", &secret)).await??;
    assert!(setup.has("b3", "jq"));
    nix::verify(&setup.node.root())
}

/// Its upper lies over the view that it had, whatever could be had by now.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_write_volume_keeps_what_it_began_with() -> Result<()> {
    let mut setup = Setup::new().await?;
    let jq = setup.path("jq");
    setup.cache.rule(Rule::on(format!("{}.narinfo", jq.hash())).status(404));
    let writer = setup.volume("writer", &jq.to_string()).read_write();
    let reader = setup.volume("reader", &jq.to_string());
    for volume in [&writer, &reader] {
        setup.node.publish(volume).await??;
    }
    let note = setup.node.target("writer").join("store/note");
    fs::write(&note, "kept")?;
    setup.behave().await?;
    // All that a reboot does to volumes.
    for pod in ["writer", "reader"] {
        unmount(setup.node.target(pod), UnmountFlags::empty())?;
    }
    for volume in [&writer, &reader] {
        setup.node.publish(volume).await??;
    }
    assert!(setup.has("reader", "jq") && !setup.has("writer", "jq"));
    assert_eq!(fs::read_to_string(&note)?, "kept");
    // And again, with everything in place.
    for volume in [&writer, &reader] {
        setup.node.publish(volume).await??;
    }
    Ok(())
}

/// Volumes as other projects write them: lists by system, JSON, and `/nix` by way of `subPath: nix`.
#[rstest]
#[case::paths_as_json("paths", true)]
#[case::of_this_system("x86_64-linux", false)]
#[case::of_this_system_as_json("x86_64-linux", true)]
#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_other_projects_are_served(#[case] key: &str, #[case] json: bool) -> Result<()> {
    let setup = Setup::new().await?;
    let (hello, jq) = (setup.path("hello").to_string(), setup.path("jq").to_string());
    let list = if json { serde_json::json!([hello, jq]).to_string() } else { format!("{hello}\n{jq}\n") };
    let mut volume = Volume::new("shop", "a", "").attribute(key, list);
    volume.attributes.retain(|(name, value)| name != "paths" || !value.is_empty());
    // Of no use here, and no reason to refuse it.
    let volume = volume.attribute("aarch64-linux", NOWHERE);
    for (pod, readonly) in [("a", true), ("b", false)] {
        let volume = Volume { pod: pod.into(), readonly, ..volume.clone() };
        setup.node.publish(&volume).await??;
        let target = setup.node.target(pod);
        // With `subPath: nix` kubelet resolves the link within the volume, and mounts what it leads to.
        for nix in [target.clone(), fs::canonicalize(target.join("nix"))?] {
            ensure!(nix.starts_with(&target), "{} leads out of the volume", nix.display());
            assert!(nix.join("var/result/bin/hello").symlink_metadata().is_ok());
            let base = Path::new(&jq).file_name().unwrap();
            assert!(nix.join("store").join(base).join("bin/jq").exists());
            assert_eq!(fs::read_link(nix.join("var/result/bin/jq"))?, Path::new(&jq).join("bin/jq"));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_says_how_much_it_holds() -> Result<()> {
    let setup = Setup::new().await?;
    let hello = Volume::new("shop", "reader", &setup.path("hello").to_string());
    let of = |pod: &str| Volume { pod: pod.into(), ..hello.clone() };
    let limited = of("limited").read_write().attribute("sizeLimit", "8Mi").attribute("medium", "Memory");
    for volume in [of("reader"), of("writer").read_write(), limited] {
        setup.node.publish(&volume).await??;
    }
    // The view: as large as the closure, and as full as it will ever be.
    let (bytes, inodes, condition) = setup.node.stats("reader").await?;
    let (size, entries) = measured(&setup.node.target("reader"))?;
    assert_eq!((bytes.used, bytes.total, bytes.available), (size, size, 0));
    assert_eq!((inodes.used, inodes.total, inodes.available), (entries, entries, 0));
    assert_eq!(condition, None);

    // What the pod wrote, on a disk that it shares.
    let (before, before_inodes, _) = setup.node.stats("writer").await?;
    fs::write(setup.node.target("writer").join("store/note"), vec![1; 1 << 20])?;
    let (after, after_inodes, condition) = setup.node.stats("writer").await?;
    assert!((1 << 20..2 << 20).contains(&(after.used - before.used)), "{before:?} {after:?}");
    assert_eq!(after_inodes.used - before_inodes.used, 2, "the directory was copied up");
    let disk = rustix::fs::statvfs(setup.node.root())?;
    assert_eq!(u64::try_from(after.total)?, disk.f_blocks * disk.f_frsize);
    assert_eq!(condition, None);

    // With a limit of its own.
    fs::write(setup.node.target("limited").join("store/note"), vec![1; 1 << 20])?;
    let (bytes, inodes, _) = setup.node.stats("limited").await?;
    assert_eq!((bytes.total, inodes.total), (8 << 20, 2048));
    assert!((1 << 20..2 << 20).contains(&bytes.used), "{bytes:?}");
    assert_eq!(bytes.available, bytes.total - bytes.used);

    for (pod, path) in
        [("reader", "/elsewhere".to_owned()), ("never-was", setup.node.target("x").display().to_string())]
    {
        let request = nix_csi_proto::csi::NodeGetVolumeStatsRequest {
            volume_id: format!("csi-{pod}"),
            volume_path: path,
            ..Default::default()
        };
        let said = setup.node.client()?.node_get_volume_stats(request).await.unwrap_err();
        assert_eq!(said.code(), Code::NotFound, "{said}");
    }
    Ok(())
}

/// What `du` says of a directory without itself: bytes of blocks, and entries.
fn measured(dir: &Path) -> Result<(i64, i64)> {
    let (mut bytes, mut entries) = (0, 0);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        (bytes, entries) = (bytes + i64::try_from(meta.blocks())? * 512, entries + 1);
        if meta.is_dir() {
            let (below, number) = measured(&entry.path())?;
            (bytes, entries) = (bytes + below, entries + number);
        }
    }
    Ok((bytes, entries))
}

/// A view whose files were found damaged is built anew, and whoever has the old one is told so.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_shows_damaged_files_says_so() -> Result<()> {
    let setup = Setup::new().await?;
    let hello = setup.path("hello");
    for pod in ["reader", "writer"] {
        let volume = Volume { readonly: pod == "reader", ..Volume::new("shop", pod, &hello.to_string()) };
        setup.node.publish(&volume).await??;
    }
    // As a repair does.
    let views = setup.node.root().join("views");
    let id = setup.node.record("reader")?.view;
    fs::rename(views.join(&id), views.join(format!("{id}.retired-1")))?;
    for pod in ["reader", "writer"] {
        let condition = setup.node.stats(pod).await?.2.unwrap_or_default();
        assert!(condition.contains("delete the pod"), "{pod}: {condition:?}");
    }
    // The next pod has a good one, and the old one still knows that it is not its.
    setup.node.publish(&Volume::new("shop", "next", &hello.to_string())).await??;
    assert_eq!(setup.node.stats("next").await?.2, None);
    assert!(setup.node.stats("reader").await?.2.is_some());
    Ok(())
}
