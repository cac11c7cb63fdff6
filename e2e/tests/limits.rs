//! How much a pod may write, and who sees what it wrote. Runs in a mount namespace that ends with it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config, mounts_below};
use nix_csi_e2e::idmap::{FIRST, UserNamespace, bind_mapped};
use nix_csi_e2e::small_fs::SmallFs;
use nix_csi_e2e::{Fixtures, nix};
use nix_csi_node::config::Config;
use rstest::rstest;
use rustix::mount::{UnmountFlags, unmount};
use tonic::Code;

const MIB: usize = 1 << 20;

fn fixtures() -> Result<Config> {
    config(&[format!("file://{}", Fixtures::find()?.cache("zstd").display())])
}

fn hello(pod: &str) -> Result<Volume> {
    Ok(Volume::new("shop", pod, &Fixtures::find()?.get("hello")?.path.to_string()))
}

fn in_memory(pod: &str, limit: &str) -> Result<Volume> {
    Ok(hello(pod)?.read_write().attribute("sizeLimit", limit).attribute("medium", "Memory"))
}

/// Fills what is at `target`, as root with every capability, up to twice the `limit`. Gives back how much fitted.
fn fill(target: &Path, limit: usize) -> Result<usize> {
    let (piece, mut written) = (vec![1; MIB / 4], 0);
    for n in 0..limit * 2 / piece.len() {
        let file = target.join(format!("store/{n}"));
        match fs::write(&file, &piece).and_then(|()| fs::File::open(&file)?.sync_all()) {
            Ok(()) => written += piece.len(),
            Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                return Ok(written);
            }
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("{written} bytes were written, and {limit} may be")
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_into_memory_end_at_their_limit_and_leave_nothing() -> Result<()> {
    let mut node = TestNode::start(&fixtures()?).await?;
    let volume = in_memory("a", "8Mi")?;
    node.publish(&volume).await??;
    let target = node.target("a");
    let mounts = mounts_below(target.ancestors().nth(3).context("above pods")?)?;
    let kinds: Vec<_> = mounts.iter().map(|mount| mount.kind.as_str()).collect();
    assert_eq!(kinds, ["overlay"], "what it writes into is mounted nowhere else");
    assert!(mounts[0].options.contains("nosuid") && mounts[0].options.contains("nodev"));
    let written = fill(&target, 8 * MIB)?;
    assert!(written > 6 * MIB && written <= 8 * MIB, "{written}");
    // All of it is in memory: what the volume has on the disk is a record, and a directory with nothing in it.
    let of_volume = node.root().join("volumes/csi-a");
    assert_eq!(fs::read_dir(of_volume.join("memory"))?.count(), 0);
    assert!(!of_volume.join("upper").exists());

    // The driver comes and goes, the pod runs on.
    node.start_driver(&fixtures()?).await?;
    node.publish(&volume).await??;
    assert!(target.join("store/0").exists());
    // Files are not for nothing either.
    fs::remove_file(target.join("store/0"))?;
    let made = (0..10_000).take_while(|n| fs::write(target.join(format!("store/file-{n}")), "").is_ok());
    let made = made.count();
    assert!((1000..3000).contains(&made), "{made} files of 8 MiB");

    // As an emptyDir in memory: a reboot takes it.
    unmount(&target, UnmountFlags::empty())?;
    node.publish(&volume).await??;
    assert!(!target.join("store/1").exists());
    fs::write(target.join("store/note"), "new")?;
    node.unpublish("a").await?;
    node.assert_empty()?;
    nix::verify(&node.root())
}

/// The memory is mounted at a place of its own for an instant: a driver may be killed in it.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_a_killed_call_left_is_taken_away() -> Result<()> {
    let mut node = TestNode::start(&fixtures()?).await?;
    let leave = |node: &TestNode, pod: &str| -> Result<()> {
        unmount(node.target(pod), UnmountFlags::empty())?;
        let memory = node.root().join(format!("volumes/csi-{pod}/memory"));
        let mounted = Command::new("mount").args(["-t", "tmpfs", "left"]).arg(&memory).status()?;
        ensure!(mounted.success(), "mount: {mounted}");
        Ok(fs::write(memory.join("left"), "left")?)
    };
    for pod in ["again", "over", "forgotten"] {
        node.publish(&in_memory(pod, "1Mi")?).await??;
        leave(&node, pod)?;
    }
    node.publish(&in_memory("again", "1Mi")?).await??;
    assert_eq!(mounts_below(&node.root())?.len(), 2, "of the other two");
    node.unpublish("again").await?;
    node.unpublish("over").await?;
    // Its pod was deleted by force, and kubelet knows nothing of it.
    fs::remove_dir_all(node.target("forgotten").parent().context("a pod")?)?;
    node.start_driver(&fixtures()?).await?;
    node.assert_empty()
}

#[rstest]
#[case::none(
    None,
    None,
    Code::PermissionDenied,
    "needs `sizeLimit` on this node, at most 4194304 bytes (max-size-limit)"
)]
#[case::too_much(
    Some("8Mi"),
    Some("Memory"),
    Code::PermissionDenied,
    "`sizeLimit` of 8388608 bytes is more than the 4194304"
)]
#[case::not_enforced(
    Some("4Mi"),
    None,
    Code::FailedPrecondition,
    "set `medium: Memory` beside it, or let the administrator mount that filesystem with prjquota"
)]
#[case::of_nothing(Some("0"), None, Code::InvalidArgument, "\"0\" is not a quantity like 500Mi")]
#[case::unlimited_memory(None, Some("Memory"), Code::InvalidArgument, "Memory needs `sizeLimit`")]
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_cannot_be_is_refused(
    #[case] limit: Option<&str>,
    #[case] medium: Option<&str>,
    #[case] code: Code,
    #[case] part: &str,
) -> Result<()> {
    let mut node = TestNode::new()?;
    node.start_driver(&Config { max_size_limit: Some(4 << 20), ..fixtures()? }).await?;
    let mut volume = hello("a")?.read_write();
    for (key, value) in [("sizeLimit", limit), ("medium", medium)] {
        if let Some(value) = value {
            volume = volume.attribute(key, value);
        }
    }
    let refused = node.refused(&volume).await?;
    assert_eq!(refused.code(), code, "{refused}");
    assert!(refused.message().contains(part), "{refused}");
    // What fits is served, and what cannot be written needs no limit.
    node.publish(&in_memory("b", "4Mi")?).await??;
    node.publish(&hello("c")?).await??;
    Ok(())
}

/// With a filesystem that has quotas it is held, and with one that has none it is refused. Which of them this kernel has
/// is its own matter; one of them is always tested.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_the_disk_is_held_or_refused() -> Result<()> {
    let disk = SmallFs::ext4_with_quotas(256 << 20)?;
    let has_quotas = disk.is_some();
    let disk = disk.map_or_else(|| SmallFs::ext4(256 << 20, None), Ok)?;
    let mut node = TestNode::in_dir(tempfile::tempdir_in(disk.path())?)?;
    node.start_driver(&fixtures()?).await?;
    let volume = |pod: &str| Ok::<_, anyhow::Error>(hello(pod)?.read_write().attribute("sizeLimit", "8Mi"));
    if !has_quotas {
        eprintln!("this kernel has no project quotas on ext4: only the refusal is tested");
        let refused = node.refused(&volume("a")?).await?;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        return node.assert_empty();
    }
    for pod in ["a", "b"] {
        node.publish(&volume(pod)?).await??;
        let written = fill(&node.target(pod), 8 * MIB)?;
        assert!(written > 6 * MIB && written <= 8 * MIB, "{written} by {pod}");
    }
    // It outlives a reboot with what was written.
    unmount(node.target("a"), UnmountFlags::empty())?;
    node.publish(&volume("a")?).await??;
    fs::write(node.target("a").join("store/more"), vec![1; MIB]).unwrap_err();
    // Who has no limit has none.
    node.publish(&hello("c")?.read_write()).await??;
    fs::write(node.target("c").join("store/large"), vec![1; 16 * MIB])?;
    for pod in ["a", "b", "c"] {
        node.unpublish(pod).await?;
    }
    node.assert_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_gets_no_new_writers() -> Result<()> {
    let mut node = TestNode::start(&fixtures()?).await?;
    let old = hello("old")?.read_write();
    node.publish(&old).await??;
    fs::write(node.target("old").join("note"), "kept")?;
    // More than any disk has.
    let mut full = fixtures()?;
    full.limits.min_free = Some(u64::MAX);
    node.start_driver(&full).await?;
    let refused = node.refused(&hello("new")?.read_write()).await?;
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("min-free"), "{refused}");
    // Whoever does not write to it, or has begun to, is not in its way.
    node.publish(&hello("reader")?).await??;
    node.publish(&in_memory("memory", "1Mi")?).await??;
    node.publish(&old).await??;
    unmount(node.target("old"), UnmountFlags::empty())?;
    node.publish(&old).await??;
    assert_eq!(fs::read_to_string(node.target("old").join("note"))?, "kept");
    Ok(())
}

/// What a runtime does with the volume of a pod that has a user namespace of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_volume_can_be_id_mapped_and_an_overlay_cannot() -> Result<()> {
    let node = TestNode::start(&fixtures()?).await?;
    node.publish(&hello("reader")?).await??;
    node.publish(&hello("writer")?.read_write()).await??;
    let namespace = UserNamespace::new()?;
    let mapped = tempfile::tempdir()?;
    bind_mapped(&node.target("reader"), mapped.path(), &namespace)??;
    let program = Path::new("store").join(Fixtures::find()?.get("hello")?.path.base_name()).join("bin/hello");
    let meta = fs::metadata(mapped.path().join(&program))?;
    let (on_node, by_pod) = (fs::metadata(node.target("reader").join(&program))?, (meta.uid(), meta.gid()));
    assert_eq!((on_node.uid(), by_pod), (0, (FIRST, FIRST)), "root of the pod, and not of the node");
    assert_eq!(meta.ino(), on_node.ino(), "the same file");
    assert_eq!(fs::read(mapped.path().join(&program))?, fs::read(node.target("reader").join(&program))?);
    let written = fs::write(mapped.path().join("store/x"), "x").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::ReadOnlyFilesystem);
    unmount(mapped.path(), UnmountFlags::empty())?;
    // Why the webhook refuses `mode: rw` with `hostUsers: false`. Once a kernel can, it need not any more.
    let refused = bind_mapped(&node.target("writer"), mapped.path(), &namespace)?.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    Ok(())
}
