//! The driver is killed between every two steps of publish, fetch, view, unpublish, collection and repair. Whoever comes
//! after it finds what is needed, and leaves nothing. Runs in a mount namespace that ends with it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::mounts_below;
use nix_csi_e2e::process::{LIMIT, Process, names_in, some_file};
use nix_csi_e2e::{CacheServer, Fixtures, nix, node_program};
use nix_csi_node::fault::POINTS;

/// Every point whose name begins so. None is left out: a point that is not reached fails its test.
fn points(prefixes: &[&str]) -> impl Iterator<Item = &'static str> {
    POINTS.iter().copied().filter(move |point| prefixes.iter().any(|prefix| point.starts_with(prefix)))
}

fn node() -> Result<(CacheServer, Process)> {
    let server = CacheServer::start(&Fixtures::find()?.cache("zstd"))?;
    let node = Process::new(&server.url(), "")?;
    Ok((server, node))
}

/// Until the process has been killed, which its sync or its trash may take a moment to come to.
async fn is_killed(node: &Process) -> Result<()> {
    let start = Instant::now();
    while node.kills() == 0 {
        node.is_well()?;
        ensure!(start.elapsed() < LIMIT, "this point is never reached");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[test]
fn every_point_belongs_to_a_test() {
    let tested = points(&LIFE).chain(points(&["memory."]));
    let tested = tested.chain(points(&["collect."])).chain(points(&["repair."]));
    assert_eq!(tested.count(), POINTS.len());
}

const LIFE: [&str; 7] = ["fetch.", "register.", "publish.", "view.", "sync.", "unpublish.", "trash."];

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_pods_life() -> Result<()> {
    for point in points(&LIFE) {
        let (_server, node) = node()?;
        node.start_killed_at(point)?;
        let lived = live(&node).await;
        node.explain(lived).context(point)?;
        node.explain(node.assert_in_order()).context(point)?;
    }
    Ok(())
}

/// One that reads and one that writes, out of one view, and another that comes when both are gone.
async fn live(node: &Process) -> Result<()> {
    const NAMES: &[&str] = &["hello", "jq"];
    let (reader, writer) = (node.volume("reader", NAMES, true)?, node.volume("writer", NAMES, false)?);
    node.publish(&reader).await?;
    node.publish(&writer).await?;
    node.shows("reader", NAMES)?;
    let written = node.target("writer").join("note");
    fs::write(&written, "mine")?;
    // What syncs does so beside calls, a few seconds later.
    let mut killed = Box::pin(is_killed(node));
    let _ = tokio::time::timeout(Duration::from_secs(8), &mut killed).await;
    drop(killed);
    // Kubelet asks again for what it had.
    node.publish(&reader).await?;
    node.publish(&writer).await?;
    ensure!(fs::read_to_string(&written)? == "mine", "what it wrote is lost");
    node.unpublish("reader").await?;
    node.unpublish("writer").await?;
    is_killed(node).await?;
    node.publish(&node.volume("later", NAMES, true)?).await?;
    node.shows("later", NAMES)?;
    node.unpublish("later").await
}

/// For an instant what a volume writes into is mounted in the driver's directory.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_volume_in_memory() -> Result<()> {
    for (point, comes_again) in points(&["memory."]).flat_map(|point| [(point, true), (point, false)]) {
        let (_server, node) = node()?;
        node.start_killed_at(point)?;
        let volume = node.volume("writer", &["hello"], false)?;
        let volume = volume.attribute("sizeLimit", "4Mi").attribute("medium", "Memory");
        let lived = async {
            let start = Instant::now();
            while node.kills() == 0 {
                // Nobody may be there yet.
                let _ = node.publish_once(&volume).await?;
                node.is_well()?;
                ensure!(start.elapsed() < LIMIT, "this point is never reached");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            if comes_again {
                node.publish(&volume).await?;
                node.shows("writer", &["hello"])?;
                fs::write(node.target("writer").join("note"), "mine")?;
                node.publish(&volume).await?;
                ensure!(
                    fs::read_to_string(node.target("writer").join("note"))? == "mine",
                    "it is another one"
                );
            }
            // Also when the pod went away meanwhile.
            node.unpublish("writer").await?;
            ensure!(mounts_below(&node.root())?.is_empty(), "memory is left");
            Ok(())
        };
        node.explain(lived.await).context(point)?;
        node.explain(node.assert_in_order()).context(point)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_collection() -> Result<()> {
    for point in points(&["collect."]) {
        let (_server, node) = node()?;
        node.start()?;
        node.publish(&node.volume("old", &["redis"], true)?).await?;
        node.publish(&node.volume("live", &["hello"], true)?).await?;
        node.unpublish("old").await?;
        node.stop()?;
        let conf = node.dir.path().join("nix.conf");
        let options = fs::read_to_string(&conf)?;
        // More than any disk has free: all that nobody uses goes.
        fs::write(&conf, options.replace("min-free = 0", "min-free = 1000000T"))?;
        node.start_killed_at(point)?;
        let collected = async {
            is_killed(&node).await?;
            let start = Instant::now();
            while names_in(&node.root().join("views"))?.len() > 1
                || node.root().join("nix/store").join(node.fixtures.get("redis")?.path.base_name()).exists()
            {
                node.is_well()?;
                ensure!(start.elapsed() < LIMIT, "the next process does not collect the rest");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            node.publish(&node.volume("live", &["hello"], true)?).await?;
            node.shows("live", &["hello"])?;
            // What is gone comes back for whoever asks.
            node.publish(&node.volume("new", &["redis"], true)?).await?;
            node.shows("new", &["redis"])?;
            node.unpublish("new").await?;
            node.unpublish("live").await
        };
        node.explain(collected.await).context(point)?;
        node.explain(node.assert_in_order()).context(point)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_repair() -> Result<()> {
    for point in points(&["repair."]) {
        let (_server, node) = node()?;
        node.start()?;
        let volume = node.volume("old", &["hello"], true)?;
        node.publish(&volume).await?;
        node.stop()?;
        let package = node.root().join("nix/store").join(node.fixtures.get("hello")?.path.base_name());
        let file = some_file(&package.join("bin"))?.context("a program")?;
        let byte = fs::read(&file)?[50];
        File::options().write(true).open(&file)?.write_all_at(&[byte ^ 1], 50)?;
        node.start_killed_at(point)?;
        node.publish(&volume).await?;
        let repaired = async {
            // The first time the driver is killed under the command, which must say so.
            ensure!(!repair(&node).await?, "the driver was not killed");
            is_killed(&node).await?;
            node.publish(&volume).await?;
            ensure!(repair(&node).await?, "the next one does it");
            node.publish(&node.volume("new", &["hello"], true)?).await?;
            node.shows("new", &["hello"])?;
            node.unpublish("new").await?;
            node.unpublish("old").await?;
            nix::verify(&node.root())
        };
        node.explain(repaired.await).context(point)?;
        node.explain(node.assert_in_order()).context(point)?;
    }
    Ok(())
}

/// Whether the command ended well.
async fn repair(node: &Process) -> Result<bool> {
    let mut command = tokio::process::Command::new(node_program()?);
    command.arg("--root").arg(node.root()).args(["verify", "--repair"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status().await?.success())
}
