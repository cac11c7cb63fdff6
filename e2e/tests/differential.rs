//! Three real Nix versions and this program read, write and collect each other's stores.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::nix::Nix;
use nix_csi_e2e::{Fixtures, tree};
use nix_csi_node::config::Config;
use nix_csi_node::start_substituter;
use nix_csi_node::store::{NodeStore, PathInfo};
use nix_csi_node::substituter::{Closure, Progress, Substituter};
use nix_csi_node::view::{self, ViewSpec};
use nix_csi_store::{NarHash, StorePath};
use rstest::rstest;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

/// Unsigned, and proved by their content.
const PROVED: [&str; 6] =
    ["ca-text", "ca-text-refs", "ca-recursive", "ca-flat", "ca-flat-sha1", "ca-flat-sha512"];

/// Fixtures, and a Nix that trusts them.
struct Setup {
    fixtures: Fixtures,
    nix: Nix,
}

/// A store that this program has open.
struct Ours {
    root: TempDir,
    substituter: Substituter,
}

/// What a store knows of a path, in an order that does not matter.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    hash: String,
    size: u64,
    references: BTreeSet<String>,
    signatures: BTreeSet<String>,
    deriver: Option<String>,
    ca: Option<String>,
}

impl Setup {
    fn new(release: &str) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let fixtures = Fixtures::find()?;
        let nix = if release == "own" { Nix::own() } else { Nix::of(release)? };
        let nix = nix.with_config(&format!("trusted-public-keys = {}", fixtures.public_key()?));
        Ok(Self { fixtures, nix })
    }

    fn cache(&self) -> String {
        format!("file://{}", self.fixtures.cache("zstd").display())
    }

    fn paths(&self, names: &[&str]) -> Result<Vec<StorePath>> {
        names.iter().map(|name| Ok(self.fixtures.get(name)?.path)).collect()
    }

    /// All fixtures that can be fetched, but for the one that is only large.
    fn all(&self) -> Result<Vec<StorePath>> {
        let good = self.fixtures.good();
        self.paths(&good.iter().map(String::as_str).chain(PROVED).collect::<Vec<_>>())
    }

    /// The closures of these, together.
    fn closure(&self, names: &[&str]) -> Result<BTreeSet<StorePath>> {
        let mut all = BTreeSet::new();
        for name in names {
            all.extend(self.fixtures.get(name)?.closure);
        }
        Ok(all)
    }

    /// This program on the store in `root`, which may be another's.
    fn open(&self, root: TempDir) -> Result<Ours> {
        let config = Config {
            substituters: vec![self.cache().parse()?],
            trusted_public_keys: vec![self.fixtures.public_key()?.parse()?],
            ..Config::default()
        };
        let store = Arc::new(NodeStore::open(root.path())?);
        Ok(Ours { substituter: start_substituter(store, &config)?, root })
    }

    /// Nix fetches these into the store in `root`.
    fn nix_fetches(&self, root: &Path, paths: &[StorePath]) -> Result<()> {
        let cache = self.cache();
        let to = text(root)?;
        let paths: Vec<_> = paths.iter().map(ToString::to_string).collect();
        let args = ["nix", "copy", "--from", &cache, "--to", to].into_iter();
        self.nix.run(args.chain(paths.iter().map(String::as_str))).map(drop)
    }

    /// What Nix reads out of a database.
    fn nix_knows(&self, root: &Path) -> Result<BTreeMap<String, Known>> {
        let ask = |more: &[&str]| {
            let args = ["nix", "path-info", "--all", "--json", "--store", text(root)?];
            self.nix.run(args.iter().chain(more))
        };
        // Newer ones want to be told which of their formats.
        let json: Value = serde_json::from_str(&ask(&["--json-format", "1"]).or_else(|_| ask(&[]))?)?;
        let entries: Vec<(String, &Value)> = match &json {
            Value::Array(all) => {
                all.iter().map(|info| (info["path"].as_str().unwrap_or_default().to_owned(), info)).collect()
            }
            Value::Object(all) => all.iter().map(|(path, info)| (path.clone(), info)).collect(),
            other => anyhow::bail!("{other}"),
        };
        entries.into_iter().map(|(path, info)| Ok((path.clone(), known(info).context(path)?))).collect()
    }
}

impl Ours {
    fn store(&self) -> &NodeStore {
        self.substituter.store()
    }

    async fn fetch(&self, paths: &[StorePath]) -> Result<Closure> {
        Ok(self.substituter.fetch(paths, &watch::channel(Progress::default()).0).await?)
    }

    fn knows(&self) -> Result<BTreeMap<String, Known>> {
        let of = |info: PathInfo| {
            let known = Known {
                hash: info.nar_hash.to_string(),
                size: info.nar_size,
                references: info.references.iter().map(|path| path.base_name().to_owned()).collect(),
                signatures: info.signatures.into_iter().filter(|signature| !signature.is_empty()).collect(),
                deriver: info.deriver.map(|path| path.base_name().to_owned()),
                ca: info.ca,
            };
            (info.path.to_string(), known)
        };
        Ok(self.store().valid_paths()?.into_iter().map(of).collect())
    }

    fn check_all(&self) -> Result<()> {
        for info in self.store().valid_paths()? {
            self.store().check(&info).with_context(|| info.path.to_string())?;
        }
        Ok(())
    }
}

fn known(info: &Value) -> Result<Known> {
    let name = |value: &Value| value.as_str().map(|path| path.trim_start_matches("/nix/store/").to_owned());
    let list = |field: &str| info[field].as_array().cloned().unwrap_or_default();
    Ok(Known {
        hash: info["narHash"].as_str().context("narHash")?.parse::<NarHash>()?.to_string(),
        size: info["narSize"].as_u64().context("narSize")?,
        references: list("references").iter().filter_map(name).collect(),
        signatures: list("signatures").iter().filter_map(|value| Some(value.as_str()?.to_owned())).collect(),
        deriver: name(&info["deriver"]),
        ca: info["ca"].as_str().map(ToOwned::to_owned),
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of this test")
}

/// Fails unless every entry of these paths is the same in both stores: mode, owner, time, size, target.
fn same_trees(paths: &[StorePath], ours: &Path, theirs: &Path) -> Result<()> {
    for path in paths {
        let of = |root: &Path| tree::describe(&root.join("nix/store").join(path.base_name()));
        assert_eq!(of(ours)?, of(theirs)?, "{path}");
    }
    Ok(())
}

#[rstest]
#[case::debian_12("own")]
#[case::debian_13("trixie")]
#[case::newest("sid")]
#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_is_what_nix_writes(#[case] release: &str) -> Result<()> {
    let setup = Setup::new(release)?;
    let all = setup.all()?;
    let ours = setup.open(tempfile::tempdir()?)?;
    let closure = ours.fetch(&all).await?;
    let theirs = tempfile::tempdir()?;
    setup.nix_fetches(theirs.path(), &all)?;

    setup.nix.verify(ours.root.path())?;
    same_trees(&closure.paths, ours.root.path(), theirs.path())?;
    let knows = ours.knows()?;
    assert_eq!(knows.len(), closure.paths.len());
    assert_eq!(setup.nix_knows(ours.root.path())?, knows, "what Nix reads out of our database");
    assert_eq!(setup.nix_knows(theirs.path())?, knows, "what Nix writes into its own");

    // Every NAR that Nix makes of our files has the hash that our database says.
    let root = text(ours.root.path())?;
    let dump = "root=$1; shift; for path; do \
                nix-store --dump \"$root/nix/store/${path#/nix/store/}\" | sha256sum || exit; done";
    let paths: Vec<_> = closure.paths.iter().map(ToString::to_string).collect();
    let args = ["sh", "-c", dump, "sh", root].into_iter().chain(paths.iter().map(String::as_str));
    let dumped = setup.nix.run(args)?;
    assert_eq!(dumped.lines().count(), paths.len());
    for (path, line) in paths.iter().zip(dumped.lines()) {
        let hash: NarHash = format!("sha256:{}", &line[..64]).parse()?;
        assert_eq!(hash.to_string(), knows[path].hash, "{path}");
    }
    // And again through its own eyes.
    let args = ["nix-store", "--store", root, "--verify-path"].into_iter();
    setup.nix.run(args.chain(paths.iter().map(String::as_str)))?;
    drop(closure);
    tree::wait_until_clean(ours.root.path())
}

#[rstest]
#[case::debian_12("own")]
#[case::debian_13("trixie")]
#[case::newest("sid")]
#[tokio::test(flavor = "multi_thread")]
async fn what_nix_writes_we_go_on_with(#[case] release: &str) -> Result<()> {
    let setup = Setup::new(release)?;
    let root = tempfile::tempdir()?;
    let names =
        ["python3", "odd-names", "multi-dev", "script", "symlink-root", "ca-text-refs", "ca-flat-sha1"];
    setup.nix_fetches(root.path(), &setup.paths(&names)?)?;
    let before = setup.nix_knows(root.path())?;
    let there = setup.closure(&names)?;

    let ours = setup.open(root)?;
    for name in names {
        let fixture = setup.fixtures.get(name)?;
        assert_eq!(
            ours.store().closure(std::slice::from_ref(&fixture.path))?,
            Some(fixture.closure),
            "{name}"
        );
    }
    assert_eq!(ours.knows()?, before);
    ours.check_all()?;

    // What is there is not fetched again, and not changed.
    let more = ["redis", "nginx", "wide-dir", "ca-recursive", "python3"];
    let expected = setup.closure(&more)?;
    let closure = ours.fetch(&setup.paths(&more)?).await?;
    assert_eq!(closure.paths, expected.iter().cloned().collect::<Vec<_>>());
    let (fetched, missing): (BTreeSet<_>, BTreeSet<_>) =
        (closure.fetched.iter().collect(), expected.difference(&there).collect());
    assert_eq!(fetched, missing);
    setup.nix.verify(ours.root.path())?;
    same_trees(&closure.paths, ours.root.path(), &setup.fixtures.store())?;

    // And Nix goes on with ours, while we have it open.
    setup.nix_fetches(ours.root.path(), &setup.paths(&["jq", "coreutils"])?)?;
    let jq = setup.fixtures.get("jq")?;
    assert_eq!(ours.store().closure(&[jq.path])?, Some(jq.closure));
    assert_eq!(ours.knows()?, setup.nix_knows(ours.root.path())?);
    ours.check_all()?;
    setup.nix.verify(ours.root.path())?;
    drop(closure);
    tree::wait_until_clean(ours.root.path())
}

#[rstest]
#[case::debian_12("own")]
#[case::debian_13("trixie")]
#[case::newest("sid")]
#[tokio::test(flavor = "multi_thread")]
async fn its_collector_honours_our_roots(#[case] release: &str) -> Result<()> {
    let setup = Setup::new(release)?;
    let ours = setup.open(tempfile::tempdir()?)?;
    let (multi, redis, jq) =
        (setup.fixtures.get("multi-dev")?, setup.fixtures.get("redis")?, setup.fixtures.get("jq")?);
    let closure = ours.fetch(std::slice::from_ref(&multi.path)).await?;
    let spec = ViewSpec::of(vec![multi.path.clone()]);
    let view = view::build(ours.store(), &spec, &closure.paths)?;
    drop(closure);
    let held = ours.fetch(std::slice::from_ref(&jq.path)).await?;
    drop(ours.fetch(std::slice::from_ref(&redis.path)).await?);
    // Half of something: a collector that takes what is in work takes it from a pod.
    let staging = ours.root.path().join("staging/other");
    std::fs::create_dir(&staging)?;

    let collect = || setup.nix.run(["nix-store", "--store", text(ours.root.path())?, "--gc"]);
    collect()?;
    let valid = |path: &StorePath| Ok::<_, anyhow::Error>(ours.store().closure(std::slice::from_ref(path))?);
    assert_eq!(valid(&multi.path)?, Some(multi.closure.clone()), "the view's");
    assert_eq!(valid(&jq.path)?, Some(jq.closure.clone()), "the fetch's that is not dropped");
    assert_eq!(valid(&redis.path)?, None, "nobody's");
    ensure!(staging.is_dir(), "nothing but the store is collected");
    std::fs::remove_dir(staging)?;
    setup.nix.verify(ours.root.path())?;
    let expected: BTreeSet<_> = multi.closure.iter().chain(&jq.closure).map(ToString::to_string).collect();
    assert_eq!(ours.knows()?.into_keys().collect::<BTreeSet<_>>(), expected);
    for path in &multi.closure {
        let physical = ours.store().layout().physical(path);
        assert_eq!(tree::describe(&view.join("store").join(path.base_name()))?, tree::describe(&physical)?);
    }
    drop(held);
    collect()?;
    assert_eq!(valid(&jq.path)?, None, "nobody's any more");
    assert_eq!(valid(&multi.path)?, Some(multi.closure));
    // Without the view its roots go, and with them the rest.
    std::fs::remove_dir_all(&view)?;
    ours.store().remove_roots(view.file_name().context("an id")?.to_str().context("text")?)?;
    collect()?;
    assert_eq!(ours.knows()?.len(), 0);
    drop(ours.fetch(&[redis.path]).await?);
    setup.nix.verify(ours.root.path())
}
