//! Real Nix in a pod: the view has its database, as if the closure were all of a store.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config};
use nix_csi_e2e::nix::{self, Nix};
use nix_csi_e2e::{CacheServer, Fixture, Fixtures};
use rstest::rstest;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

/// A directory with a volume at `nix`, as a pod has it at `/nix`.
struct Pod {
    dir: tempfile::TempDir,
}

impl Pod {
    fn new(volume: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("nix"))?;
        mount_bind(volume, dir.path().join("nix"))?;
        Ok(Self { dir })
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("nix/var/nix")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path().join("nix"), UnmountFlags::DETACH);
    }
}

fn volume(package: &Fixture, database: &str, readonly: bool) -> Volume {
    let mut volume = Volume::new("shop", "pod", &package.path.to_string());
    volume.attributes.push(("database".into(), database.into()));
    volume.readonly = readonly;
    volume
}

/// Debian 12's, and newer ones.
#[rstest]
#[case::own(None)]
#[case::trixie(Some("trixie"))]
#[case::sid(Some("sid"))]
#[tokio::test(flavor = "multi_thread")]
async fn nix_works_in_a_volume_that_can_be_written(#[case] release: Option<&str>) -> Result<()> {
    let fixtures = Fixtures::find()?;
    let cache = CacheServer::start(&fixtures.cache("zstd"))?;
    let node = TestNode::start(&config(&[cache.url()])?).await?;
    let bash = fixtures.get("bash")?;
    node.publish(&volume(&bash, "true", false)).await??;
    let pod = Pod::new(&node.target("pod"))?;
    let nix = match release {
        Some(release) => Nix::of(release)?,
        None => Nix::own(),
    };
    // The sandbox wants what a pod need not have.
    let nix = nix.in_root(pod.dir.path()).with_config("sandbox = false\nbuild-users-group =\n");

    nix.run(["nix-store", "--verify", "--check-contents"])?;
    let path = bash.path.to_string();
    let mut closure: Vec<_> = nix.run(["nix-store", "-qR", &path])?.lines().map(ToOwned::to_owned).collect();
    closure.sort();
    assert_eq!(closure, bash.closure.iter().map(ToString::to_string).collect::<Vec<_>>());
    let experimental = ["nix", "--extra-experimental-features", "nix-command"];
    let info = nix.run(experimental.into_iter().chain(["path-info", "--sigs", &path]))?;
    ensure!(info.contains("nix-csi-test-1:"), "no signature: {info}");

    let expression = format!(
        "derivation {{ name = \"x\"; system = builtins.currentSystem; builder = \"{path}/bin/bash\"; \
         args = [ \"-c\" \"echo hello > $out\" ]; }}"
    );
    let built = nix.run(["nix-build", "--no-out-link", "-E", &expression])?;
    let built = pod.dir.path().join(built.trim().trim_start_matches('/'));
    assert_eq!(fs::read_to_string(built)?, "hello\n");
    nix.run(["nix-store", "--verify", "--check-contents"])?;
    drop(pod);

    // All of it was the pod's own.
    node.unpublish("pod").await?;
    node.assert_empty()?;
    nix::verify(&node.root())?;
    node.publish(&volume(&bash, "true", true)).await??;
    let left: Vec<_> = fs::read_dir(node.target("pod").join("store"))?.collect();
    assert_eq!(left.len(), bash.closure.len() + 1, "the closure, and `.links`");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_reads_works_in_one_that_cannot() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let cache = CacheServer::start(&fixtures.cache("zstd"))?;
    let node = TestNode::start(&config(&[cache.url()])?).await?;
    let bash = fixtures.get("bash")?;
    node.publish(&volume(&bash, "true", true)).await??;
    let pod = Pod::new(&node.target("pod"))?;
    let nix = Nix::of("sid")?.in_root(pod.dir.path());
    let features = "nix-command read-only-local-store";
    let args = ["nix", "--extra-experimental-features", features, "path-info", "-r"];
    let path = bash.path.to_string();
    let info = nix.run(args.into_iter().chain(["--store", "local?read-only=true", &path]))?;
    assert_eq!(info.lines().count(), bash.closure.len());
    assert_eq!(fs::read_to_string(pod.state().join("db/schema"))?, "10");
    let entries: Vec<_> =
        fs::read_dir(pod.state().join("db"))?.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(entries.len(), 2, "one file, and the number of its schema: {entries:?}");
    Ok(())
}

#[rstest]
#[case::as_it_is(None, false)]
#[case::asked_for(Some("true"), true)]
#[case::not_wanted(Some("false"), false)]
#[tokio::test(flavor = "multi_thread")]
async fn without_nix_there_is_a_database_only_if_it_is_asked_for(
    #[case] asked: Option<&str>,
    #[case] expected: bool,
) -> Result<()> {
    let fixtures = Fixtures::find()?;
    let cache = CacheServer::start(&fixtures.cache("zstd"))?;
    let node = TestNode::start(&config(&[cache.url()])?).await?;
    let mut volume = Volume::new("shop", "pod", &fixtures.get("hello")?.path.to_string());
    volume.attributes.extend(asked.map(|asked| ("database".into(), asked.into())));
    node.publish(&volume).await??;
    assert_eq!(node.target("pod").join("var/nix/db/db.sqlite").exists(), expected);
    Ok(())
}
