//! The real program under a kubelet that never gives up: killed at any instant, rebooted, damaged, and asked again.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{BuildHasher as _, RandomState};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::mounts_below;
use nix_csi_e2e::nar_cache::SlowServer;
use nix_csi_e2e::process::{LIMIT, Process, is_final, names_ending, names_in, some_file};
use nix_csi_e2e::{CacheServer, Fixtures, Rule};
use nix_csi_node::store::NodeStore;
use nix_csi_store::StorePath;
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::Code;

/// The order of a run, which its seed gives again.
struct Random(u64);

impl Random {
    /// From `NIX_CSI_SEED`, or a new one.
    fn new() -> Result<(u64, Self)> {
        let seed = match std::env::var("NIX_CSI_SEED") {
            Ok(seed) => seed.parse().context("NIX_CSI_SEED")?,
            Err(_) => RandomState::new().hash_one(0) | 1,
        };
        Ok((seed, Self(seed)))
    }

    /// xorshift64.
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 16) % limit as u64).unwrap_or(0)
    }

    fn millis(&mut self, from: usize, to: usize) -> Duration {
        Duration::from_millis((from + self.below(to - from)) as u64)
    }
}

fn serve(compression: &str) -> Result<CacheServer> {
    CacheServer::start(&Fixtures::find()?.cache(compression))
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_calls_at_once_for_a_new_view_build_it_once() -> Result<()> {
    const CALLS: usize = 50;
    const NAMES: [&str; 2] = ["redis", "jq"];
    let server = serve("zstd")?;
    let node = Arc::new(Process::new(&server.url(), "")?);
    node.start()?;
    // The first one that is answered says that it serves.
    node.publish(&node.volume("first", &["multi-doc"], true)?).await?;
    let mut calls = JoinSet::new();
    for call in 0..CALLS {
        let node = Arc::clone(&node);
        calls.spawn(async move {
            let pod = format!("pod-{call}");
            let volume = node.volume(&pod, &NAMES, call % 2 == 0)?;
            node.publish_once(&volume).await?.with_context(|| pod.clone())?;
            node.shows(&pod, &NAMES)
        });
    }
    while let Some(called) = calls.join_next().await {
        node.explain(called?)?;
    }
    let asked: Vec<_> = server.requests(".nar.zst").into_iter().map(|seen| seen.target).collect();
    let mut wanted = HashSet::new();
    for name in NAMES.iter().chain(&["multi-doc"]) {
        wanted.extend(node.fixtures.get(name)?.closure);
    }
    assert_eq!(asked.len(), wanted.len(), "{asked:?}");
    assert_eq!(asked.iter().collect::<HashSet<_>>().len(), asked.len(), "{asked:?}");
    assert_eq!(names_in(&node.root().join("views"))?.len(), 2);
    // One inode: there are no two views behind the mounts.
    let jq = Path::new("store").join(node.fixtures.get("jq")?.path.base_name()).join("bin/jq");
    let of_store = fs::metadata(node.root().join("nix").join(&jq))?.ino();
    for call in (0..CALLS).step_by(2) {
        assert_eq!(fs::metadata(node.target(&format!("pod-{call}")).join(&jq))?.ino(), of_store);
    }
    for call in 0..CALLS {
        node.explain(node.unpublish(&format!("pod-{call}")).await)?;
    }
    node.unpublish("first").await?;
    node.explain(node.assert_in_order())
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_records_and_strange_targets_get_clear_answers_and_an_end() -> Result<()> {
    let server = serve("zstd")?;
    let node = Process::new(&server.url(), "")?;
    node.start()?;
    let result = damage(&node).await;
    node.explain(result)?;
    node.explain(node.assert_in_order())
}

async fn damage(node: &Process) -> Result<()> {
    const HELLO: &[&str] = &["hello"];
    let records = [("empty", ""), ("cut", r#"{"volume":"csi-"#), ("other", r#"["something", "else"]"#)];
    for (name, text) in records {
        for readonly in [true, false] {
            let pod = format!("{name}-{readonly}");
            let volume = node.volume(&pod, HELLO, readonly)?;
            let (target, record) = (node.target(&pod), node.kept(&pod).join("record.json"));
            node.publish(&volume).await?;
            let written = target.join("note");
            if !readonly {
                fs::write(&written, &pod)?;
            }
            // Mounted: whose it is cannot be said, so it stays as it is.
            fs::write(&record, text)?;
            let status = node.publish_once(&volume).await?.err().context("it was published")?;
            ensure!(status.code() == Code::Internal, "{status:?}");
            ensure!(status.message().contains("is not a volume record"), "{status:?}");
            node.shows(&pod, HELLO)?;
            // Also not by a new process.
            node.kill()?;
            node.start()?;
            let start = Instant::now();
            while node.ask(&volume).await.is_err_and(|status| !is_final(&status)) {
                ensure!(start.elapsed() < LIMIT, "it does not start");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            node.shows(&pod, HELLO)?;
            ensure!(node.kept(&pod).exists(), "{pod} was forgotten");
            // Not mounted, as after a boot: written anew, and nothing of the pod is lost.
            rustix::mount::unmount(&target, UnmountFlags::empty())?;
            node.publish(&volume).await?;
            node.shows(&pod, HELLO)?;
            ensure!(readonly || fs::read_to_string(&written)? == pod, "{pod} has lost what it wrote");
            // And damaged once more, for the end.
            fs::write(&record, text)?;
            node.unpublish(&pod).await?;
        }
    }

    // A directory without a record, of a volume that comes only now.
    fs::create_dir(node.kept("bare"))?;
    node.publish(&node.volume("bare", HELLO, true)?).await?;
    node.shows("bare", HELLO)?;
    // A mount without a record is nobody's that the driver knows.
    fs::remove_file(node.kept("bare").join("record.json"))?;
    let status = node.publish_once(&node.volume("bare", HELLO, true)?).await?.err().context("published")?;
    ensure!(status.code() == Code::AlreadyExists, "{status:?}");
    node.shows("bare", HELLO)?;
    node.unpublish("bare").await?;
    fs::create_dir(node.kept("never"))?;
    node.unpublish("never").await?;

    // Somebody else is there already.
    let target = node.target("taken");
    fs::create_dir_all(&target)?;
    rustix::mount::mount("theirs", &target, "tmpfs", MountFlags::empty(), None)?;
    fs::write(target.join("theirs"), "theirs")?;
    for readonly in [true, false] {
        let volume = node.volume("taken", HELLO, readonly)?;
        let status = node.publish_once(&volume).await?.err().context("it was published")?;
        ensure!(status.code() == Code::AlreadyExists, "{status:?}");
        ensure!(status.message().contains("in use by another mount"), "{status:?}");
        ensure!(fs::read_to_string(target.join("theirs"))? == "theirs", "theirs is gone");
        ensure!(!node.kept("taken").exists(), "it was recorded");
    }
    rustix::mount::unmount(&target, UnmountFlags::empty())?;
    node.publish(&node.volume("taken", HELLO, true)?).await?;
    node.shows("taken", HELLO)?;
    node.unpublish("taken").await?;

    // Its target is gone, and then all of its pod.
    for pod in ["again", "gone"] {
        let volume = node.volume(pod, HELLO, false)?;
        node.publish(&volume).await?;
        rustix::mount::unmount(node.target(pod), UnmountFlags::empty())?;
        fs::remove_dir(node.target(pod))?;
        if pod == "again" {
            node.publish(&volume).await?;
            node.shows(pod, HELLO)?;
        } else {
            node.forget(pod)?;
            let status = node.ask(&volume).await.err().context("it was published")?;
            ensure!(status.code() == Code::Internal, "{status:?}");
            ensure!(!node.target(pod).exists(), "a directory of a pod that is gone was made");
        }
        node.unpublish(pod).await?;
    }
    // Whatever was never there has an end, too.
    node.unpublish("unknown").await
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reboot_volumes_come_back_with_what_was_written() -> Result<()> {
    let server = serve("zstd")?;
    let node = Process::new(&server.url(), "")?;
    let result = reboot(&node).await;
    node.explain(result)?;
    node.explain(node.assert_in_order())
}

async fn reboot(node: &Process) -> Result<()> {
    const SETS: [&[&str]; 3] = [&["hello"], &["jq", "busybox"], &["hello"]];
    let volumes =
        || SETS.iter().enumerate().flat_map(|(set, names)| [(set, *names, true), (set, *names, false)]);
    let pod = |set: usize, readonly: bool| format!("pod-{set}-{readonly}");
    node.start()?;
    for (set, names, readonly) in volumes() {
        let pod = pod(set, readonly);
        node.publish(&node.volume(&pod, names, readonly)?).await?;
        if !readonly {
            fs::write(node.target(&pod).join("note"), &pod)?;
            // Over what the view has, and in its place: both are of the upper.
            let package = node.target(&pod).join("store").join(node.fixtures.get(names[0])?.path.base_name());
            fs::create_dir(package.join("of the pod"))?;
            fs::remove_file(some_file(&package.join("bin"))?.context("a program")?)?;
        }
    }
    // Nothing that was registered is in doubt: this is about the volumes.
    node.stop()?;
    node.start()?;
    node.publish(&node.volume(&pod(0, true), SETS[0], true)?).await?;
    node.kill()?;
    for mount in mounts_below(&node.pods())? {
        rustix::mount::unmount(&mount.target, UnmountFlags::empty())?;
    }
    // Two were deleted by force while the node was down.
    for readonly in [true, false] {
        node.forget(&pod(2, readonly))?;
    }
    node.start_after_a_boot()?;
    let first = node.volume(&pod(0, true), SETS[0], true)?;
    let start = Instant::now();
    while node.client().await.is_err() {
        node.is_well()?;
        ensure!(start.elapsed() < LIMIT, "it does not serve");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(names_in(&node.root().join("views"))?.is_empty(), "views of another boot are not trusted");
    for readonly in [true, false] {
        ensure!(!node.kept(&pod(2, readonly)).exists(), "a volume that kubelet forgot is left");
    }
    node.publish(&first).await?;
    for (set, names, readonly) in volumes().filter(|(set, ..)| *set < 2) {
        let pod = pod(set, readonly);
        node.publish(&node.volume(&pod, names, readonly)?).await?;
        if readonly {
            node.shows(&pod, names)?;
            continue;
        }
        let package = node.target(&pod).join("store").join(node.fixtures.get(names[0])?.path.base_name());
        ensure!(fs::read_to_string(node.target(&pod).join("note"))? == pod, "{pod} has lost its file");
        ensure!(package.join("of the pod").is_dir(), "{pod} has lost its directory");
        let built = node.fixtures.store().join("nix/store").join(package.file_name().context("a name")?);
        let deleted = some_file(&built.join("bin"))?.context("a program")?;
        ensure!(!package.join(deleted.strip_prefix(&built)?).exists(), "{pod}: what it deleted is back");
    }
    for (set, _, readonly) in volumes() {
        node.unpublish(&pod(set, readonly)).await?;
    }
    Ok(())
}

const SETS: [&[&str]; 12] = [
    &["hello"],
    &["jq"],
    &["bash"],
    &["coreutils"],
    &["busybox"],
    &["multi-bin"],
    &["multi-dev", "multi-doc"],
    &["redis"],
    &["hello", "jq"],
    &["jq", "hello"],
    &["bash", "coreutils", "busybox"],
    &["redis", "multi-bin", "hello"],
];

/// What becomes of one pod.
struct Life {
    pod: String,
    names: &'static [&'static str],
    readonly: bool,
    /// How long it lives, and whether over a kill of the driver.
    lives: Duration,
    over_a_kill: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_pods_come_and_go_while_the_driver_is_killed() -> Result<()> {
    const PODS: usize = 200;
    const AT_ONCE: usize = 8;
    let (seed, mut random) = Random::new()?;
    let server = serve("zstd")?;
    let node = Arc::new(Process::new(&server.url(), "")?);
    node.start()?;
    let lives = (0..PODS).map(|number| Life {
        pod: format!("pod-{number}"),
        names: SETS[random.below(SETS.len())],
        readonly: random.below(2) == 0,
        lives: random.millis(0, 300),
        over_a_kill: random.below(4) == 0,
    });
    let lives = Arc::new(Mutex::new(lives.collect::<Vec<_>>()));
    let mut workers: JoinSet<Result<()>> = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (node, lives) = (Arc::clone(&node), Arc::clone(&lives));
        workers.spawn(async move {
            loop {
                let Some(life) = lives.lock().unwrap().pop() else { return Ok(()) };
                live(&node, &life).await.with_context(|| life.pod.clone())?;
            }
        });
    }
    let done = async {
        while let Some(ended) = workers.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    let killed = async {
        loop {
            tokio::time::sleep(random.millis(500, 2500)).await;
            node.kill()?;
            node.start()?;
        }
    };
    let ended = tokio::select! {
        done = done => done,
        killed = killed => killed,
    };
    let check = || {
        ended?;
        ensure!(node.kills() > 2, "only {} kills", node.kills());
        // A process that finds what all the others left.
        node.kill()?;
        node.start()
    };
    node.explain(check()).with_context(|| format!("NIX_CSI_SEED={seed}"))?;
    node.publish(&node.volume("last", SETS[0], true)?).await?;
    node.unpublish("last").await?;
    node.explain(node.assert_in_order()).with_context(|| format!("NIX_CSI_SEED={seed}"))
}

async fn live(node: &Process, Life { pod, names, readonly, lives, over_a_kill }: &Life) -> Result<()> {
    let volume = node.volume(pod, names, *readonly)?;
    node.publish(&volume).await?;
    node.shows(pod, names)?;
    let written = node.target(pod).join("note");
    ensure!(fs::write(&written, pod).is_ok() != *readonly, "writable, or not");
    let (kills, start) = (node.kills(), Instant::now());
    tokio::time::sleep(*lives).await;
    while *over_a_kill && node.kills() == kills && start.elapsed() < LIMIT {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Kubelet does so after it was restarted itself.
    node.publish(&volume).await?;
    node.shows(pod, names)?;
    ensure!(*readonly || fs::read_to_string(&written)? == *pod, "what it wrote is lost");
    node.unpublish(pod).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_and_views_that_are_killed_again_and_again_get_done() -> Result<()> {
    let (seed, random) = Random::new()?;
    let fixtures = Fixtures::find()?;
    // The closures here have some 30 MB: a few seconds of fetching.
    let server = SlowServer::start(&fixtures.cache("zstd"), 6_000_000)?;
    let node = Process::new(&server.url(), "")?;
    node.start()?;
    let result = kill_again_and_again(&node, &server, random).await;
    node.explain(result).with_context(|| format!("NIX_CSI_SEED={seed}"))?;
    node.explain(node.assert_in_order()).with_context(|| format!("NIX_CSI_SEED={seed}"))
}

/// When the driver is killed.
#[derive(Clone, Copy)]
enum When {
    /// So long after the call began.
    After(Duration),
    /// So long after a new path was locked or moved in, to be registered.
    Registering(Duration),
    /// So long after a view was begun.
    Linking(Duration),
}

impl When {
    async fn comes(self, root: &Path) -> Result<()> {
        let (dir, is_it, then): (_, fn(&str) -> bool, _) = match self {
            Self::After(time) => {
                tokio::time::sleep(time).await;
                return Ok(());
            }
            Self::Registering(then) => ("nix/store", |_| true, then),
            Self::Linking(then) => ("views", |name| name.starts_with('.'), then),
        };
        let dir = root.join(dir);
        // What a killed process left is not what is waited for.
        let old: HashSet<_> = names_in(&dir)?.into_iter().collect();
        while !names_in(&dir)?.iter().any(|name| is_it(name) && !old.contains(name)) {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        tokio::time::sleep(then).await;
        Ok(())
    }
}

async fn kill_again_and_again(node: &Process, server: &SlowServer, mut random: Random) -> Result<()> {
    const KILLS: usize = 20;
    const NAMES: [&str; 4] = ["python3", "redis", "jq", "hello"];
    let (root, mut had) = (node.root(), HashSet::new());
    let nothing_again = |had: &HashSet<String>| {
        let asked: HashSet<_> = server.take_asked().into_iter().collect();
        let again: Vec<_> = had.intersection(&asked).collect();
        ensure!(again.is_empty(), "fetched again: {again:?}");
        Ok(())
    };
    let mut met = 0;
    let mut orders = Vec::new();
    for order in 0..NAMES.len().pow(4) {
        let of = [order % 4, order / 4 % 4, order / 16 % 4, order / 64].map(|index| NAMES[index]);
        if of.iter().collect::<HashSet<_>>().len() == NAMES.len() {
            orders.push(of);
        }
    }
    for (number, names) in orders.iter().enumerate() {
        let pod = format!("pod-{number}");
        let volume = node.volume(&pod, names, number % 2 == 0)?;
        // The first view needs a fetch. The others have the same closure, so that kills meet the building.
        let mut kills = Vec::new();
        if number == 0 {
            kills.extend((0..8).map(|_| When::After(random.millis(50, 700))));
            kills.extend((0..6).map(|_| When::Registering(random.millis(0, 12))));
        } else {
            kills.push(When::Linking(random.millis(0, 10)));
        }
        for when in kills {
            let killed = tokio::select! {
                came = when.comes(&root) => came.map(|()| true)?,
                called = node.publish(&volume) => called.map(|()| false)?,
            };
            node.kill()?;
            met += usize::from(killed);
            nothing_again(&had)?;
            // What was restored is lost to the next but one if it was moved into the store and not registered.
            had = registered(node)?;
            had.extend(restored(node)?);
            node.start()?;
        }
        node.publish(&volume).await?;
        node.shows(&pod, names)?;
        nothing_again(&had)?;
    }
    ensure!(met >= KILLS, "only {met} kills met a call");
    for number in 0..orders.len() {
        node.unpublish(&format!("pod-{number}")).await?;
    }
    Ok(())
}

/// The NARs of all that is registered, while no driver runs.
fn registered(node: &Process) -> Result<HashSet<String>> {
    let valid = NodeStore::open(&node.root())?.valid_paths()?;
    valid.iter().map(|info| nar_of(node, &info.path)).collect()
}

/// The NARs of what a driver that was killed had restored, and said so.
fn restored(node: &Process) -> Result<HashSet<String>> {
    let staging = node.root().join("staging");
    let mut nars = HashSet::new();
    for name in names_ending(&staging, ".json")? {
        // One may be half written, or of something that was moved on.
        let record = serde_json::from_slice::<Value>(&fs::read(staging.join(&name))?).unwrap_or_default();
        let path = record["path"].as_str().filter(|_| staging.join(&name).with_extension("").exists());
        if let Some(path) = path {
            nars.insert(nar_of(node, &path.parse()?)?);
        }
    }
    Ok(nars)
}

fn nar_of(node: &Process, path: &StorePath) -> Result<String> {
    let hash = path.base_name().split('-').next().unwrap_or_default();
    let info = fs::read_to_string(node.fixtures.cache("zstd").join(format!("{hash}.narinfo")))?;
    Ok(info.lines().find_map(|line| line.strip_prefix("URL: ")).context("a URL")?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_a_driver_that_was_killed_are_given_back_and_those_of_others_are_not() -> Result<()> {
    let server = serve("zstd")?;
    let node = Process::new(&server.url(), "")?;
    node.start()?;
    let volume = node.volume("one", &["jq"], true)?;
    node.publish(&volume).await?;
    node.kill()?;
    let of = |name: &str| anyhow::Ok(node.fixtures.get(name)?.path.base_name().to_owned());
    let store = node.root().join("nix/store");
    let lock = |of: &str| {
        let mut file = File::options();
        file.write(true).create_new(true).mode(0o600).open(store.join(format!("{of}.lock")))
    };
    // Killed after the paths were registered and before they were unlocked: nothing brings their locks back to it.
    let jq: String = of("jq")?;
    drop(lock(&jq)?);
    // Killed before: then there is a path that is not valid, and nobody may ever want it again.
    let stray: String = of("busybox")?;
    drop(lock(&stray)?);
    // A real Nix that is at work.
    let others: String = of("bash")?;
    let held = lock(&others)?;
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive)?;
    node.start()?;
    node.publish(&volume).await?;
    let left = names_ending(&store, ".lock")?;
    node.explain((left == [format!("{others}.lock")]).then_some(()).with_context(|| format!("{left:?}")))?;
    fs::remove_file(store.join(format!("{others}.lock")))?;
    drop(held);
    node.unpublish("one").await?;
    node.explain(node.assert_in_order())
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_get_their_volumes_once_a_cache_comes_back() -> Result<()> {
    const PODS: usize = 6;
    const STALL: Duration = Duration::from_mins(1);
    let server = serve("zstd")?;
    let more = "download-attempts = 2\nstalled-download-timeout = 1\nconnect-timeout = 2";
    let node = Arc::new(Process::new(&server.url(), more)?);
    node.start()?;
    let mut pods = JoinSet::new();
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let rules = |status: Option<u16>| {
        server.behave();
        for suffix in [".narinfo", ".nar.zst"] {
            let rule = Rule::on(suffix);
            server.rule(status.map_or(rule.clone().delay(STALL), |status| rule.status(status)));
        }
    };
    rules(Some(500));
    for number in 0..PODS {
        let (node, seen) = (Arc::clone(&node), Arc::clone(&seen));
        pods.spawn(async move {
            let (pod, names) = (format!("pod-{number}"), SETS[number % 3]);
            let volume = node.volume(&pod, names, number % 2 == 0)?;
            let start = Instant::now();
            // Also after an answer that is final for one call: kubelet begins anew.
            while let Err(status) = node.publish_once(&volume).await? {
                node.is_well()?;
                ensure!(start.elapsed() < LIMIT, "{pod}: {status:?}");
                ensure!(mounts_below(&node.target(&pod))?.is_empty(), "{pod} has a mount and an error");
                seen.lock().unwrap().insert(format!("{:?}", status.code()));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            node.shows(&pod, names)?;
            node.unpublish(&pod).await
        });
    }
    let until = async |code: &str| {
        let start = Instant::now();
        while !seen.lock().unwrap().contains(code) {
            ensure!(start.elapsed() < LIMIT, "nobody was told {code}, but {:?}", seen.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    let story = async {
        until("Unavailable").await?;
        rules(Some(404));
        until("NotFound").await?;
        rules(None);
        let before = server.requests("").len();
        while server.requests("").len() == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seen.lock().unwrap().clear();
        until("Unavailable").await?;
        server.behave();
        while let Some(ended) = pods.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    let told = story.await;
    node.explain(told)?;
    node.explain(node.assert_in_order())
}
