//! What a cache gives for the credentials of one namespace is not there for another, however warm it is on the node.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config};
use nix_csi_e2e::nar_cache::{NarCache, nar_of_file};
use nix_csi_e2e::{CacheServer, Fixtures, Rule, Seen, nix};
use nix_csi_node::config::Config;
use nix_csi_node::store::{NodeStore, Origin};
use nix_csi_store::StorePath;
use rstest::rstest;
use tonic::Code;

const TOKEN: &str = "a-token-that-must-not-be-seen";

/// A cache that gives everything to whoever has the token, and answers others with `status`.
fn private(status: u16) -> Result<CacheServer> {
    let server = CacheServer::start(&Fixtures::find()?.cache("zstd"))?;
    lock(&server, status);
    Ok(server)
}

fn lock(server: &CacheServer, status: u16) {
    server.rule(Rule::on("").demand_or(format!("Bearer {TOKEN}"), status));
}

/// A volume with a secret for the caches on loopback.
fn with_token(volume: Volume) -> Volume {
    volume.secret("bearer-tokens", &format!("127.0.0.1 {TOKEN}\n"))
}

fn narinfo(path: &StorePath) -> String {
    format!("{}.narinfo", path.hash())
}

fn origin(node: &TestNode, path: &StorePath) -> Result<Origin> {
    NodeStore::open(&node.root())?.origin(path)?.context("nothing is known of it")
}

/// Every file below `dir` that holds the token.
fn token_in(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(token_in(&entry.path())?);
        } else if entry.file_type()?.is_file()
            && fs::read(entry.path())?.windows(TOKEN.len()).any(|part| part == TOKEN.as_bytes())
        {
            found.push(entry.path().display().to_string());
        }
    }
    Ok(found)
}

#[rstest]
#[case::says_nothing(404, Code::NotFound)]
#[case::says_that_it_is_forbidden(403, Code::NotFound)]
#[case::wants_credentials(401, Code::PermissionDenied)]
#[tokio::test(flavor = "multi_thread")]
async fn what_one_namespace_may_fetch_is_not_there_for_another(
    #[case] status: u16,
    #[case] code: Code,
) -> Result<()> {
    let cache = private(status)?;
    let config = config(&[cache.url()])?;
    let mut node = TestNode::start(&config).await?;
    let hello = Fixtures::find()?.get("hello")?;
    let volume = |namespace: &str, pod: &str| Volume::new(namespace, pod, &hello.path.to_string());
    node.publish(&with_token(volume("a", "a1"))).await??;
    assert!(node.target("a1").join("store").join(hello.path.base_name()).join("bin/hello").exists());
    let nars = cache.requests(".nar.zst").len();
    assert_eq!(nars, hello.closure.len());

    // Word for word what a node says that never had it.
    let fresh = TestNode::start(&config).await?;
    let expected = fresh.refused(&volume("b", "b1")).await?;
    assert_eq!(expected.code(), code);
    assert!(expected.message().contains(&hello.path.to_string()), "{expected}");
    let wrong = |pod| volume("b", pod).secret("netrc", "machine 127.0.0.1 login b password guessed");
    let mut by_hand = volume("b", "b3");
    by_hand.readonly = false;
    for refused in [volume("b", "b1"), wrong("b2"), by_hand] {
        let said = node.refused(&refused).await?;
        assert_eq!((said.code(), said.message()), (expected.code(), expected.message()));
    }
    // Whoever has been told no is not in the way of whoever may, nor does a name close to that of another help.
    node.publish(&volume("a", "a2")).await??;
    node.refused(&volume("A", "b4")).await?;

    // The same after a restart, when nothing is in memory.
    node.start_driver(&config).await?;
    let said = node.refused(&volume("b", "b5")).await?;
    assert_eq!((said.code(), said.message()), (expected.code(), expected.message()));
    node.publish(&volume("a", "a3")).await??;

    // Credentials of its own, and it is here already.
    node.publish(&with_token(volume("b", "b6"))).await??;
    node.publish(&volume("b", "b7")).await??;
    // That they are given is asked with one byte of each.
    let whole = cache.requests(".nar.zst").into_iter().filter(|seen| seen.header("range").is_empty());
    assert_eq!(whole.count(), nars, "nothing was downloaded again");
    for path in &hello.closure {
        let origin = origin(&node, path)?;
        assert!(origin.private && origin.key.as_deref() == Some("nix-csi-test-1"), "{path}: {origin:?}");
        assert_eq!(*origin.cache, *cache.url());
    }
    assert_eq!(token_in(&node.root())?, Vec::<String>::new(), "the token is on the disk");
    for pod in ["a1", "a2", "a3", "b6", "b7"] {
        node.unpublish(pod).await?;
    }
    node.assert_empty()?;
    nix::verify(&node.root())
}

/// Some caches show everybody what they have, and give it to whom they know.
#[tokio::test(flavor = "multi_thread")]
async fn a_narinfo_is_no_permission() -> Result<()> {
    let cache = CacheServer::start(&Fixtures::find()?.cache("zstd"))?;
    cache.rule(Rule::on(".nar.zst").demand_or(format!("Bearer {TOKEN}"), 401));
    let config = config(&[cache.url()])?;
    let node = TestNode::start(&config).await?;
    let path = Fixtures::find()?.get("hello")?.path;
    let volume = |namespace: &str, pod: &str| Volume::new(namespace, pod, &path.to_string());
    node.publish(&with_token(volume("a", "a1"))).await??;
    assert!(origin(&node, &path)?.private);
    let said = node.refused(&volume("b", "b1")).await?;
    assert_eq!(said.code(), Code::PermissionDenied, "{said}");
    assert!(origin(&node, &path)?.private);
    node.publish(&with_token(volume("b", "b2"))).await??;
    nix::verify(&node.root())
}

/// Calls of both at once, again and again: neither gets the other's answer.
#[tokio::test(flavor = "multi_thread")]
async fn calls_at_the_same_time_get_their_own_answers() -> Result<()> {
    let cache = private(404)?;
    let node = Arc::new(TestNode::start(&config(&[cache.url()])?).await?);
    let names = ["hello", "jq", "redis"];
    let mut calls = Vec::new();
    for (round, name) in names.into_iter().enumerate() {
        let path = Fixtures::find()?.get(name)?.path.to_string();
        for n in 0..6 {
            let volume = Volume::new(["a", "b"][n % 2], &format!("{round}-{n}"), &path);
            let volume = if n % 2 == 0 { with_token(volume) } else { volume };
            let node = Arc::clone(&node);
            calls.push(tokio::spawn(async move { (n % 2, node.publish(&volume).await) }));
        }
    }
    for call in calls {
        let (of, published) = call.await?;
        match published? {
            Ok(()) => assert_eq!(of, 0, "a pod without credentials got it"),
            Err(status) => assert_eq!((of, status.code()), (1, Code::NotFound), "{status}"),
        }
    }
    nix::verify(&node.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_public_cache_gives_is_everybodys() -> Result<()> {
    let (public, secret) = (CacheServer::start(&Fixtures::find()?.cache("xz"))?, private(401)?);
    let hello = Fixtures::find()?.get("hello")?;
    public.rule(Rule::on(narinfo(&hello.path)).status(404));
    let config = config(&[public.url(), secret.url()])?;
    let mut node = TestNode::start(&config).await?;
    let volume = |namespace: &str, pod: &str| Volume::new(namespace, pod, &hello.path.to_string());
    node.publish(&with_token(volume("a", "a1"))).await??;
    for path in &hello.closure {
        let found = origin(&node, path)?;
        assert_eq!((found.private, *found.cache == public.url()), (*path == hello.path, *path != hello.path));
    }
    assert_eq!(secret.requests(".nar.zst").len(), 1, "only what the public one does not have");
    let said = node.refused(&volume("b", "b1")).await?;
    assert!(said.message().contains(&hello.path.to_string()), "{said}");

    // From now on it is pushed to the public one, too.
    public.behave();
    let all = public.requests("").len();
    node.start_driver(&config).await?;
    node.publish(&volume("b", "b2")).await??;
    let asked: Vec<_> = public.requests("").split_off(all);
    let is_whole = |seen: &Seen| seen.target.contains(".nar.") && seen.header("range").is_empty();
    assert!(!asked.iter().any(is_whole), "it is here already");
    let found = origin(&node, &hello.path)?;
    assert_eq!((found.private, &*found.cache), (false, &*public.url()));

    // And it stays so, whatever becomes of the cache.
    public.rule(Rule::on("").hang_up());
    node.publish(&volume("c", "c1")).await??;
    nix::verify(&node.root())
}

/// The root is public, something that it needs is not: its name is in the root's narinfo, so it may be said.
#[tokio::test(flavor = "multi_thread")]
async fn a_private_dependency_keeps_the_package_away() -> Result<()> {
    let (public, secret) = (CacheServer::start(&Fixtures::find()?.cache("xz"))?, private(404)?);
    let hello = Fixtures::find()?.get("hello")?;
    let dependency = hello.closure.iter().find(|path| **path != hello.path).unwrap();
    public.rule(Rule::on(narinfo(dependency)).status(404));
    let node = TestNode::start(&config(&[public.url(), secret.url()])?).await?;
    let volume = |namespace: &str, pod: &str| Volume::new(namespace, pod, &hello.path.to_string());
    node.publish(&with_token(volume("a", "a1"))).await??;
    let said = node.refused(&volume("b", "b1")).await?;
    assert_eq!(said.code(), Code::NotFound);
    assert!(said.message().contains(&dependency.to_string()), "{said}");

    // A private root says nothing of what it needs.
    public.rule(Rule::on(narinfo(&hello.path)).status(404));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let fresh = TestNode::start(&config(&[public.url(), secret.url()])?).await?;
    fresh.publish(&with_token(volume("a", "a1"))).await??;
    let said = fresh.refused(&volume("b", "b1")).await?;
    assert!(said.message().contains(&hello.path.to_string()), "{said}");
    assert!(!said.message().contains(&dependency.to_string()), "{said}");
    Ok(())
}

/// A cache of one's own that offers another content under the name of what is private to others.
#[tokio::test(flavor = "multi_thread")]
async fn another_build_of_a_private_path_does_not_open_it() -> Result<()> {
    let (theirs, ours) = (NarCache::with_key("theirs-1")?, NarCache::with_key("ours-1")?);
    let path = theirs.add("x", &nar_of_file(b"secret"))?;
    assert_eq!(ours.add("x", &nar_of_file(b"public"))?, path);
    let secret = CacheServer::start(theirs.dir())?;
    lock(&secret, 404);
    let public = CacheServer::start(ours.dir())?;
    let hidden = Rule::on(narinfo(&path)).status(404);
    public.rule(hidden);
    let keys = vec![theirs.public_key().parse()?, ours.public_key().parse()?];
    let config = Config { trusted_public_keys: keys, ..config(&[public.url(), secret.url()])? };
    let mut node = TestNode::start(&config).await?;
    let volume = |namespace: &str, pod: &str| Volume::new(namespace, pod, &path.to_string());
    node.publish(&with_token(volume("a", "a1"))).await??;
    public.behave();
    node.start_driver(&config).await?;
    let said = node.refused(&volume("b", "b1")).await?;
    assert_eq!(said.code(), Code::FailedPrecondition, "{said}");
    for part in [&path.to_string(), &public.url()] {
        assert!(said.message().contains(part), "{said}");
    }
    assert!(origin(&node, &path)?.private);
    Ok(())
}

#[rstest]
#[case::no_known_key("password", "x", "neither `netrc` nor `bearer-tokens`")]
#[case::not_a_netrc("netrc", "machine", "`netrc` of the volume's secret: line 1: nothing follows `machine`")]
#[case::not_tokens("bearer-tokens", TOKEN, "line 1 of the bearer tokens is not `<host> <token>`")]
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_says_nothing_is_refused(
    #[case] key: &str,
    #[case] value: &str,
    #[case] message: &str,
) -> Result<()> {
    let cache = private(404)?;
    let node = TestNode::start(&config(&[cache.url()])?).await?;
    let path = Fixtures::find()?.get("hello")?.path.to_string();
    let said = node.refused(&Volume::new("a", "a1", &path).secret(key, value)).await?;
    assert_eq!(said.code(), Code::InvalidArgument);
    ensure!(said.message().contains(message), "{said}");
    ensure!(!said.message().contains(TOKEN), "{said}");
    // Nobody was asked for anything.
    assert_eq!(cache.requests("").len(), 0);
    Ok(())
}
