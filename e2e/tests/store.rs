//! The node store, judged by real Nix.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix_csi_e2e::tree::{self, describe};
use nix_csi_e2e::{Fault, FaultProxy, Fixtures, StaticServer, nix};
use nix_csi_node::config::Config;
use nix_csi_node::start_substituter;
use nix_csi_node::store::NodeStore;
use nix_csi_node::substituter::{Closure, FetchError, Progress, Substituter};
use nix_csi_node::view::{self, ViewSpec};
use nix_csi_store::StorePath;
use rstest::rstest;
use tempfile::TempDir;
use tokio::sync::watch;

/// For what must not be taken for broken only because the machine is slow.
const PATIENCE: Duration = Duration::from_mins(1);

struct Setup {
    fixtures: Fixtures,
    root: TempDir,
    substituter: Substituter,
    server: StaticServer,
}

impl Setup {
    fn new(compression: &str) -> Result<Self> {
        Self::with_caches(compression, PATIENCE, |server| Ok(vec![server.url()]))
    }

    /// The caches are at the addresses that `urls` makes of the server; what stalls for so long is broken off.
    fn with_caches(
        compression: &str,
        stalled_download_timeout: Duration,
        urls: impl FnOnce(&StaticServer) -> Result<Vec<String>>,
    ) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let fixtures = Fixtures::find()?;
        let root = tempfile::tempdir()?;
        let server = StaticServer::start(&fixtures.cache(compression))?;
        let config = Config {
            substituters: urls(&server)?.iter().map(|url| url.parse()).collect::<Result<_, _>>()?,
            trusted_public_keys: vec![fixtures.public_key()?.parse()?],
            // The server takes few connections at once, and a machine that is busy takes its time.
            connect_timeout: PATIENCE,
            stalled_download_timeout,
            download_attempts: 3,
            ..Config::default()
        };
        let store = Arc::new(NodeStore::open(root.path())?);
        let substituter = start_substituter(store, &config)?;
        Ok(Self { fixtures, root, substituter, server })
    }

    async fn fetch(&self, name: &str) -> Result<Closure, FetchError> {
        let path = self.fixtures.get(name).expect("a fixture").path;
        self.substituter.fetch(&[path], &watch::channel(Progress::default()).0).await
    }

    fn store(&self) -> &NodeStore {
        self.substituter.store()
    }

    fn nix(&self, args: &[&str]) -> Result<String> {
        let root = self.root.path().to_str().context("a path of this test")?;
        nix::nix([&args[..1], &["--store", root], &args[1..]].concat())
    }

    /// What is in the store directory, without what Nix keeps there for itself.
    fn in_store_dir(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.store().layout().store_dir())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != ".links" {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Nothing half done anywhere. What was broken off is deleted beside, and may take a moment.
    fn assert_clean(&self) -> Result<()> {
        tree::wait_until_clean(self.root.path())?;
        let valid = self.nix(&["nix", "path-info", "--all"])?;
        let mut valid: Vec<_> = valid.lines().filter_map(|line| line.strip_prefix("/nix/store/")).collect();
        valid.sort_unstable();
        assert_eq!(self.in_store_dir()?, valid, "files and database disagree");
        Ok(())
    }
}

#[rstest]
#[case::zstd("zstd")]
#[case::xz("xz")]
#[tokio::test(flavor = "multi_thread")]
async fn everything_arrives_as_nix_wrote_it(#[case] compression: &str) -> Result<()> {
    let setup = Setup::new(compression)?;
    for name in setup.fixtures.good() {
        let closure = setup.fetch(&name).await.with_context(|| name.clone())?;
        assert_eq!(closure.paths, setup.fixtures.get(&name)?.closure, "{name}");
        for path in &closure.paths {
            let theirs = setup.fixtures.store().join("nix/store").join(path.base_name());
            assert_eq!(describe(&setup.store().layout().physical(path))?, describe(&theirs)?, "{path}");
        }
    }
    nix::verify(setup.root.path())?;
    setup.assert_clean()?;
    // Closures and signatures, as Nix reads them out of our database.
    let python = setup.fixtures.get("python3")?;
    let listed = setup.nix(&["nix", "path-info", "--recursive", "--sigs", &python.path.to_string()])?;
    assert_eq!(listed.lines().count(), python.closure.len());
    assert!(listed.lines().all(|line| line.contains("nix-csi-test-1:")), "{listed}");
    Ok(())
}

#[rstest]
#[case("unsigned", "it has no signature")]
#[case("wrong-key", "signed by nix-csi-other-1, none of which is in trusted-public-keys")]
#[case("forged-key", "its signature by nix-csi-test-1 is not right")]
#[case("tampered", "signed was sha256:")]
#[case("missing-nar", "is gone, although its narinfo is there")]
#[case("other-path", "not about the path it was asked for")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_bad_is_named_and_leaves_nothing(#[case] name: &str, #[case] reason: &str) -> Result<()> {
    let setup = Setup::new("zstd")?;
    setup.fetch("hello").await?;
    let error = format!("{:#}", anyhow::Error::new(setup.fetch(name).await.expect_err(name)));
    let path = setup.fixtures.get(name)?.path;
    for part in [reason, path.base_name(), &setup.server.url()] {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    setup.assert_clean()?;
    assert_eq!(setup.store().closure(&[path])?, None);
    // The same store goes on working.
    setup.fetch("jq").await?;
    nix::verify(setup.root.path())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_path_and_a_dead_cache_are_told_apart() -> Result<()> {
    let setup = Setup::new("zstd")?;
    let unknown: StorePath = "/nix/store/00000000000000000000000000000000-unknown".parse()?;
    let sender = watch::channel(Progress::default()).0;
    let error = setup.substituter.fetch(std::slice::from_ref(&unknown), &sender).await.expect_err("unknown");
    assert!(matches!(error.root(), FetchError::NotFound { .. }), "{error:?}");
    let Setup { mut server, substituter, .. } = setup;
    server.stop()?;
    // The first one is known to be missing for a while.
    let another: StorePath = "/nix/store/11111111111111111111111111111111-unknown".parse()?;
    let error = substituter.fetch(&[another], &sender).await.expect_err("dead");
    let temporary = matches!(error.root(), FetchError::Lookup { source, .. } if source.is_temporary());
    assert!(temporary, "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_collector_leaves_views_and_fetches_alone() -> Result<()> {
    let setup = Setup::new("zstd")?;
    let hello = setup.fixtures.get("hello")?;
    let closure = setup.fetch("hello").await?;
    let spec = ViewSpec::of(vec![hello.path.clone()]);
    let view = view::build(setup.store(), &spec, &closure.paths)?;
    drop(closure);
    let held = setup.fetch("jq").await?;
    drop(setup.fetch("redis").await?);

    setup.nix(&["nix-store", "--gc"])?;
    let left = |name: &str| -> Result<bool> {
        Ok(setup.store().closure(&[setup.fixtures.get(name)?.path])?.is_some())
    };
    assert!(left("hello")?, "a view holds it");
    assert!(left("jq")?, "a fetch that is not dropped holds it");
    assert!(!left("redis")?, "nobody holds it");
    drop(held);
    setup.nix(&["nix-store", "--gc"])?;
    assert!(!left("jq")?, "nobody holds it any more");
    assert!(left("hello")?);
    assert_eq!(describe(&view.join("store"))?.len(), {
        let physical = |path: &StorePath| describe(&setup.store().layout().physical(path));
        1 + hello.closure.iter().map(|path| physical(path).map(|all| all.len())).sum::<Result<usize>>()?
    });
    // What was collected comes again.
    setup.fetch("redis").await?;
    nix::verify(setup.root.path())?;
    setup.assert_clean()
}

#[tokio::test(flavor = "multi_thread")]
async fn several_packages_become_one_profile() -> Result<()> {
    let setup = Setup::new("zstd")?;
    let (bash, coreutils) = (setup.fixtures.get("bash")?.path, setup.fixtures.get("coreutils")?.path);
    let packages = vec![bash.clone(), coreutils.clone()];
    let closure = setup.substituter.fetch(&packages, &watch::channel(Progress::default()).0).await?;
    let spec = ViewSpec::of(packages);
    let result = view::build(setup.store(), &spec, &closure.paths)?.join("var/result");
    assert_eq!(fs::read_link(result.join("bin/bash"))?, Path::new(&format!("{bash}/bin/bash")));
    assert_eq!(fs::read_link(result.join("bin/ls"))?, Path::new(&format!("{coreutils}/bin/ls")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_want_the_same() -> Result<()> {
    let setup = Setup::new("zstd")?;
    let fetches: Vec<_> = ["python3", "redis", "python3", "nginx", "jq", "python3"]
        .into_iter()
        .map(|name| {
            let (substituter, path) = (setup.substituter.clone(), setup.fixtures.get(name).unwrap().path);
            tokio::spawn(
                async move { substituter.fetch(&[path], &watch::channel(Progress::default()).0).await },
            )
        })
        .collect();
    for fetch in fetches {
        fetch.await??;
    }
    nix::verify(setup.root.path())?;
    setup.assert_clean()
}

/// What a cache does wrong now and then costs time, and nothing else.
#[rstest]
#[case::narinfo_500(".narinfo", Fault::Status(500))]
#[case::narinfo_429(".narinfo", Fault::Status(429))]
#[case::nar_503(".zst", Fault::Status(503))]
#[case::nar_cut_at_once(".zst", Fault::CutAt { percent: 0 })]
#[case::nar_cut(".zst", Fault::CutAt { percent: 60 })]
#[case::nar_cut_at_the_end(".zst", Fault::CutAt { percent: 99 })]
#[case::nar_stalls(".zst", Fault::Stall(Duration::from_hours(1)))]
#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_waited_out(#[case] suffix: &'static str, #[case] fault: Fault) -> Result<()> {
    let mut proxy = None;
    let is_stall = matches!(fault, Fault::Stall(_));
    let stalled = if is_stall { Duration::from_secs(10) } else { PATIENCE };
    let setup = Setup::with_caches("zstd", stalled, |server| {
        let proxy = proxy.insert(FaultProxy::start(server.port())?);
        Ok(vec![proxy.url()])
    })?;
    proxy.as_ref().context("made above")?.fail(suffix, fault, 2);
    let closure = setup.fetch("jq").await?;
    assert_eq!(closure.paths, setup.fixtures.get("jq")?.closure);
    drop(closure);
    setup.assert_clean()?;
    nix::verify(setup.root.path())
}

/// What a cache does wrong always is another cache's chance; without one, it is an error and leaves nothing.
#[rstest]
#[case::nar_gone(".zst", Fault::Status(404), "is gone")]
#[case::nar_500(".zst", Fault::Status(500), "500")]
#[case::nar_cut(".zst", Fault::CutAt { percent: 50 }, "no answer from")]
#[case::nar_flipped(".zst", Fault::Flip, "")]
#[case::narinfo_gone(".narinfo", Fault::Status(404), "no cache has")]
#[case::narinfo_500(".narinfo", Fault::Status(500), "500")]
#[case::narinfo_flipped(".narinfo", Fault::Flip, "")]
#[tokio::test(flavor = "multi_thread")]
async fn what_lasts_is_another_caches_chance(
    #[case] suffix: &'static str,
    #[case] fault: Fault,
    #[case] reason: &str,
) -> Result<()> {
    let mut proxy = None;
    let broken = |server: &StaticServer| -> Result<FaultProxy> {
        let proxy = FaultProxy::start(server.port())?;
        proxy.fail(suffix, fault, usize::MAX);
        Ok(proxy)
    };
    let setup = Setup::with_caches("zstd", PATIENCE, |server| {
        let url = proxy.insert(broken(server)?).url();
        Ok(vec![url, server.url()])
    })?;
    setup.fetch("jq").await?;
    setup.assert_clean()?;
    nix::verify(setup.root.path())?;

    let alone = || -> Result<(FaultProxy, Setup)> {
        let mut proxy = None;
        let setup =
            Setup::with_caches("zstd", PATIENCE, |server| Ok(vec![proxy.insert(broken(server)?).url()]))?;
        Ok((proxy.context("made above")?, setup))
    };
    // A path alone says what is wrong. Of several, one may only say that the cache is left alone for a while.
    for (name, reason) in [("jq", ""), ("plain-file", reason)] {
        let (_proxy, alone) = alone()?;
        let error = format!("{:#}", anyhow::Error::new(alone.fetch(name).await.expect_err("a broken cache")));
        assert!(error.contains(reason) && error.contains("/nix/store/"), "{name}: {error}");
        alone.assert_clean()?;
    }
    Ok(())
}
