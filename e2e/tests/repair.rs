//! Damage that is found and repaired while a driver serves: what its pods see, and what comes after them. Runs in a
//! mount namespace that ends with it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config};
use nix_csi_e2e::{Fixtures, StaticServer, nix, node_program};
use serde_json::Value;

/// A program in a package, and its bytes with one of them changed on the node.
fn damage(store: &Path, package: &str) -> Result<(PathBuf, Vec<u8>)> {
    let file = store.join(package).join("bin/hello");
    let good = fs::read(&file)?;
    File::options().write(true).open(&file)?.write_all_at(&[good[100] ^ 1], 100)?;
    Ok((file, good))
}

async fn verify(root: &Path, repair: &[&str]) -> Result<(Output, Vec<Value>)> {
    let mut command = tokio::process::Command::new(node_program()?);
    command.arg("--root").arg(root).arg("verify").args(repair).stdin(Stdio::null()).env("NO_COLOR", "1");
    let output = command.output().await?;
    let lines = String::from_utf8(output.stdout.clone())?;
    let events = lines.lines().map(|line| serde_json::from_str(line).context(line.to_owned()));
    Ok((output, events.collect::<Result<_>>()?))
}

fn called<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

/// The command finds the store held and asks the driver. Whoever has the damaged files keeps them, and nothing is
/// written to those; whoever comes gets good ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_driver_repairs_its_store_while_it_serves() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let server = StaticServer::start(&fixtures.cache("zstd"))?;
    let node = TestNode::start(&config(&[server.url()])?).await?;
    let hello = fixtures.get("hello")?;
    let volume = |pod: &str| Volume::new("shop", pod, &hello.path.to_string());
    let reader = volume("reader");
    let writer = Volume { readonly: false, ..volume("writer") };
    for volume in [&reader, &writer] {
        node.publish(volume).await??;
    }
    let (file, good) = damage(&node.root().join("nix/store"), hello.path.base_name())?;
    let bad = fs::read(&file)?;
    let shown = |pod: &str| node.target(pod).join("store").join(hello.path.base_name()).join("bin/hello");
    let inode = fs::metadata(shown("reader"))?.ino();

    // Without --repair it only looks.
    let (output, events) = verify(&node.root(), &[]).await?;
    ensure!(!output.status.success());
    assert_eq!(called(&events, "damaged")[0]["path"], hello.path.to_string());
    assert_eq!(fs::read(&file)?, bad);

    let (output, events) = verify(&node.root(), &["--repair"]).await?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{log}");
    assert!(log.contains("the driver of a test"), "it says who does it: {log}");
    let [repaired] = called(&events, "repaired")[..] else { anyhow::bail!("{events:?}") };
    let volumes: Vec<_> = repaired["volumes"].as_array().context("a list")?.clone();
    assert_eq!(volumes, ["csi-reader", "csi-writer"]);
    let [verified] = called(&events, "verified")[..] else { anyhow::bail!("{events:?}") };
    assert_eq!((&verified["damaged"], &verified["repaired"]), (&1.into(), &1.into()));
    nix::verify(&node.root())?;

    for pod in ["reader", "writer"] {
        assert_eq!(fs::read(shown(pod))?, bad, "{pod} goes on with what it had");
    }
    assert_eq!(fs::metadata(shown("reader"))?.ino(), inode);
    node.publish(&volume("later")).await??;
    assert_eq!(fs::read(shown("later"))?, good);
    // A publish that kubelet repeats is still a success for those who have the old view.
    node.publish(&reader).await??;
    for pod in ["reader", "writer", "later"] {
        node.unpublish(pod).await?;
    }
    node.assert_empty()?;
    let (output, _) = verify(&node.root(), &["--repair"]).await?;
    ensure!(output.status.success(), "the same again, with nothing to do");
    Ok(())
}

/// What no cache gives any more is said with its cause, and the rest is repaired all the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_repaired_is_named_and_does_not_stop_the_rest() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let server = StaticServer::start(&fixtures.cache("zstd"))?;
    let mut node = TestNode::start(&config(&[server.url()])?).await?;
    let hello = fixtures.get("hello")?;
    let volume = Volume::new("shop", "reader", &hello.path.to_string());
    node.publish(&volume).await??;
    let (file, good) = damage(&node.root().join("nix/store"), hello.path.base_name())?;
    let bad = fs::read(&file)?;
    node.stop_driver().await?;
    node.start_driver(&config(&["http://127.0.0.1:9".to_owned()])?).await?;
    let (output, events) = verify(&node.root(), &["--repair"]).await?;
    ensure!(!output.status.success());
    let [failed] = called(&events, "notRepaired")[..] else { anyhow::bail!("{events:?}") };
    assert_eq!(failed["path"], hello.path.to_string());
    assert!(failed["error"].as_str().is_some_and(|error| error.contains("127.0.0.1:9")), "{failed}");
    assert_eq!(fs::read(&file)?, bad, "nothing was touched");
    node.stop_driver().await?;
    node.start_driver(&config(&[server.url()])?).await?;
    let (output, _) = verify(&node.root(), &["--repair"]).await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(&file)?, good);
    node.unpublish("reader").await?;
    node.assert_empty()
}

/// A command that goes away in the middle, a second one at the same time, and a socket without a driver.
#[tokio::test(flavor = "multi_thread")]
async fn verification_is_for_one_at_a_time() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let server = StaticServer::start(&fixtures.cache("zstd"))?;
    let mut node = TestNode::start(&config(&[server.url()])?).await?;
    let python = fixtures.get("python3")?;
    node.publish(&Volume::new("shop", "a", &python.path.to_string())).await??;
    let root = node.root();
    let (first, second) = tokio::try_join!(verify(&root, &["--repair"]), verify(&root, &["--repair"]))?;
    for (output, _) in [&first, &second] {
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() || log.contains("is being verified already"), "{log}");
    }
    ensure!(first.0.status.success() || second.0.status.success(), "one of them gets its turn");
    node.unpublish("a").await?;
    node.stop_driver().await?;
    // Left by a process that was killed; whoever holds the lock now is not a driver.
    let socket = node.root().join("control.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    let lock = nix_csi_node::store::RootLock::acquire(&node.root(), "somebody else")?;
    let (output, _) = verify(&node.root(), &["--repair"]).await?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && log.contains("does not answer"), "{log}");
    drop(lock);
    node.start_driver(&config(&[server.url()])?).await?;
    node.assert_empty()
}
