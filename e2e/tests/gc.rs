//! On a disk that is too small for everything, what nobody uses makes room for what somebody wants; what is mounted,
//! rooted or an administrator's stays.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix_csi_e2e::driver::{TestNode, Volume, config, mounts_below};
use nix_csi_e2e::nar_cache::{NarCache, Offer, sha256};
use nix_csi_e2e::small_fs::SmallFs;
use nix_csi_e2e::{CacheServer, Rule, nix, tree};
use nix_csi_node::Limits;
use nix_csi_node::config::Config;
use nix_csi_node::store::NodeStore;
use nix_csi_store::nar::NarWriter;
use nix_csi_store::{NarHash, StorePath};
use rstest::rstest;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;
/// Collection is looked for every ten seconds.
const LONG: Duration = Duration::from_mins(1);
const NEVER: Limits = Limits { min_free: Some(0), max_free: None };
/// More than there is: whatever can go, goes.
const ALWAYS: Limits = Limits { min_free: Some(u64::MAX), max_free: None };
/// Only when somebody finds no room.
const WHEN_FULL: Limits = Limits { min_free: Some(1), max_free: None };

#[derive(Debug, Clone, Copy)]
enum Kind {
    Tmpfs,
    Ext4,
}

impl Kind {
    fn make(self, bytes: u64, inodes: Option<u64>) -> Result<SmallFs> {
        match self {
            Self::Tmpfs => SmallFs::tmpfs(bytes, inodes),
            Self::Ext4 => SmallFs::ext4(bytes, inodes),
        }
    }
}

/// A path that a cache has, and what must be in it.
#[derive(Debug, Clone)]
struct Package {
    path: StorePath,
    name: String,
    len: usize,
    files: usize,
}

impl Package {
    fn text(&self) -> String {
        self.path.to_string()
    }

    /// Fails unless `at` has every byte of it.
    fn check(&self, at: &Path) -> Result<()> {
        let is_same = |file: &str, len| -> Result<()> {
            let found = fs::read(at.join(file)).with_context(|| format!("{file} in {}", at.display()))?;
            ensure!(
                found == bytes(&format!("{}/{file}", self.name), len),
                "{file} is another in {}",
                at.display()
            );
            Ok(())
        };
        is_same("data", self.len)?;
        (0..self.files).try_for_each(|n| is_same(&small(n), SMALL))
    }
}

/// How many bytes a small file has.
const SMALL: usize = 100;

fn small(n: usize) -> String {
    format!("small-{n:05}")
}

/// Bytes that look like chance, and are the same for the same name.
fn bytes(name: &str, len: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    }) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A node on a disk of its own, and a cache.
struct Setup {
    // Before the disk that it is on.
    node: TestNode,
    server: CacheServer,
    cache: NarCache,
    disk: SmallFs,
    /// Of this test alone: the table of mounts is that of all.
    suffix: String,
}

static SETUPS: AtomicUsize = AtomicUsize::new(0);

impl Setup {
    fn new(disk: SmallFs) -> Result<Self> {
        let cache = NarCache::new()?;
        let server = CacheServer::start(cache.dir())?;
        let node = TestNode::in_dir(tempfile::tempdir_in(disk.path())?)?;
        let suffix = format!(".{}", SETUPS.fetch_add(1, Ordering::Relaxed));
        Ok(Self { node, server, cache, disk, suffix })
    }

    async fn start(&mut self, limits: Limits) -> Result<()> {
        let config = self.config(limits)?;
        self.node.stop_driver().await?;
        // Here the process does not end with its driver: what that is still collecting may come to its end.
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.node.start_driver(&config).await
    }

    fn config(&self, limits: Limits) -> Result<Config> {
        let key = self.cache.public_key().parse()?;
        Ok(Config { trusted_public_keys: vec![key], limits, ..config(&[self.server.url()])? })
    }

    /// A package of that many MiB.
    fn package(&self, name: &str, mib: u64, references: &[&Package]) -> Result<Package> {
        self.package_of(name, usize::try_from(mib * MIB)?, 0, references)
    }

    /// A package of one file of `len` bytes, and so many small ones.
    fn package_of(&self, name: &str, len: usize, files: usize, references: &[&Package]) -> Result<Package> {
        let mut nar = NarWriter::new(Vec::new())?;
        let add = |nar: &mut NarWriter<_>, file: &str, len: usize| -> Result<()> {
            nar.entry(file.as_bytes())?;
            nar.file(false, len as u64)?;
            nar.data(&bytes(&format!("{name}/{file}"), len))?;
            nar.file_end()?;
            Ok(nar.entry_end()?)
        };
        nar.directory()?;
        add(&mut nar, "data", len)?;
        (0..files).try_for_each(|n| add(&mut nar, &small(n), SMALL))?;
        nar.directory_end()?;
        let nar = nar.into_inner();
        let mut references: Vec<_> = references.iter().map(|package| package.path.clone()).collect();
        references.sort_unstable();
        let path = self.cache.offer(&Offer {
            name: &(name.to_owned() + &self.suffix),
            compression: "none",
            file: &nar,
            nar_hash: sha256(&nar),
            nar_size: nar.len() as u64,
            references: &references,
        })?;
        Ok(Package { path, name: name.to_owned(), len, files })
    }

    fn packages(&self, names: &[&str], mib: u64) -> Result<Vec<Package>> {
        names.iter().map(|name| self.package(name, mib, &[])).collect()
    }

    /// Publishes and unpublishes it.
    async fn use_once(&self, package: &Package) -> Result<()> {
        self.publish(&read_only(&package.name, package)).await??;
        self.check(&package.name, package)?;
        self.node.unpublish(&package.name).await
    }

    async fn publish(&self, volume: &Volume) -> Result<Result<(), Status>> {
        self.node.publish(volume).await
    }

    /// The same call again and again, as kubelet does it, while there is no room.
    async fn publish_at_last(&self, volume: &Volume) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.publish(volume).await? {
                Ok(()) => return Ok(()),
                Err(status) if start.elapsed() < LONG && is_for_now(&status) => {}
                Err(status) => {
                    return Err(status).with_context(|| format!("{} is not published", volume.pod));
                }
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Fails unless the mount of `pod` shows all of `package`.
    fn check(&self, pod: &str, package: &Package) -> Result<()> {
        package.check(&self.node.target(pod).join("store").join(package.path.base_name()))
    }

    fn free(&self) -> Result<u64> {
        Ok(self.disk.free()?.bytes)
    }

    /// The views that can be found.
    fn views(&self) -> Result<BTreeSet<String>> {
        names(&self.node.root().join("views"))
    }

    /// The names of all valid paths.
    fn valid(&self) -> Result<BTreeSet<String>> {
        let valid = NodeStore::open(&self.node.root())?.valid_paths()?;
        Ok(valid.iter().map(|info| info.path.name().trim_end_matches(&self.suffix).to_owned()).collect())
    }

    /// How often the NAR of `package` was asked for.
    fn downloads(&self, package: &Package) -> usize {
        self.server.requests(&format!("{}.nar", package.path.hash())).len()
    }

    /// Waits until it is so.
    async fn wait(&self, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !is_so()? {
            if start.elapsed() > LONG {
                bail!(
                    "{what}: it never is so; valid {:?}, views {:?}, free {}",
                    self.valid()?,
                    self.views()?,
                    self.free()?
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Waits until exactly these paths are valid, and fails if fewer are.
    async fn wait_for_valid(&self, names: &[&str]) -> Result<()> {
        let expected: BTreeSet<_> = names.iter().map(ToString::to_string).collect();
        self.wait(&format!("valid are {names:?}"), || {
            let valid = self.valid()?;
            ensure!(valid.is_superset(&expected), "gone: {:?}", expected.difference(&valid));
            Ok(valid == expected)
        })
        .await
    }

    /// Waits until database, store directory, views and roots agree, and nothing half done is left.
    async fn agree(&self) -> Result<()> {
        tree::wait_until_clean(&self.node.root())?;
        let start = Instant::now();
        loop {
            match self.disagreement() {
                Ok(()) => return Ok(()),
                Err(error) if start.elapsed() > LONG => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        }
    }

    fn disagreement(&self) -> Result<()> {
        let store = NodeStore::open(&self.node.root())?;
        let mut valid = BTreeSet::new();
        for info in store.valid_paths()? {
            store.check(&info).with_context(|| info.path.to_string())?;
            valid.insert(info.path.base_name().to_owned());
        }
        let mut there = names(&store.layout().store_dir())?;
        there.remove(".links");
        same("paths and files", &valid, &there)?;
        let views = names(&store.layout().views())?;
        let views = views.iter().map(|name| name.split('.').next().unwrap_or_default().to_owned()).collect();
        same("views and roots", &views, &names(&self.node.root().join("nix/var/nix/gcroots/nix-csi"))?)
    }

    /// Nothing is left but what is valid, and real Nix finds it as it must be.
    async fn end(mut self, pods: &[&str]) -> Result<()> {
        for pod in pods {
            self.node.unpublish(pod).await?;
        }
        self.agree().await?;
        self.node.stop_driver().await?;
        self.node.assert_empty()?;
        nix::verify(&self.node.root())
    }
}

fn is_for_now(status: &Status) -> bool {
    matches!(status.code(), Code::ResourceExhausted | Code::Aborted)
}

fn read_only(pod: &str, package: &Package) -> Volume {
    Volume::new("default", pod, &package.text())
}

fn read_write(pod: &str, package: &Package) -> Volume {
    Volume { readonly: false, ..read_only(pod, package) }
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn same<T: PartialEq + Debug>(what: &str, one: &T, other: &T) -> Result<()> {
    ensure!(one == other, "{what} differ: {one:?}, {other:?}");
    Ok(())
}

/// Seven packages that were used in this order, the least recently used one first: b, c, d, e, a. `s` is needed by a
/// and d, `t` by b and c. With what they need they take 70 MiB.
async fn used(setup: &Setup) -> Result<Vec<Package>> {
    let (s, t) = (setup.package("s", 10, &[])?, setup.package("t", 10, &[])?);
    let mut all = Vec::new();
    for (name, needs) in [("a", Some(&s)), ("b", Some(&t)), ("c", Some(&t)), ("d", Some(&s)), ("e", None)] {
        let package = setup.package(name, 10, needs.as_slice())?;
        setup.use_once(&package).await?;
        all.push(package);
    }
    setup.use_once(&all[0]).await?;
    Ok(all)
}

/// Below `min_free` when 75 MiB are used; enough is free when 45 are.
fn between(empty: u64) -> Limits {
    Limits { min_free: Some(empty - 75 * MIB), max_free: Some(empty - 45 * MIB) }
}

#[rstest]
#[case::tmpfs(Kind::Tmpfs)]
#[case::ext4(Kind::Ext4)]
#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_goes_with_what_only_it_needed(#[case] kind: Kind) -> Result<()> {
    let mut setup = Setup::new(kind.make(256 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let limits = between(setup.free()?);
    setup.start(limits).await?;
    let packages = used(&setup).await?;
    let f = setup.package("f", 10, &[])?;
    assert_eq!(setup.valid()?.len(), 7, "there is room for all of them");
    setup.publish(&read_only("f", &f)).await??;
    setup.wait_for_valid(&["a", "e", "f", "s"]).await?;
    setup.agree().await?;
    assert_eq!(setup.views()?.len(), 3);
    assert!(Some(setup.free()?) >= limits.max_free);
    setup.check("f", &f)?;

    // What is still here is not fetched again, what went is.
    for (package, downloads) in packages.iter().zip([1, 2, 2, 2, 1]) {
        setup.use_once(package).await?;
        assert_eq!(setup.downloads(package), downloads, "{}", package.name);
    }
    setup.check("f", &f)?;
    setup.end(&["f"]).await
}

/// What happens to `used.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    AsItWas,
    Lost,
    As(&'static str),
}

#[rstest]
#[case::as_it_was_written(Written::AsItWas)]
#[case::lost(Written::Lost)]
#[case::torn(Written::As("{\""))]
#[case::of_nobody(Written::As("{\"../../../etc\":18446744073709551615,\"\":3}"))]
#[case::empty(Written::As(""))]
#[tokio::test(flavor = "multi_thread")]
async fn the_order_outlives_the_process_and_its_loss_harms_nothing(#[case] written: Written) -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(256 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let limits = between(setup.free()?);
    let packages = used(&setup).await?;
    let f = setup.package("f", 10, &[])?;
    setup.publish(&read_only("f", &f)).await??;
    setup.node.stop_driver().await?;
    let file = setup.node.root().join("used.json");
    match written {
        Written::AsItWas => {}
        Written::Lost => fs::remove_file(&file)?,
        Written::As(text) => fs::write(&file, text)?,
    }
    setup.start(limits).await?;
    if written == Written::AsItWas {
        setup.wait_for_valid(&["a", "e", "f", "s"]).await?;
    }
    setup.wait("enough is free", || Ok(Some(setup.free()?) >= limits.max_free)).await?;
    setup.agree().await?;
    setup.check("f", &f)?;
    for package in &packages {
        setup.use_once(package).await?;
    }
    setup.end(&["f"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_mounted_stays_however_full_the_disk_is() -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(256 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let shared = setup.package("shared", 5, &[])?;
    let (ro, rw) = (setup.package("ro", 10, &[&shared])?, setup.package("rw", 10, &[])?);
    for package in &setup.packages(&["a", "b", "c"], 10)? {
        setup.use_once(package).await?;
    }
    let user = setup.package("user", 10, &[&shared])?;
    setup.use_once(&user).await?;
    setup.publish(&read_only("ro", &ro)).await??;
    setup.publish(&read_write("rw", &rw)).await??;
    fs::write(setup.node.target("rw").join("written"), "by the pod")?;
    setup.start(ALWAYS).await?;
    setup.wait_for_valid(&["ro", "rw", "shared"]).await?;
    // Once more, when all that can go has gone.
    setup.start(ALWAYS).await?;
    let more = setup.package("more", 10, &[])?;
    setup.use_once(&more).await?;
    setup.wait_for_valid(&["ro", "rw", "shared"]).await?;
    setup.agree().await?;
    for (pod, package) in [("ro", &ro), ("ro", &shared), ("rw", &rw)] {
        setup.check(pod, package)?;
    }
    assert_eq!(fs::read_to_string(setup.node.target("rw").join("written"))?, "by the pod");
    assert_eq!((setup.downloads(&ro), setup.downloads(&rw)), (1, 1));
    setup.node.unpublish("ro").await?;
    setup.wait_for_valid(&["rw"]).await?;
    setup.check("rw", &rw)?;
    setup.end(&["rw"]).await
}

#[rstest]
#[case::as_nobody_said(Limits { min_free: None, max_free: None })]
#[case::only_when_full(WHEN_FULL)]
#[case::all_that_can_be(ALWAYS)]
#[case::more_than_can_be_when_full(Limits { min_free: Some(1), max_free: Some(u64::MAX) })]
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_without_room_is_told_and_gets_it_when_another_goes(#[case] limits: Limits) -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(160 * MIB, None)?)?;
    // Before there is too little free: by then nobody new may write.
    setup.start(NEVER).await?;
    let (x, y) = (setup.package("x", 40, &[])?, setup.package("y", 40, &[])?);
    setup.publish(&read_only("x", &x)).await??;
    setup.publish(&read_write("y", &y)).await??;
    setup.start(limits).await?;
    let big = setup.package("big", 60, &[])?;
    for _ in 0..3 {
        let said = setup.node.refused(&read_only("big", &big)).await?;
        assert_eq!(said.code(), Code::ResourceExhausted, "{said}");
        assert!(said.message().contains(&big.text()) && said.message().contains("no space"), "{said}");
    }
    for (pod, package) in [("x", &x), ("y", &y)] {
        setup.check(pod, package)?;
    }
    setup.node.unpublish("x").await?;
    setup.publish_at_last(&read_only("big", &big)).await?;
    setup.check("big", &big)?;
    setup.check("y", &y)?;
    setup.wait_for_valid(&["big", "y"]).await?;
    setup.end(&["big", "y"]).await
}

/// What has arrived of it is not given up for the rest.
#[rstest]
#[case::only_when_full(WHEN_FULL)]
#[case::as_nobody_said(Limits { min_free: None, max_free: None })]
#[case::all_that_can_be(ALWAYS)]
#[tokio::test(flavor = "multi_thread")]
async fn a_closure_that_fits_only_alone_gets_its_room(#[case] limits: Limits) -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(160 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let warm = setup.packages(&["u", "v"], 15)?;
    for package in &warm {
        setup.use_once(package).await?;
    }
    let parts = setup.packages(&["p", "q", "r", "last"], 25)?;
    let root = setup.package("root", 1, &parts.iter().collect::<Vec<_>>())?;
    // The others are there when it is known how large this one is.
    let late = Rule::on(format!("{}.narinfo", parts[3].path.hash())).delay(Duration::from_secs(1));
    setup.server.rule(late);
    setup.start(limits).await?;
    setup.publish_at_last(&read_only("root", &root)).await?;
    for part in &parts {
        setup.check("root", part)?;
    }
    setup.end(&["root"]).await
}

#[rstest]
#[case::tmpfs(Kind::Tmpfs, 4000)]
#[case::ext4(Kind::Ext4, 2500)]
#[tokio::test(flavor = "multi_thread")]
async fn inodes_run_out_as_bytes_do(#[case] kind: Kind, #[case] inodes: u64) -> Result<()> {
    let mut setup = Setup::new(kind.make(256 * MIB, Some(inodes))?)?;
    setup.start(WHEN_FULL).await?;
    let kept = setup.package_of("kept", 10, 300, &[])?;
    setup.publish(&read_only("kept", &kept)).await??;
    let mut packages = Vec::new();
    for n in 0..12 {
        packages.push(setup.package_of(&format!("many-{n}"), 10, 400, &[])?);
    }
    for _ in 0..2 {
        for package in &packages {
            setup.publish_at_last(&read_only("pod", package)).await?;
            setup.check("pod", package)?;
            setup.node.unpublish("pod").await?;
            setup.check("kept", &kept)?;
        }
    }
    let (full, bytes) = (setup.disk.free()?, setup.free()?);
    assert!(bytes > 100 * MIB, "it was not bytes that were missing: {full:?}");
    // One that has more than a twentieth of all inodes, and finds more than that free.
    let large = setup.package_of("large", 10, 1200, &[])?;
    setup.publish_at_last(&read_write("large", &large)).await?;
    setup.check("large", &large)?;
    setup.check("kept", &kept)?;
    setup.end(&["kept", "large"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_administrator_put_there_stays() -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(256 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let root = setup.node.root();
    let root = root.to_str().context("a path of this test")?;
    let add = |name: &str| -> Result<StorePath> {
        let file = setup.disk.path().join(name);
        fs::write(&file, bytes(name, 1000))?;
        Ok(nix::nix(["nix-store", "--store", root, "--add", file.to_str().context("text")?])?
            .trim()
            .parse()?)
    };
    let (dependency, unused) = (setup.package("dependency", 5, &[])?, setup.package("unused", 5, &[])?);
    let rooted = setup.package("rooted", 5, &[&dependency])?;
    let indirect = setup.package("indirect", 5, &[])?;
    let mounted = setup.package("mounted", 5, &[])?;
    for package in [&rooted, &unused, &indirect] {
        setup.use_once(package).await?;
    }
    setup.publish(&read_write("mounted", &mounted)).await??;
    let (ours, theirs) = (add("added")?, add("added-and-rooted")?);
    let roots = setup.node.root().join("nix/var/nix/gcroots");
    fs::create_dir(roots.join("of-admin"))?;
    for (name, path) in [("one", rooted.text()), ("two", theirs.to_string())] {
        std::os::unix::fs::symlink(path, roots.join("of-admin").join(name))?;
    }
    let result = setup.disk.path().join("result");
    std::os::unix::fs::symlink(indirect.text(), &result)?;
    std::os::unix::fs::symlink(&result, roots.join("indirect"))?;

    setup.start(ALWAYS).await?;
    let stays = ["added", "added-and-rooted", "dependency", "indirect", "mounted", "rooted"];
    setup.wait_for_valid(&stays).await?;
    // Real collectors meanwhile, and what is wanted all the same. They know nothing of whose a path is.
    let collect = {
        let root = root.to_owned();
        tokio::task::spawn_blocking(move || {
            (0..4).try_for_each(|_| nix::nix(["nix-store", "--store", &root, "--gc"]).map(drop))
        })
    };
    for _ in 0..4 {
        setup.publish_at_last(&read_only("pod", &unused)).await?;
        setup.check("pod", &unused)?;
        setup.node.unpublish("pod").await?;
    }
    collect.await??;
    let stays: Vec<_> = stays.into_iter().filter(|name| *name != ours.name()).collect();
    setup.wait_for_valid(&stays).await?;
    setup.check("mounted", &mounted)?;

    // Without its root it is like any other that was fetched.
    fs::remove_file(&result)?;
    fs::remove_file(roots.join("of-admin/one"))?;
    setup.start(ALWAYS).await?;
    setup.wait_for_valid(&["added-and-rooted", "mounted"]).await?;
    setup.end(&["mounted"]).await
}

/// The last one who brought it is who says whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_administrator_copied_after_it_was_collected_stays() -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(256 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let package = setup.package("package", 5, &[])?;
    setup.use_once(&package).await?;
    let root = setup.node.root();
    let root = root.to_str().context("a path of this test")?;
    let view = names(&setup.node.root().join("views"))?;
    setup.node.stop_driver().await?;
    for view in &view {
        fs::rename(setup.node.root().join("views").join(view), setup.disk.path().join(view))?;
    }
    // Starting it takes the roots of views that are not there away.
    setup.start(NEVER).await?;
    nix::nix(["nix-store", "--store", root, "--gc"])?;
    setup.wait_for_valid(&[]).await?;
    setup.start(ALWAYS).await?;
    setup.agree().await?;
    setup.start(ALWAYS).await?;
    setup.agree().await?;
    let other = setup.package("other", 5, &[])?;
    setup.use_once(&other).await?;
    setup.wait_for_valid(&[]).await?;
    let copy =
        ["nix", "copy", "--no-check-sigs", "--from", &setup.cache.url(), "--to", root, &package.text()];
    nix::nix(copy)?;
    setup.start(ALWAYS).await?;
    setup.use_once(&other).await?;
    setup.wait_for_valid(&["package"]).await?;
    setup.end(&[]).await
}

/// Chance that is the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or_default() % n
    }
}

#[rstest]
#[case::tmpfs(Kind::Tmpfs)]
#[case::ext4(Kind::Ext4)]
#[tokio::test(flavor = "multi_thread")]
async fn whatever_comes_and_goes_at_once_has_its_files(#[case] kind: Kind) -> Result<()> {
    let mut setup = Setup::new(kind.make(112 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let free = setup.free()?;
    let shared: Vec<_> = setup.packages(&["shared-0", "shared-1", "shared-2"], 2)?;
    let mut packages = Vec::new();
    for n in 0..12 {
        let name = format!("churn-{n}");
        packages.push(setup.package_of(&name, 8 << 20, 30, &[&shared[n % 3], &shared[(n + 1) % 3]])?);
    }
    // Low nearly all the time.
    setup.start(Limits { min_free: Some(free - 15 * MIB), max_free: Some(free - 5 * MIB) }).await?;
    let (setup, packages) = (Arc::new(setup), Arc::new(packages));
    let end = Instant::now() + Duration::from_secs(15);
    let mut tasks = Vec::new();
    for task in 0..6_u64 {
        let (setup, packages) = (Arc::clone(&setup), Arc::clone(&packages));
        tasks.push(tokio::spawn(async move {
            let mut dice = Dice(task);
            let (mut done, mut refused) = (0, 0);
            let pod = format!("pod-{task}");
            while Instant::now() < end {
                let package = &packages[dice.below(packages.len())];
                let volume =
                    if dice.below(3) == 0 { read_write(&pod, package) } else { read_only(&pod, package) };
                match setup.publish(&volume).await? {
                    Ok(()) => {
                        setup.check(&pod, package)?;
                        tokio::time::sleep(Duration::from_millis(dice.below(200) as u64)).await;
                        setup.check(&pod, package)?;
                        done += 1;
                    }
                    Err(status) if is_for_now(&status) => refused += 1,
                    Err(status) => return Err(status).context(package.name.clone()),
                }
                setup.node.unpublish(&pod).await?;
            }
            Ok::<_, anyhow::Error>((done, refused))
        }));
    }
    let mut all = (0, 0);
    for task in tasks {
        let (done, refused) = task.await??;
        all = (all.0 + done, all.1 + refused);
    }
    println!("published {}, without room {}", all.0, all.1);
    assert!(all.0 > 0);
    let setup = Arc::into_inner(setup).context("all tasks have ended")?;
    for package in packages.iter() {
        setup.publish_at_last(&read_only("pod", package)).await?;
        setup.check("pod", package)?;
        setup.node.unpublish("pod").await?;
    }
    setup.end(&[]).await
}

#[rstest]
#[case::while_there_is_enough(0)]
#[case::while_there_is_too_little(65)]
#[tokio::test(flavor = "multi_thread")]
async fn what_could_never_fit_costs_nobody_else_anything(#[case] ballast: u64) -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(160 * MIB, None)?)?;
    setup.start(Limits { min_free: Some(25 * MIB), max_free: Some(40 * MIB) }).await?;
    for package in &setup.packages(&["old", "warm", "warmer"], 25)? {
        setup.use_once(package).await?;
    }
    let (nar_hash, references) = (NarHash::new([7; 32]), &[][..]);
    let offer =
        Offer { name: "huge", compression: "none", file: b"", nar_hash, nar_size: 1 << 40, references };
    let huge = setup.cache.offer(&offer)?;
    // From here on the older one may have to go, and must if the disk is low.
    fs::write(setup.disk.path().join("ballast"), vec![7; usize::try_from(ballast * MIB)?])?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(15) {
        let said = setup.node.refused(&Volume::new("default", "huge", &huge.to_string())).await?;
        assert_eq!(said.code(), Code::ResourceExhausted, "{said}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let kept = if ballast == 0 { &["old", "warm", "warmer"][..] } else { &["warm", "warmer"] };
    setup.wait_for_valid(kept).await?;
    setup.end(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_means_never() -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(100 * MIB, None)?)?;
    setup.start(NEVER).await?;
    for package in &setup.packages(&["a", "b"], 25)? {
        setup.use_once(package).await?;
    }
    let big = setup.package("big", 30, &[])?;
    let start = Instant::now();
    // Longer than it takes to look again.
    while start.elapsed() < Duration::from_secs(12) {
        let said = setup.node.refused(&read_only("big", &big)).await?;
        assert_eq!(said.code(), Code::ResourceExhausted, "{said}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    setup.wait_for_valid(&["a", "b"]).await?;
    setup.end(&[]).await
}

#[rstest]
#[case::read_only(true)]
#[case::read_write(false)]
#[tokio::test(flavor = "multi_thread")]
async fn a_retired_view_stays_while_it_is_shown(#[case] readonly: bool) -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(160 * MIB, None)?)?;
    // Before there is too little free: by then nobody new may write.
    setup.start(NEVER).await?;
    let package = setup.package("package", 10, &[])?;
    setup.publish(&Volume { readonly, ..read_only("old", &package) }).await??;
    setup.start(ALWAYS).await?;
    let views = setup.node.root().join("views");
    let id = setup.views()?.pop_first().context("a view")?;
    let retired = views.join(format!("{id}.retired-x"));
    fs::rename(views.join(&id), &retired)?;
    // A pod that comes now has another view, and does not need it for long.
    setup.publish_at_last(&read_only("new", &package)).await?;
    assert!(views.join(&id).is_dir());
    setup.node.unpublish("new").await?;
    setup.start(ALWAYS).await?;
    let other = setup.package("other", 5, &[])?;
    setup.use_once(&other).await?;
    setup.wait("what is not used is gone", || Ok(!setup.valid()?.contains("other"))).await?;
    setup.check("old", &package)?;
    assert!(retired.is_dir());
    setup.node.unpublish("old").await?;
    setup.wait("the retired view is gone", || Ok(!retired.exists())).await?;
    setup.wait_for_valid(&[]).await?;
    setup.end(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_valid_goes_and_locks_stay() -> Result<()> {
    let mut setup = Setup::new(SmallFs::tmpfs(160 * MIB, None)?)?;
    setup.start(NEVER).await?;
    let package = setup.package("package", 10, &[])?;
    setup.publish(&read_only("pod", &package)).await??;
    tree::wait_until_clean(&setup.node.root())?;
    let store = setup.node.root().join("nix/store");
    let stranger = |c: char, name: &str| store.join(format!("{}-{name}", c.to_string().repeat(32)));
    let (dir, file, link) = (stranger('a', "dir"), stranger('b', "file"), stranger('c', "link"));
    fs::create_dir_all(dir.join("sub"))?;
    fs::write(dir.join("sub/file"), vec![7; 1 << 20])?;
    fs::write(&file, "")?;
    std::os::unix::fs::symlink("/nowhere", &link)?;
    let (lock, held) = (stranger('d', "held.lock"), stranger('d', "held"));
    let holder = fs::File::create(&lock)?;
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive)?;
    fs::create_dir(&held)?;
    setup.start(ALWAYS).await?;
    setup
        .wait("strangers are gone", || {
            Ok([&dir, &file, &link].iter().all(|path| fs::symlink_metadata(path).is_err()))
        })
        .await?;
    assert!(lock.exists() && held.exists(), "somebody works there");
    // Its holder was killed: the lock is given back, and what it kept is a stranger too.
    drop(holder);
    setup.start(ALWAYS).await?;
    setup.wait("the last one is gone", || Ok(!held.exists() && !lock.exists())).await?;
    setup.check("pod", &package)?;
    assert_eq!(mounts_below(&setup.node.target("pod"))?.len(), 1);
    setup.end(&["pod"]).await
}
