//! Views where linking meets a limit. Runs in a mount namespace that ends with it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix_csi_e2e::driver::{TestNode, Volume, config};
use nix_csi_e2e::small_fs::SmallFs;
use nix_csi_e2e::{ApiServer, Fixture, Fixtures, nix, tree};
use nix_csi_node::config::Config;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use tonic::Code;

/// As many links as a file can have on ext4.
const MOST_LINKS: u64 = 65_000;

fn fixtures() -> Result<Config> {
    config(&[format!("file://{}", Fixtures::find()?.cache("zstd").display())])
}

fn fixture(name: &str) -> Result<Fixture> {
    Fixtures::find()?.get(name)
}

fn volume(pod: &str, names: &[&str]) -> Result<Volume> {
    let paths: Vec<_> =
        names.iter().map(|name| Ok(fixture(name)?.path.to_string())).collect::<Result<_>>()?;
    Ok(Volume::new("shop", pod, &paths.join("\n")))
}

fn views(node: &TestNode) -> Result<Vec<PathBuf>> {
    fs::read_dir(node.root().join("views"))?.map(|entry| Ok(entry?.path())).collect()
}

fn roots_of_views(node: &TestNode) -> Result<usize> {
    Ok(fs::read_dir(node.root().join("nix/var/nix/gcroots/nix-csi"))?.count())
}

/// Links `file` in `dir` until it has as many links as it can have.
fn exhaust(file: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    for n in 0.. {
        match fs::hard_link(file, dir.join(n.to_string())) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::TooManyLinks => break,
            Err(error) => return Err(error.into()),
        }
    }
    assert_eq!(fs::symlink_metadata(file)?.nlink(), MOST_LINKS);
    Ok(())
}

/// Files in directories, files that are packages, and symlinks of both kinds, each with a link less than is needed.
#[tokio::test(flavor = "multi_thread")]
async fn what_can_have_no_more_links_is_copied() -> Result<()> {
    let disk = SmallFs::ext4(512 << 20, None)?;
    let mut node = TestNode::in_dir(tempfile::tempdir_in(disk.path())?)?;
    node.start_driver(&fixtures()?).await?;
    let names = ["hello", "plain-file", "symlink-root", "odd-names"];
    node.publish(&volume("a", &names)?).await??;
    let store = node.root().join("nix/store");
    let at = |name: &str| Ok::<_, anyhow::Error>(store.join(fixture(name)?.path.base_name()));
    let link_in_odd = fs::read_dir(at("odd-names")?)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.is_symlink())
        .context("a symlink among odd names")?;
    let full = [at("hello")?.join("bin/hello"), at("plain-file")?, at("symlink-root")?, link_in_odd];
    for (n, file) in full.iter().enumerate() {
        exhaust(file, &disk.path().join(format!("links/{n}")))?;
    }

    let other = volume("b", &names)?.attribute("database", "true");
    node.publish(&other).await??;
    assert_eq!(node.metric("nix_csi_view_copied_files_total")?, full.len().to_string());
    for file in &full {
        let below = file.strip_prefix(&store)?;
        let (of_a, of_b) =
            (node.target("a").join("store").join(below), node.target("b").join("store").join(below));
        let inode = |path: &Path| fs::symlink_metadata(path).map(|meta| meta.ino());
        assert_eq!(inode(&of_a)?, inode(file)?, "built before, it is linked");
        assert_ne!(inode(&of_b)?, inode(file)?, "{}", of_b.display());
        assert_eq!(tree::describe(&of_b)?, tree::describe(file)?);
        if !file.is_symlink() {
            assert_eq!(fs::read(&of_b)?, fs::read(file)?);
        }
    }
    // All else is one inode still.
    let library = fixture("hello")?.closure.into_iter().find(|path| path.name().contains("glibc"));
    if let Some(library) = library {
        let below = Path::new("store").join(library.base_name());
        let seen = |pod: &str| fs::metadata(node.target(pod).join(&below)).map(|meta| meta.nlink());
        assert_eq!(seen("a")?, seen("b")?);
    }
    for pod in ["a", "b"] {
        node.unpublish(pod).await?;
    }
    node.assert_empty()?;
    nix::verify(&node.root())
}

/// Somebody mounts something below the driver's directory, where all must be one mount.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_linked_is_an_error_that_names_both_places() -> Result<()> {
    let node = TestNode::start(&fixtures()?).await?;
    let views_dir = node.root().join("views");
    mount_bind(&views_dir, &views_dir)?;
    let refused = node.publish(&volume("a", &["hello"])?).await?.unwrap_err();
    let left = (views(&node)?, roots_of_views(&node)?);
    unmount(&views_dir, UnmountFlags::DETACH)?;
    assert_eq!(refused.code(), Code::Internal, "{refused}");
    let store = node.root().join("nix/store");
    for place in [store.as_path(), &views_dir] {
        assert!(refused.message().contains(&*place.to_string_lossy()), "{refused}");
    }
    assert!(refused.message().contains("must be in one mount of one filesystem"), "{refused}");
    assert_eq!(left, (Vec::new(), 0));
    node.publish(&volume("a", &["hello"])?).await??;
    node.unpublish("a").await?;
    node.assert_empty()
}

/// The closure is there, and its view finds no room: on tmpfs each link is an inode.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_without_room_leaves_nothing_half_built() -> Result<()> {
    let disk = SmallFs::tmpfs(512 << 20, Some(20_000))?;
    let mut node = TestNode::in_dir(tempfile::tempdir_in(disk.path())?)?;
    node.start_driver(&fixtures()?).await?;
    node.publish(&volume("a", &["hello", "wide-dir"])?).await??;
    let before = (views(&node)?, roots_of_views(&node)?);
    let ballast = disk.path().join("ballast");
    fs::create_dir(&ballast)?;
    for n in 0.. {
        if disk.free()?.inodes < 1000 {
            break;
        }
        fs::write(ballast.join(n.to_string()), "")?;
    }
    let other = volume("b", &["hello", "wide-dir"])?.attribute("database", "true");
    let refused = node.refused(&other).await?;
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("No space left on device"), "{refused}");
    tree::wait_until_clean(&node.root())?;
    assert_eq!((views(&node)?, roots_of_views(&node)?), before);
    fs::remove_dir_all(&ballast)?;
    node.publish(&other).await??;
    for pod in ["a", "b"] {
        node.unpublish(pod).await?;
    }
    node.assert_empty()?;
    nix::verify(&node.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_several_packages_have_are_told() -> Result<()> {
    let (api, mut node) = (ApiServer::start()?, TestNode::new()?);
    node.set_kubernetes(&api)?;
    node.start_driver(&fixtures()?).await?;
    let (coreutils, busybox) = (fixture("coreutils")?.path, fixture("busybox")?.path);
    node.publish(&volume("a", &["coreutils", "busybox"])?).await??;
    let bin = node.target("a").join("var/result/bin");
    assert_eq!(fs::read_link(bin.join("ls"))?, Path::new(&format!("{coreutils}/bin/ls")));
    assert_eq!(fs::read_link(bin.join("vi"))?, Path::new(&format!("{busybox}/bin/vi")));
    let told = api.wait_for("NixProfileCollision")?;
    let message = &told[0].message;
    let shown = format!("is {coreutils}/bin/");
    assert!(message.contains(&shown) && message.contains(" more"), "{message}");
    assert!(message.len() < 1000, "{message}");
    let counted: u64 = node.metric("nix_csi_profile_collisions_total")?.parse()?;
    let both = |name: &str| {
        let of = |package: &nix_csi_store::StorePath| {
            node.root()
                .join("nix/store")
                .join(package.base_name())
                .join("bin")
                .join(name)
                .symlink_metadata()
                .is_ok()
        };
        of(&coreutils) && of(&busybox)
    };
    let in_both = fs::read_dir(&bin)?
        .filter(|entry| entry.as_ref().is_ok_and(|entry| both(&entry.file_name().to_string_lossy())));
    assert_eq!(counted, in_both.count() as u64);
    assert!(message.starts_with(&format!("{counted} times several packages")), "{message}");
    // The other way round it is another view, with the others' files.
    node.publish(&volume("b", &["busybox", "coreutils"])?).await??;
    let bin = node.target("b").join("var/result/bin");
    assert_eq!(fs::read_link(bin.join("ls"))?, Path::new(&format!("{busybox}/bin/ls")));
    Ok(())
}
