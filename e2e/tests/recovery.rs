//! Kills, power cuts, damage and collectors: what they leave must be a good store. Real Nix is the judge.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::nar_cache::SlowServer;
use nix_csi_e2e::{Fixtures, nix, node_program, tree};
use nix_csi_node::config::Config;
use nix_csi_node::start_substituter;
use nix_csi_node::store::NodeStore;
use nix_csi_node::substituter::Progress;
use nix_csi_store::StorePath;
use rstest::rstest;
use rustix::fs::FlockOperation;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

const ADOPTED: &str = "restored by an earlier process, not fetched again";
const ANOTHER_BOOT: &str = "11111111-2222-4333-8444-555555555555";

/// The program on a root of its own, with the fixtures behind a slow server.
struct Node {
    fixtures: Fixtures,
    server: SlowServer,
    dir: TempDir,
    program: PathBuf,
}

/// What a command said.
struct Done {
    success: bool,
    lines: Vec<String>,
    log: String,
}

impl Done {
    /// The events on its standard output.
    fn events(&self) -> Result<Vec<Value>> {
        self.lines.iter().map(|line| serde_json::from_str(line).with_context(|| line.clone())).collect()
    }

    fn events_called(&self, name: &str) -> Result<Vec<Value>> {
        Ok(self.events()?.into_iter().filter(|event| event["event"] == name).collect())
    }

    fn good(self) -> Result<Self> {
        ensure!(self.success, "{}{}", self.lines.join("\n"), self.log);
        Ok(self)
    }
}

/// Killed if the test ends before it.
struct Running(Child);

impl Running {
    fn kill(mut self) -> Result<()> {
        ensure!(self.0.try_wait()?.is_none(), "it ended before it was killed");
        Ok(self.0.kill()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

impl Node {
    fn new(rate: u64) -> Result<Self> {
        let fixtures = Fixtures::find()?;
        let server = SlowServer::start(&fixtures.cache("zstd"), rate)?;
        let dir = tempfile::tempdir()?;
        let config =
            format!("substituters = {}\ntrusted-public-keys = {}\n", server.url(), fixtures.public_key()?);
        fs::write(dir.path().join("nix.conf"), config)?;
        fs::write(dir.path().join("boot-id"), format!("{ANOTHER_BOOT}\n"))?;
        let program = node_program()?;
        Ok(Self { fixtures, server, dir, program })
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn path(&self, name: &str) -> Result<String> {
        Ok(self.fixtures.get(name)?.path.to_string())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--root")
            .arg(self.root())
            .arg("--config")
            .arg(self.dir.path().join("nix.conf"))
            .args(args);
        command.stdin(Stdio::null()).env("NO_COLOR", "1");
        command
    }

    /// The same, on a machine that was booted in between. Only this command sees it.
    fn after_a_boot(&self, args: &[&str]) -> Command {
        let inside = "mount --bind \"$1\" /proc/sys/kernel/random/boot_id && shift && exec \"$@\"";
        let inner = self.command(args);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", inside, "sh"]);
        command.arg(self.dir.path().join("boot-id")).arg(inner.get_program()).args(inner.get_args());
        command.stdin(Stdio::null()).env("NO_COLOR", "1");
        command
    }

    fn run(&self, args: &[&str]) -> Result<Done> {
        done(self.command(args))
    }

    fn start(&self, args: &[&str]) -> Result<Running> {
        let log = File::create(self.dir.path().join("log"))?;
        let child = self.command(args).stdout(Stdio::null()).stderr(log).spawn()?;
        Ok(Running(child))
    }

    /// The store, opened beside: only for questions.
    fn store(&self) -> Result<NodeStore> {
        Ok(NodeStore::open(&self.root())?)
    }

    fn valid(&self) -> Result<BTreeSet<StorePath>> {
        Ok(self.store()?.valid_paths()?.into_iter().map(|info| info.path).collect())
    }

    /// The lock files beside store paths.
    fn locks(&self) -> Result<Vec<PathBuf>> {
        let mut locks: Vec<_> = fs::read_dir(self.root().join("nix/store"))?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        locks.retain(|path| is_called(path, "lock"));
        Ok(locks)
    }

    /// Each path of a closure with what it refers to, from the cache.
    fn references(&self, closure: &[StorePath]) -> Result<HashMap<StorePath, Vec<StorePath>>> {
        let read = |path: &StorePath| -> Result<_> {
            let text = self.narinfo(path)?;
            let names = text.lines().find_map(|line| line.strip_prefix("References: ")).unwrap_or_default();
            let references = names.split_whitespace().map(StorePath::from_base_name);
            Ok((path.clone(), references.collect::<Result<_, _>>()?))
        };
        closure.iter().map(read).collect()
    }

    fn narinfo(&self, path: &StorePath) -> Result<String> {
        narinfo(&self.fixtures, path)
    }

    fn nar_file(&self, path: &StorePath) -> Result<String> {
        nar_file(&self.fixtures, path)
    }

    fn nars_asked(&self) -> Vec<String> {
        let mut nars: Vec<_> =
            self.server.take_asked().into_iter().filter(|file| file.starts_with("nar/")).collect();
        nars.sort();
        nars
    }

    fn verify(&self) -> Result<()> {
        nix::verify(&self.root())
    }

    /// Whole, and good in the eyes of Nix.
    fn is_sound(&self) -> Result<()> {
        let mut names: Vec<_> = fs::read_dir(self.root().join("nix/store"))?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_, _>>()?;
        names.retain(|name| name != ".links" && !is_called(name, "lock"));
        names.sort();
        let valid: Vec<_> = self.valid()?.iter().map(|path| path.base_name().to_owned()).collect();
        assert_eq!(names, valid, "files and database disagree");
        self.verify()
    }

    /// And nothing is left half done.
    fn is_good(&self) -> Result<()> {
        self.is_sound()?;
        tree::wait_until_clean(&self.root())
    }
}

fn narinfo(fixtures: &Fixtures, path: &StorePath) -> Result<String> {
    Ok(fs::read_to_string(fixtures.cache("zstd").join(format!("{}.narinfo", path.hash())))?)
}

/// The file of a path's NAR, relative to the cache.
fn nar_file(fixtures: &Fixtures, path: &StorePath) -> Result<String> {
    let text = narinfo(fixtures, path)?;
    let url = text.lines().find_map(|line| line.strip_prefix("URL: ")).context("a URL")?;
    Ok(url.to_owned())
}

fn is_called(name: impl AsRef<Path>, extension: &str) -> bool {
    name.as_ref().extension().is_some_and(|its| its == extension)
}

fn done(mut command: Command) -> Result<Done> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    Ok(Done {
        success: output.status.success(),
        lines: String::from_utf8(output.stdout)?.lines().map(ToOwned::to_owned).collect(),
        log: String::from_utf8(output.stderr)?,
    })
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_so()? {
        ensure!(start.elapsed() < Duration::from_mins(2), "it does not happen that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Those of `references` that refer to `path`, directly or not; not itself.
fn referrers(references: &HashMap<StorePath, Vec<StorePath>>, path: &StorePath) -> BTreeSet<StorePath> {
    let mut found = BTreeSet::from([path.clone()]);
    loop {
        let more: Vec<_> = references
            .iter()
            .filter(|(path, to)| !found.contains(*path) && to.iter().any(|to| found.contains(to)))
            .map(|(path, _)| path.clone())
            .collect();
        if more.is_empty() {
            found.remove(path);
            return found;
        }
        found.extend(more);
    }
}

fn regular_file(below: &Path) -> Result<PathBuf> {
    for (path, _) in tree::describe(below)? {
        let path = below.join(path);
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_file() && meta.len() > 100 {
            return Ok(path);
        }
    }
    anyhow::bail!("no file in {}", below.display())
}

#[rstest]
#[case::in_the_same_boot(false)]
#[case::with_a_boot_between(true)]
fn a_killed_fetch_goes_on_where_it_was(#[case] boot: bool) -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let python = node.fixtures.get("python3")?;
    let references = node.references(&python.closure)?;
    // The one that most others wait for.
    let waited_for = |path: &&StorePath| referrers(&references, path).len();
    let slow = python.closure.iter().max_by_key(waited_for).context("a closure")?;
    let waiting = referrers(&references, slow);
    ensure!(waiting.len() > 5, "only {waiting:?} refer to {slow}");
    let free: BTreeSet<_> =
        python.closure.iter().filter(|path| *path != slow && !waiting.contains(*path)).cloned().collect();
    node.server.hold(&node.nar_file(slow)?);

    let package = python.path.to_string();
    let running = node.start(&["fetch", &package])?;
    wait_for("all that can be registered is, and the rest is recorded", || {
        let staging = node.root().join("staging");
        let Ok(staging) = fs::read_dir(staging) else { return Ok(false) };
        let names: Vec<_> = staging.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        let records = names.iter().filter(|name| is_called(name, "json")).count();
        // Written down first, registered then, and unlocked beside other work: a kill before that leaves locks.
        Ok(records == waiting.len() && node.valid()? == free && node.locks()?.is_empty())
    })?;
    running.kill()?;
    node.server.release();
    node.verify()?;
    let before = node.valid()?;
    assert_eq!(before, free, "what waited for nothing is valid, and nothing else");

    node.nars_asked();
    let args = ["fetch", &package];
    let again = done(if boot { node.after_a_boot(&args) } else { node.command(&args) })?.good()?;
    let adopted = again.log.matches(ADOPTED).count();
    let mut missing: Vec<_> = python.closure.iter().filter(|path| !before.contains(*path)).collect();
    if boot {
        assert_eq!(adopted, 0, "nobody knows what reached the disk");
    } else {
        assert_eq!(adopted, waiting.len(), "{}", again.log);
        missing = vec![slow];
    }
    let mut expected: Vec<_> = missing.into_iter().map(|path| node.nar_file(path)).collect::<Result<_>>()?;
    expected.sort();
    assert_eq!(node.nars_asked(), expected);
    assert_eq!(node.store()?.closure(&[python.path])?, Some(python.closure));
    node.is_good()
}

#[test]
fn kills_at_any_moment_leave_a_good_store() -> Result<()> {
    let node = Node::new(4 << 20)?;
    let packages: Vec<_> = ["python3", "redis", "nginx", "wide-dir"]
        .iter()
        .map(|name| node.path(name))
        .collect::<Result<_>>()?;
    let args: Vec<_> = ["fetch"].into_iter().chain(packages.iter().map(String::as_str)).collect();
    let start = Instant::now();
    let mut moments = Vec::new();
    for n in 0..8 {
        // Later each time, by and large: what was registered is not fetched again.
        let millis = 30 + RandomState::new().hash_one(n) % 2500;
        moments.push(millis);
        let running = node.start(&args)?;
        std::thread::sleep(Duration::from_millis(millis));
        drop(running);
        if node.root().join("nix/var/nix/db/schema").exists() {
            node.verify().with_context(|| format!("killed after {moments:?} ms"))?;
        }
        if start.elapsed() > Duration::from_secs(45) {
            break;
        }
    }
    node.server.set_rate(u64::MAX);
    node.run(&args)?.good().with_context(|| format!("killed after {moments:?} ms"))?;
    // Of whoever is killed between a path's registration and the end of its lock. Nix leaves these, too.
    for path in node.locks()? {
        let file = File::open(&path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).context("nobody holds it")?;
        fs::remove_file(path)?;
    }
    node.is_good().with_context(|| format!("killed after {moments:?} ms"))?;
    for package in &packages {
        assert!(node.store()?.closure(&[package.parse()?])?.is_some());
    }
    Ok(())
}

/// As if everything since then could have been lost.
fn set_mark(node: &Node, row: usize) -> Result<()> {
    let file = node.root().join("durable");
    let mut mark: Value = serde_json::from_slice(&fs::read(&file)?)?;
    ensure!(mark["row"].as_u64() >= Some(row as u64), "{mark}");
    mark["row"] = row.into();
    Ok(fs::write(file, mark.to_string())?)
}

#[rstest]
#[case::a_file_was_cut(|file: &Path| Ok(File::options().write(true).open(file)?.set_len(10)?))]
#[case::a_file_is_empty(|file: &Path| Ok(File::options().write(true).open(file)?.set_len(0)?))]
#[case::a_file_has_zeros(|file: &Path| Ok(File::options().write(true).open(file)?.write_all(&[0; 64])?))]
#[case::a_file_is_gone(|file: &Path| Ok(fs::remove_file(file)?))]
fn what_a_power_cut_took_is_noticed_at_the_next_start(#[case] damage: fn(&Path) -> Result<()>) -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let (hello, redis) = (node.fixtures.get("hello")?, node.fixtures.get("redis")?);
    let view = node.run(&["view", &hello.path.to_string()])?.good()?;
    let view = PathBuf::from(view.lines.last().context("a view")?);
    assert!(view.join("store").is_dir());
    let safe = node.valid()?.len();
    node.run(&["fetch", &redis.path.to_string()])?.good()?;
    let all = node.valid()?;

    // A library that came after the mark, and all that needs it.
    let references = node.references(&redis.closure)?;
    let lost = redis.closure.iter().filter(|path| !hello.closure.contains(path) && **path != redis.path);
    let lost = lost.max_by_key(|path| referrers(&references, path).len()).context("a library")?;
    let mut gone = referrers(&references, lost);
    gone.insert(lost.clone());
    ensure!(gone.len() < all.len() - safe, "somebody else must stay");
    let physical = |path: &StorePath| node.root().join("nix/store").join(path.base_name());
    damage(&regular_file(&physical(lost))?)?;
    set_mark(&node, safe)?;

    // In the same boot the page cache has everything, whatever the mark says.
    node.run(&["fetch", &hello.path.to_string()])?.good()?;
    assert_eq!(node.valid()?, all);
    set_mark(&node, safe).context("the mark of the same boot")?;

    node.server.take_asked();
    let done = done(node.after_a_boot(&["fetch", &hello.path.to_string()]))?.good()?;
    assert!(done.log.contains(lost.base_name()), "{}", done.log);
    assert_eq!(node.server.take_asked(), Vec::<String>::new());
    assert_eq!(node.valid()?, all.difference(&gone).cloned().collect(), "the lost one and its referrers");
    for path in &gone {
        assert!(!physical(path).exists(), "{path}");
    }
    assert!(!view.exists(), "views are not synced");
    node.is_sound()?;
    let mark: Value = serde_json::from_slice(&fs::read(node.root().join("durable"))?)?;
    assert_eq!(mark["boot"], ANOTHER_BOOT);

    self::done(node.after_a_boot(&["view", &redis.path.to_string()]))?.good()?;
    assert_eq!(node.valid()?, all);
    node.is_good()
}

/// Views are mounted: they go once after a boot, and not at each start of the driver after it.
#[test]
fn a_second_start_after_a_boot_leaves_views_alone() -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let hello = node.path("hello")?;
    // All of it was synced, so there is nothing to check and nothing to fetch after the boot.
    let before = node.run(&["view", &hello])?.good()?;
    let view = PathBuf::from(before.lines.last().context("a view")?);
    let mark = view.join("var/mark");
    fs::write(&mark, "")?;
    done(node.after_a_boot(&["view", &hello]))?.good()?;
    ensure!(view.is_dir() && !mark.exists(), "a view is not synced, so it is built anew after a boot");
    fs::write(&mark, "")?;
    done(node.after_a_boot(&["fetch", &hello]))?.good()?;
    ensure!(mark.exists(), "{} went while a pod has it mounted", view.display());
    let mark: Value = serde_json::from_slice(&fs::read(node.root().join("durable"))?)?;
    assert_eq!(mark["boot"], ANOTHER_BOOT);
    Ok(())
}

#[test]
fn without_a_mark_everything_is_checked() -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let hello = node.fixtures.get("hello")?;
    node.run(&["fetch", &hello.path.to_string(), &node.path("jq")?])?.good()?;
    let all = node.valid()?;
    let file = regular_file(&node.root().join("nix/store").join(hello.path.base_name()))?;
    for mark in [None, Some("{"), Some(""), Some("{\"boot\":\"x\"}")] {
        let bytes = fs::read(&file)?;
        fs::remove_file(&file)?;
        let durable = node.root().join("durable");
        match mark {
            Some(text) => fs::write(&durable, text)?,
            None => fs::remove_file(&durable)?,
        }
        let done = node.run(&["fetch", &hello.path.to_string()])?.good()?;
        assert!(done.log.contains("lost in a power cut"), "{mark:?}: {}", done.log);
        assert_eq!(done.events_called("valid")?[0]["fetched"], 1, "{mark:?}");
        assert_eq!(fs::read(&file)?, bytes);
        assert_eq!(node.valid()?, all);
        node.is_sound()?;
    }
    node.is_good()
}

#[test]
fn damage_is_found_named_and_repaired() -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let (hello, redis) = (node.fixtures.get("hello")?, node.fixtures.get("redis")?);
    let view = |name: &StorePath| -> Result<PathBuf> {
        let done = node.run(&["view", &name.to_string()])?.good()?;
        Ok(done.lines.last().context("a view")?.into())
    };
    let hello_view = view(&hello.path)?;
    let redis_view = view(&redis.path)?;
    let verified = node.run(&["verify"])?.good()?;
    let events = verified.events()?;
    let [Value::Object(event)] = &events[..] else { anyhow::bail!("{events:?}") };
    assert_eq!(event["event"], "verified");
    assert_eq!((&event["damaged"], &event["repaired"]), (&0.into(), &0.into()));
    assert_eq!(event["paths"], node.valid()?.len());

    // Only redis has these; hello's view has nothing to do with them.
    let own: Vec<_> = redis.closure.iter().filter(|path| !hello.closure.contains(path)).collect();
    let physical = |path: &StorePath| node.root().join("nix/store").join(path.base_name());
    let [flipped, short, extra, gone] = &own[..4] else { anyhow::bail!("{own:?}") };
    let flipped_file = regular_file(&physical(flipped))?;
    let in_view = redis_view.join("store").join(flipped_file.strip_prefix(node.root().join("nix/store"))?);
    assert_eq!(fs::metadata(&flipped_file)?.ino(), fs::metadata(&in_view)?.ino(), "one inode");
    let good_bytes = fs::read(&flipped_file)?;
    let mut open = File::open(&in_view)?;
    let file = File::options().write(true).open(&flipped_file)?;
    file.write_all_at(&[good_bytes[50] ^ 1], 50)?;
    drop(file);
    let bad_bytes = fs::read(&flipped_file)?;
    fs::remove_file(regular_file(&physical(short))?)?;
    let dir = regular_file(&physical(extra))?.parent().context("a directory")?.to_owned();
    fs::write(dir.join("extra"), "stranger")?;
    fs::rename(physical(gone), node.dir.path().join("elsewhere"))?;

    let mut expected: Vec<_> = [flipped, short, extra, gone].map(ToString::to_string).into();
    expected.sort();
    let paths_of = |events: Vec<Value>| {
        let mut paths: Vec<_> =
            events.iter().map(|event| event["path"].as_str().unwrap_or_default().to_owned()).collect();
        paths.sort();
        paths
    };
    let found = node.run(&["verify"])?;
    assert!(!found.success);
    assert_eq!(paths_of(found.events_called("damaged")?), expected);
    assert_eq!(found.events_called("verified")?[0]["damaged"], 4);
    assert!(found.log.contains("4 paths are damaged"), "{}", found.log);
    assert!(node.verify().is_err(), "Nix sees it too");

    let inode = fs::metadata(&in_view)?.ino();
    let repaired = node.run(&["verify", "--repair"])?.good()?;
    assert_eq!(paths_of(repaired.events_called("repaired")?), expected);
    for event in repaired.events_called("repaired")? {
        let views = event["retiredViews"].as_array().context("a list")?.clone();
        let id = hello_view.file_name().context("an id")?.to_string_lossy().into_owned();
        assert!(!views.contains(&id.into()), "hello's view is good: {event}");
    }
    assert_eq!(repaired.events_called("verified")?[0]["repaired"], 4);
    node.run(&["verify"])?.good()?;
    node.is_good()?;
    assert_eq!(fs::read(&flipped_file)?, good_bytes);
    assert_ne!(fs::metadata(&flipped_file)?.ino(), inode, "nothing is written to a file that is there");
    let theirs = node.fixtures.store().join("nix/store");
    for path in &own[..4] {
        assert_eq!(
            tree::describe(&physical(path))?,
            tree::describe(&theirs.join(path.base_name()))?,
            "{path}"
        );
    }

    // Whoever had it goes on as before.
    let mut still = Vec::new();
    open.rewind()?;
    open.read_to_end(&mut still)?;
    assert_eq!((still, open.metadata()?.ino()), (bad_bytes.clone(), inode));
    assert!(!redis_view.exists(), "retired");
    assert!(hello_view.exists());
    let retired = fs::read_dir(node.root().join("views"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.contains(".retired-"))
        .context("it stays for those who have it")?;
    let kept = node
        .root()
        .join("views")
        .join(retired)
        .join("store")
        .join(in_view.strip_prefix(redis_view.join("store"))?);
    assert_eq!((fs::read(&kept)?, fs::metadata(&kept)?.ino()), (bad_bytes, inode));
    // And for whoever comes it is built anew.
    assert_eq!(view(&redis.path)?, redis_view);
    assert_eq!(fs::read(&in_view)?, good_bytes);
    assert_eq!(fs::metadata(&in_view)?.ino(), fs::metadata(&flipped_file)?.ino());
    // A collector must still see both views' packages as in use.
    nix::nix(["nix-store", "--gc", "--store", node.root().to_str().context("a path of this test")?])?;
    assert!(node.store()?.closure(&[redis.path, hello.path])?.is_some());
    node.verify()
}

/// A cache that has another build now, or none, repairs nothing, and breaks nothing more.
#[test]
fn what_cannot_be_repaired_stays_as_it_is() -> Result<()> {
    let node = Node::new(u64::MAX)?;
    let hello = node.fixtures.get("hello")?;
    node.run(&["fetch", &hello.path.to_string()])?.good()?;
    let file = regular_file(&node.root().join("nix/store").join(hello.path.base_name()))?;
    File::options().write(true).open(&file)?.write_all_at(b"damaged", 40)?;
    let bytes = fs::read(&file)?;
    let config = fs::read_to_string(node.dir.path().join("nix.conf"))?;
    fs::write(node.dir.path().join("nix.conf"), format!("{config}substituters = file:///nowhere\n"))?;
    let failed = node.run(&["verify", "--repair"])?;
    assert!(!failed.success);
    assert!(
        failed.log.contains("cannot repair") && failed.log.contains(hello.path.base_name()),
        "{}",
        failed.log
    );
    assert_eq!(fs::read(&file)?, bytes);
    tree::wait_until_clean(&node.root())?;
    fs::write(node.dir.path().join("nix.conf"), config)?;
    node.run(&["verify", "--repair"])?.good()?;
    node.is_good()
}

#[test]
fn without_a_terminal_every_line_is_an_event() -> Result<()> {
    // Slow enough for some lines, one a second.
    let node = Node::new(4 << 20)?;
    let python = node.fixtures.get("python3")?;
    let done = node.run(&["fetch", &python.path.to_string()])?.good()?;
    let events = done.events()?;
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap_or("none")).collect();
    let [progress @ .., "valid", "durable"] = &names[..] else { anyhow::bail!("{names:?}") };
    assert!(!progress.is_empty() && progress.iter().all(|name| *name == "progress"), "{names:?}");
    let mut last = 0;
    for event in &events[..progress.len()] {
        let number = |field: &str| event[field].as_u64().with_context(|| format!("{field} in {event}"));
        assert!(number("paths")? <= number("pathsTotal")?, "{event}");
        assert!(number("bytes")? <= number("bytesTotal")? && number("bytes")? >= last, "{event}");
        number("bytesPerSecond")?;
        last = number("bytes")?;
    }
    assert!(last > 0, "{events:?}");
    let valid = &events[progress.len()];
    assert_eq!(valid["paths"], python.closure.len());
    assert_eq!(valid["fetched"], python.closure.len());
    // Again: nothing to do, and told the same way.
    let events = node.run(&["fetch", &python.path.to_string()])?.good()?.events()?;
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(events[0]["fetched"], 0);
    // What fails says so on the other stream.
    let failed = node.run(&["fetch", &node.path("unsigned")?])?;
    assert!(!failed.success);
    assert!(failed.log.contains("it has no signature"), "{}", failed.log);
    assert!(failed.events()?.iter().all(|event| event["event"] == "progress"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn collectors_do_not_disturb_a_slow_fetch() -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fixtures = Fixtures::find()?;
    let server = SlowServer::start(&fixtures.cache("zstd"), 3 << 20)?;
    let root = tempfile::tempdir()?;
    let config = Config {
        substituters: vec![server.url().parse()?],
        trusted_public_keys: vec![fixtures.public_key()?.parse()?],
        ..Config::default()
    };
    let store = Arc::new(NodeStore::open(root.path())?);
    let substituter = start_substituter(Arc::clone(&store), &config)?;
    let python = fixtures.get("python3")?;
    // All others can be registered before it, and are, in parts.
    server.hold(&nar_file(&fixtures, &python.path)?);
    let (is_over, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let collecting = {
        let root = root.path().to_str().context("a path of this test")?.to_owned();
        let (is_over, runs) = (Arc::clone(&is_over), Arc::clone(&runs));
        std::thread::spawn(move || -> Result<()> {
            while !is_over.load(Ordering::Relaxed) {
                nix::nix(["nix-store", "--store", &root, "--gc"])?;
                runs.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    let fetching = {
        let path = python.path.clone();
        tokio::spawn(async move { substituter.fetch(&[path], &watch::channel(Progress::default()).0).await })
    };
    let disturbed = (|| {
        wait_for("all but the last one is registered", || {
            Ok(collecting.is_finished() || store.valid_paths()?.len() == python.closure.len() - 1)
        })?;
        // One of them began before, so at least three saw all of it while the fetch went on.
        let before = runs.load(Ordering::Relaxed);
        wait_for("collectors run", || {
            Ok(collecting.is_finished() || runs.load(Ordering::Relaxed) >= before + 4)
        })?;
        ensure!(!fetching.is_finished(), "it ended without its last path");
        Ok(())
    })();
    server.release();
    let fetched = fetching.await?;
    is_over.store(true, Ordering::Relaxed);
    collecting.join().map_err(|_| anyhow::anyhow!("the collector panicked"))??;
    disturbed?;
    let closure = fetched?;
    assert_eq!(closure.paths, python.closure);
    assert_eq!(store.closure(&[python.path])?, Some(python.closure));
    nix::verify(root.path())?;
    drop(closure);
    tree::wait_until_clean(root.path())
}
