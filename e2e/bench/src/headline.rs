//! The same ten sets of packages, once as images and once as volumes, on the same node.
//!
//! Images are pulled from a registry on the node, closures from a cache on the node. There are two kinds of images: of
//! one layer each, as a Containerfile with one `COPY` makes it, and with a layer for each store path, those of python3
//! first, which is the most that layers can share.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix_csi_e2e::Fixtures;
use nix_csi_e2e::cluster::{Namespace, eventually, with_namespace};
use nix_csi_store::StorePath;
use rustix::fs::Advice;
use serde_json::{Value, json};

use crate::images::Images;
use crate::report::{self, Against, Figure};

/// Beside python3.
const SETS: [&[&str]; 10] = [
    &["hello"],
    &["bash"],
    &["coreutils"],
    &["jq"],
    &["nginx"],
    &["redis"],
    &["busybox"],
    &["bash", "coreutils"],
    &["nginx", "jq"],
    &["redis", "bash", "hello"],
];

/// What each pod runs: much of python's library, then a program of each of the other packages.
const SCRIPT: &str = "\
import asyncio, decimal, email.message, http.server, json, sqlite3, ssl, subprocess, sys, time, xml.etree.ElementTree
for program in sys.argv[1:]:
    subprocess.run([program, '--version'], stdin=subprocess.DEVNULL, capture_output=True)
print('ready', flush=True)
time.sleep(100000)
";

/// Where the registry is, on the node.
const REGISTRY: &str = "localhost:5000";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The directory of the cluster that is up.
    #[arg(long, env = "NIX_CSI_CLUSTER_STATE")]
    cluster: PathBuf,
    /// Where images are made.
    #[arg(long)]
    work: PathBuf,
    /// Where to write the figures.
    #[arg(long)]
    json: PathBuf,
}

/// How a set comes to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum System {
    OneLayer,
    Layers,
    Volumes,
}

impl System {
    const ALL: [Self; 3] = [Self::OneLayer, Self::Layers, Self::Volumes];

    fn name(self) -> &'static str {
        match self {
            Self::OneLayer => "images of one layer",
            Self::Layers => "images, a layer for each path",
            Self::Volumes => "nix-csi volumes",
        }
    }

    fn namespace(self) -> &'static str {
        match self {
            Self::OneLayer => "one-layer",
            Self::Layers => "layers",
            Self::Volumes => "volumes",
        }
    }
}

/// One of the ten.
struct Set {
    pod: String,
    packages: Vec<StorePath>,
    /// What it has beside python3's closure.
    rest: Vec<StorePath>,
    /// What its pod is started with.
    command: Vec<String>,
}

/// What was measured of one system.
struct Outcome {
    disk: f64,
    page_cache: f64,
    cold: Vec<f64>,
    warm: Vec<f64>,
}

/// Measures all three on the cluster that is up.
pub(crate) fn run(options: &Options) -> Result<()> {
    let fixtures = Fixtures::find()?;
    let python = fixtures.get("python3")?;
    let sets: Vec<_> = (1..).zip(SETS).map(|(n, names)| set(&fixtures, n, names)).collect::<Result<_>>()?;

    eprintln!("bench: making images");
    let mut images = Images::new(&options.work, &fixtures.store())?;
    for set in &sets {
        let all = [python.closure.clone(), set.rest.clone()].concat();
        images.add(&image_name(System::OneLayer, set), std::slice::from_ref(&all))?;
        images.add(
            &image_name(System::Layers, set),
            &all.into_iter().map(|path| vec![path]).collect::<Vec<_>>(),
        )?;
    }
    drop(images);
    let _registry = start_registry(&options.work)?;

    let mut outcomes = Vec::new();
    for system in System::ALL {
        eprintln!("bench: {}", system.name());
        let mut outcome = None;
        with_namespace(system.namespace(), |namespace| {
            outcome = Some(measure(system, &sets, namespace, &options.cluster)?);
            Ok(())
        })?;
        outcomes.push(outcome.context("no outcome")?);
    }
    let [one_layer, layers, volumes] = outcomes.try_into().ok().context("three outcomes")?;
    let mut figures = self::figures(&volumes, &one_layer, System::OneLayer);
    figures.extend(self::figures(&volumes, &layers, System::Layers));
    report::print(&figures)?;
    report::write(&options.json, &figures, |name| !name.starts_with("headline"))
}

fn set(fixtures: &Fixtures, n: usize, names: &[&str]) -> Result<Set> {
    let python = fixtures.get("python3")?;
    let mut packages = vec![python.path.clone()];
    let mut command = vec![format!("{}/bin/python3", python.path), "-c".to_owned(), SCRIPT.to_owned()];
    let mut rest = BTreeSet::new();
    for name in names {
        let fixture = fixtures.get(name)?;
        command.push(format!("{}/{}", fixture.path, program(name)));
        packages.push(fixture.path);
        rest.extend(fixture.closure);
    }
    let rest = rest.into_iter().filter(|path| !python.closure.contains(path)).collect();
    Ok(Set { pod: format!("set-{n}"), packages, rest, command })
}

fn program(package: &str) -> String {
    match package {
        "coreutils" => "bin/ls".to_owned(),
        "redis" => "bin/redis-server".to_owned(),
        name => format!("bin/{name}"),
    }
}

fn image_name(system: System, set: &Set) -> String {
    format!("{}-{}", system.namespace(), set.pod)
}

/// A pod that runs its set.
fn pod(system: System, set: &Set) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": set.pod},
        "spec": {
            "terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "automountServiceAccountToken": false,
            "containers": [{"name": "main", "imagePullPolicy": "IfNotPresent", "command": set.command}],
        },
    });
    if system == System::Volumes {
        let packages: Vec<_> = set.packages.iter().map(ToString::to_string).collect();
        pod["metadata"]["annotations"] = json!({"nix.lillecarl.com/packages": packages.join("\n")});
        pod["spec"]["containers"][0]["image"] = json!("any");
    } else {
        pod["spec"]["containers"][0]["image"] = json!(format!("{REGISTRY}/{}:1", image_name(system, set)));
    }
    pod
}

fn measure(system: System, sets: &[Set], namespace: &Namespace, cluster: &Path) -> Result<Outcome> {
    let node = cluster.join("node/var-lib");
    // All that is kept on the disk, and in it the files that are run.
    let (kept, run) = match system {
        System::OneLayer | System::Layers => {
            (node.join("containerd"), node.join("containerd/io.containerd.snapshotter.v1.overlayfs"))
        }
        System::Volumes => (node.join("nix-csi"), node.join("nix-csi/nix/store")),
    };
    let before = Inodes::below(&kept)?.bytes();
    let cold = run_all(system, sets, namespace)?;
    let disk = Inodes::below(&kept)?.bytes() - before;
    delete_all(namespace)?;
    let warm = run_all(system, sets, namespace)?;
    delete_all(namespace)?;
    let evicted = Inodes::below(&run)?;
    evicted.evict()?;
    let left = evicted.resident()?;
    run_all(system, sets, namespace)?;
    let page_cache = evicted.resident()? - left;
    delete_all(namespace)?;
    let outcome = Outcome { disk: disk / MIB, page_cache: page_cache / MIB, cold, warm };
    eprintln!(
        "  disk {:.1} MiB, page cache {:.1} MiB ({:.1} could not be evicted), cold {:.2?} s, warm {:.2?} s",
        outcome.disk,
        outcome.page_cache,
        left / MIB,
        outcome.cold,
        outcome.warm
    );
    Ok(outcome)
}

const MIB: f64 = 1_048_576.0;

/// Creates all pods at once. The seconds until each runs; comes back when all have run what they are to run.
fn run_all(system: System, sets: &[Set], namespace: &Namespace) -> Result<Vec<f64>> {
    let watch = Watch::start(&namespace.name)?;
    let pods: Vec<_> = sets.iter().map(|set| pod(system, set)).collect();
    let start = Instant::now();
    namespace.apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods}))?;
    let mut running: HashMap<String, f64> = HashMap::new();
    while running.len() < sets.len() {
        let (name, phase, at) = watch.next()?;
        match phase.as_str() {
            "Running" => drop(running.entry(name).or_insert_with(|| (at - start).as_secs_f64())),
            "Failed" | "Succeeded" => bail!("pod {name} ended: {}", namespace.kubectl(&["logs", &name])?),
            _ => {}
        }
    }
    for set in sets {
        eventually("a pod that is ready", || {
            Ok(namespace.kubectl(&["logs", &set.pod])?.contains("ready").then_some(()))
        })?;
    }
    Ok(running.into_values().collect())
}

fn delete_all(namespace: &Namespace) -> Result<()> {
    namespace.kubectl(&["delete", "pods", "--all", "--wait", "--timeout=90s"]).map(drop)
}

fn figures(ours: &Outcome, peer: &Outcome, of: System) -> Vec<Figure> {
    let against = |what: &str| Against {
        name: format!("headline, ten sets: {what}, {}", of.name()),
        peer_name: of.name().to_owned(),
        budget: None,
    };
    let last = |seconds: &[f64]| seconds.iter().copied().reduce(f64::max);
    let seconds = |what: &str, ours: &[f64], peer: &[f64]| {
        Figure::of(against(what), "s", (last(ours)?, ours), (last(peer)?, peer))
    };
    [
        Figure::of_rounds(against("bytes on disk"), "MiB", &[ours.disk], &[peer.disk]),
        Figure::of_rounds(against("page cache of what runs"), "MiB", &[ours.page_cache], &[peer.page_cache]),
        seconds("until the last pod runs, cold", &ours.cold, &peer.cold),
        seconds("until the last pod runs, warm", &ours.warm, &peer.warm),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The inodes below a directory, each once.
struct Inodes {
    bytes: u64,
    files: Vec<PathBuf>,
}

impl Inodes {
    fn below(dir: &Path) -> Result<Self> {
        let mut found = Self { bytes: 0, files: Vec::new() };
        let mut seen = BTreeSet::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(path) = todo.pop() {
            // What goes away meanwhile is not there.
            let Ok(meta) = path.symlink_metadata() else { continue };
            if !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            found.bytes += meta.blocks() * 512;
            if meta.is_dir() {
                for entry in fs::read_dir(&path).into_iter().flatten() {
                    todo.push(entry?.path());
                }
            } else if meta.is_file() && meta.len() > 0 {
                found.files.push(path);
            }
        }
        Ok(found)
    }

    #[expect(clippy::cast_precision_loss, reason = "shown in MiB")]
    fn bytes(&self) -> f64 {
        self.bytes as f64
    }

    /// Takes the files out of the page cache.
    fn evict(&self) -> Result<()> {
        if let Some(file) = self.files.first() {
            // What is not written yet stays.
            rustix::fs::syncfs(File::open(file)?)?;
        }
        for file in &self.files {
            if let Ok(file) = File::open(file) {
                rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
            }
        }
        Ok(())
    }

    /// How many bytes of the files are in the page cache.
    fn resident(&self) -> Result<f64> {
        let mut bytes = 0.0;
        for files in self.files.chunks(500) {
            let mut fincore = Command::new("fincore");
            fincore.args(["--bytes", "--noheadings", "--raw", "--output", "RES"]).args(files);
            let said = fincore.output().context("fincore; e2e/setup.sh installs it")?;
            for line in String::from_utf8(said.stdout)?.lines() {
                bytes += line.trim().parse::<f64>().with_context(|| format!("fincore said {line:?}"))?;
            }
        }
        Ok(bytes)
    }
}

/// What the API server says of the pods of a namespace, as it says it.
struct Watch {
    child: Child,
    lines: Receiver<(String, Instant)>,
}

impl Watch {
    fn start(namespace: &str) -> Result<Self> {
        let mut child = cluster()
            .args(["kubectl", "-n", namespace, "get", "pods", "--watch"])
            .args(["-o", r#"jsonpath={.metadata.name} {.status.phase}{"\n"}"#])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("no pipe from kubectl")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send((line, Instant::now())).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    fn next(&self) -> Result<(String, String, Instant)> {
        loop {
            match self.lines.recv_timeout(Duration::from_mins(3)) {
                Ok((line, at)) => {
                    if let Some((name, phase)) = line.split_once(' ') {
                        return Ok((name.to_owned(), phase.to_owned(), at));
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no pod changed for three minutes"),
                Err(RecvTimeoutError::Disconnected) => bail!("kubectl ended while it watched pods"),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

fn cluster() -> Command {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../cluster"))
}

/// Starts this program as a registry on the node. It ends with the cluster.
fn start_registry(images: &Path) -> Result<Child> {
    let mut child = cluster()
        .arg("exec")
        .arg(std::env::current_exe()?)
        .arg("registry")
        .arg("--images")
        .arg(images)
        .args(["--listen", "127.0.0.1:5000"])
        .stdin(Stdio::null())
        .spawn()?;
    eventually("the registry", || {
        ensure!(child.try_wait()?.is_none(), "the registry ended");
        let mut asked = cluster();
        asked.args(["exec", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/5000"]).stderr(Stdio::null());
        Ok(asked.status()?.success().then_some(()))
    })?;
    Ok(child)
}
