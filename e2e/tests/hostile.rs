//! What an enemy may put into a cache, and what a full disk does. Real Nix judges what is left.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::nar_cache::{NarCache, Offer, SlowServer, sha256};
use nix_csi_e2e::{Fixtures, nix, tree};
use nix_csi_node::config::Config;
use nix_csi_node::publish::PublishError;
use nix_csi_node::start_substituter;
use nix_csi_node::store::NodeStore;
use nix_csi_node::substituter::{Closure, FetchError, Progress, Substituter};
use nix_csi_store::nar::NarWriter;
use nix_csi_store::{NarHash, StorePath};
use rstest::rstest;
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::Code;

/// A store in `dir/root`, and beside it what nobody may touch.
struct Setup {
    substituter: Substituter,
    // Before the directory that it is in.
    disk: Option<Tmpfs>,
    dir: TempDir,
}

impl Setup {
    fn new(cache: &str, key: &str) -> Result<Self> {
        Self::with(None, cache, key)
    }

    /// On a disk of its own.
    fn on_disk(options: &str, cache: &str, key: &str) -> Result<Self> {
        Self::with(Some(options), cache, key)
    }

    fn with(disk: Option<&str>, cache: &str, key: &str) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        fs::create_dir(&root)?;
        let disk = disk.map(|options| Tmpfs::mount(&root, options)).transpose()?;
        fs::create_dir(dir.path().join("canary"))?;
        fs::write(dir.path().join("canary/file"), "as it was")?;
        let config = Config {
            substituters: vec![cache.parse()?],
            trusted_public_keys: vec![key.parse()?],
            download_attempts: 1,
            ..Config::default()
        };
        let substituter = start_substituter(Arc::new(NodeStore::open(&root)?), &config)?;
        Ok(Self { substituter, disk, dir })
    }

    fn remount(&self, options: &str) -> Result<()> {
        self.disk.as_ref().context("a disk of its own")?.remount(options)
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn store(&self) -> &NodeStore {
        self.substituter.store()
    }

    async fn fetch(&self, path: &StorePath) -> Result<Closure, FetchError> {
        let sender = watch::channel(Progress::default()).0;
        self.substituter.fetch(std::slice::from_ref(path), &sender).await
    }

    /// The whole message of a fetch that must fail.
    async fn refused(&self, path: &StorePath) -> Result<String> {
        match self.fetch(path).await {
            Ok(_) => anyhow::bail!("{path} was taken"),
            Err(error) => Ok(format!("{:#}", anyhow::Error::new(error))),
        }
    }

    /// Everything that this test's directory has, when what is deleted beside is gone. Without Nix's own files:
    /// they come and go.
    fn seen(&self) -> Result<BTreeMap<PathBuf, String>> {
        tree::wait_until_clean(&self.root())?;
        let mut seen = tree::describe(self.dir.path())?;
        seen.retain(|path, _| !path.starts_with("root/nix/var/nix"));
        // They change their time when something is made and removed again.
        for dir in ["root/staging", "root/trash"] {
            seen.remove(Path::new(dir));
        }
        Ok(seen)
    }

    /// What differs from `before`.
    fn changes(&self, before: &BTreeMap<PathBuf, String>) -> Result<Vec<String>> {
        let now = self.seen()?;
        let paths = before.keys().chain(now.keys());
        let mut changed: Vec<_> = paths
            .filter(|path| before.get(*path) != now.get(*path))
            .map(|path| format!("{}: {:?} -> {:?}", path.display(), before.get(path), now.get(path)))
            .collect();
        changed.dedup();
        Ok(changed)
    }

    /// Fails unless the files of every valid path are as the database says, by our own reading.
    fn check_valid(&self) -> Result<usize> {
        let valid = self.store().valid_paths()?;
        for info in &valid {
            self.store().check(info).with_context(|| info.path.to_string())?;
        }
        Ok(valid.len())
    }
}

/// What NARs are made of: a length, the bytes, zeros up to a multiple of eight.
fn words(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in words {
        bytes.extend((word.len() as u64).to_le_bytes());
        bytes.extend_from_slice(word);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn file(contents: &[u8]) -> Vec<u8> {
    words(&[b"(", b"type", b"regular", b"contents", contents, b")"])
}

fn link(target: &[u8]) -> Vec<u8> {
    words(&[b"(", b"type", b"symlink", b"target", target, b")"])
}

fn directory(entries: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    let mut bytes = words(&[b"(", b"type", b"directory"]);
    for (name, node) in entries {
        bytes.extend(words(&[b"entry", b"(", b"name", name, b"node"]));
        bytes.extend(node);
        bytes.extend(words(&[b")"]));
    }
    bytes.extend(words(&[b")"]));
    bytes
}

/// That many directories in each other.
fn nested(depth: usize) -> Vec<u8> {
    let begin =
        [words(&[b"(", b"type", b"directory"]), words(&[b"entry", b"(", b"name", b"d", b"node"])].concat();
    let mut bytes = begin.repeat(depth - 1);
    bytes.extend(directory(&[]));
    bytes.extend(words(&[b")", b")"]).repeat(depth - 1));
    bytes
}

fn archive(node: &[u8]) -> Vec<u8> {
    [&words(&[b"nix-archive-1"]), node].concat()
}

/// A string that says it is longer than anything.
fn endless(before: &[&[u8]], len: u64) -> Vec<u8> {
    [words(before), len.to_le_bytes().to_vec(), vec![0; 64]].concat()
}

fn without_last(bytes: &[u8], count: usize) -> Vec<u8> {
    bytes[..bytes.len() - count].to_vec()
}

/// A node with one byte of its padding set: the last byte of the string that ends at `end`.
fn padded(mut node: Vec<u8>, string: &[u8]) -> Vec<u8> {
    let at = node.windows(string.len()).rposition(|part| part == string).unwrap() + string.len();
    assert_eq!(node[at], 0, "padding");
    node[at] = 1;
    node
}

const NO_NAME: &str = "cannot be the name of an entry";
const NO_ORDER: &str = "does not come after the one before it";
const NO_TARGET: &str = "a symlink target that is empty or contains NUL";
const TOO_DEEP: &str = "directories more than 64 deep";
const ENDS_EARLY: &str = "the archive ends early";

/// Nodes that no archive may have, and what is said about them.
fn bad_nodes() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let named = |name: &[u8]| directory(&[(name, file(b"x"))]);
    let in_dir = |entries: &[(&[u8], Vec<u8>)]| directory(entries);
    let regular: [&[u8]; 3] = [b"(", b"type", b"regular"];
    let after = |words_after: &[&[u8]]| words(&[&regular[..], words_after].concat());
    vec![
        ("a name twice", in_dir(&[(b"a", file(b"1")), (b"a", file(b"2"))]), NO_ORDER),
        (
            "a symlink, then a directory of the same name",
            in_dir(&[(b"a", link(b"../../canary")), (b"a", directory(&[(b"file", file(b"evil"))]))]),
            NO_ORDER,
        ),
        (
            "a symlink, then a file of the same name",
            in_dir(&[(b"a", link(b"../../canary/file")), (b"a", file(b"evil"))]),
            NO_ORDER,
        ),
        ("a name ..", named(b".."), NO_NAME),
        ("a name .", named(b"."), NO_NAME),
        ("a name with a slash", named(b"a/b"), NO_NAME),
        ("an absolute name", named(b"/etc/evil"), NO_NAME),
        ("a name that climbs", named(b"../../canary/evil"), NO_NAME),
        ("a name with NUL", named(b"a\0b"), NO_NAME),
        ("an empty name", named(b""), NO_NAME),
        ("an empty target", link(b""), NO_TARGET),
        ("a target with NUL", link(b"a\0b"), NO_TARGET),
        ("a name of 256", named(&[b'n'; 256]), "a name of 256 bytes, at most 255 are allowed"),
        ("a name of 300", named(&[b'n'; 300]), "a name of 300 bytes, at most 255 are allowed"),
        ("a target of 4096", link(&[b't'; 4096]), "a symlink target of 4096 bytes, at most 4095"),
        ("a target of 5000", link(&[b't'; 5000]), "a symlink target of 5000 bytes, at most 4095"),
        ("padding of contents", padded(file(b"hello"), b"hello"), "padding that is not zero"),
        ("padding of a name", padded(named(b"hello"), b"hello"), "padding that is not zero"),
        ("padding of a tag", padded(file(b"x"), b"type"), "padding that is not zero"),
        ("a tag of 2^62", endless(&[b"(", b"type"], 1 << 62), "a tag of 4611686018427387904 bytes"),
        (
            "a name of 2^62",
            endless(&[b"(", b"type", b"directory", b"entry", b"(", b"name"], 1 << 62),
            "a name of 4611686018427387904 bytes",
        ),
        (
            "a target of 2^64-1",
            endless(&[b"(", b"type", b"symlink", b"target"], u64::MAX),
            "a symlink target of 18446744073709551615 bytes",
        ),
        ("contents of 2^62", endless(&[&regular[..], &[b"contents"]].concat(), 1 << 62), ENDS_EARLY),
        ("contents of 2^64-1", endless(&[&regular[..], &[b"contents"]].concat(), u64::MAX), ENDS_EARLY),
        (
            "executable that is not empty",
            after(&[b"executable", b"yes", b"contents", b"x", b")"]),
            "an empty value of `executable`",
        ),
        (
            "executable twice",
            after(&[b"executable", b"", b"executable", b"", b"contents", b"x", b")"]),
            "expected `contents`",
        ),
        ("contents before executable", after(&[b"contents", b"x", b"executable", b"", b")"]), "expected `)`"),
        ("contents twice", after(&[b"contents", b"x", b"contents", b"x", b")"]), "expected `)`"),
        ("a file without contents", after(&[b")"]), "expected `executable` or `contents`"),
        ("a symlink without target", words(&[b"(", b"type", b"symlink", b")"]), "expected `target`"),
        ("a device", words(&[b"(", b"type", b"device", b")"]), "expected regular, symlink or directory"),
        ("names that fall", in_dir(&[(b"b", file(b"")), (b"a", file(b""))]), NO_ORDER),
        (
            "an entry without node",
            words(&[b"(", b"type", b"directory", b"entry", b"(", b"name", b"a", b")", b")"]),
            "expected `node`",
        ),
        ("65 deep", nested(65), TOO_DEEP),
        ("100 deep", nested(100), TOO_DEEP),
        ("3000 deep", nested(3000), TOO_DEEP),
    ]
}

/// Whole archives of that kind.
fn bad_archives() -> Vec<(String, Vec<u8>, &'static str)> {
    let good = archive(&directory(&[(b"a", file(b"contents"))]));
    let with = |more: &[u8]| [&good[..], more].concat();
    let mut all: Vec<(String, Vec<u8>, &'static str)> = vec![
        ("a byte behind the end".into(), with(b"\0"), "bytes behind the end of the archive"),
        ("eight zeros behind the end".into(), with(&[0; 8]), "bytes behind the end of the archive"),
        ("another archive behind the end".into(), with(&good), "bytes behind the end of the archive"),
        ("without the last word".into(), without_last(&good, 16), ENDS_EARLY),
        ("without the last byte".into(), without_last(&good, 1), ENDS_EARLY),
        ("half of it".into(), without_last(&good, good.len() / 2), ENDS_EARLY),
        ("one byte".into(), b"\r".to_vec(), ENDS_EARLY),
        ("nothing".into(), Vec::new(), "\"0\" is not a size"),
        ("the magic only".into(), archive(&[]), ENDS_EARLY),
        (
            "another magic".into(),
            [words(&[b"nix-archive-2"]), file(b"x")].concat(),
            "expected the magic of a NAR",
        ),
        ("a magic without node".into(), archive(&words(&[b"[", b"]"])), "expected `(`"),
    ];
    for (case, node, reason) in bad_nodes() {
        all.push((case.into(), archive(&node), reason));
        // In one piece, in many by one thread, with three threads, and with files that another thread writes.
        for (what, mib, count) in [("3 MiB", 3, 1), ("5 MiB", 5, 1), ("small files", 5, 200)] {
            let contents = file(&vec![7; (mib << 20) / count]);
            let names: Vec<_> = (0..count).map(|n| format!("{n:03}")).collect();
            let mut entries: Vec<_> = names.iter().map(|name| (name.as_bytes(), contents.clone())).collect();
            entries.push((b"z", node.clone()));
            all.push((format!("{case}, behind {what}"), archive(&directory(&entries)), reason));
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_nar_is_refused_and_leaves_nothing() -> Result<()> {
    let cache = NarCache::new()?;
    let setup = Setup::new(&cache.url(), &cache.public_key())?;
    let good = archive(&directory(&[(b"a", file(b"good")), (b"b", link(b"a"))]));
    setup.fetch(&cache.add("first", &good)?).await?;
    let mut wrong = String::new();
    for (n, (case, nar, reason)) in bad_archives().into_iter().enumerate() {
        let before = setup.seen()?;
        let path = cache.add(&format!("bad-{n}"), &nar)?;
        match setup.refused(&path).await {
            Ok(message) => {
                for part in [reason, path.base_name(), &cache.url()] {
                    if !message.contains(part) {
                        writeln!(wrong, "{case}: {part:?} is not in: {message}")?;
                    }
                }
            }
            Err(error) => writeln!(wrong, "{case}: {error}")?,
        }
        for change in setup.changes(&before)? {
            writeln!(wrong, "{case}: {change}")?;
        }
        ensure!(setup.store().closure(std::slice::from_ref(&path))?.is_none(), "{case}: it is valid");
        let next = cache.add(&format!("good-{n}"), &good)?;
        setup.fetch(&next).await.with_context(|| format!("after {case}"))?;
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    nix::verify(&setup.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_odd_and_right_arrives() -> Result<()> {
    let cache = NarCache::new()?;
    let setup = Setup::new(&cache.url(), &cache.public_key())?;
    let long = [b'n'; 255];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("depth-63", nested(63)),
        ("depth-64", nested(64)),
        ("case", directory(&[(b"A", file(b"upper")), (b"a", file(b"lower"))])),
        ("long-name", directory(&[(&long, file(b"x"))])),
        ("long-target", link(&[b't'; 4095])),
        ("not-utf8", directory(&[(b"\x80\xfe\xff", link(b"\xff/\xfe"))])),
        (
            "odd-names",
            directory(&[(b"\n", file(b"")), (b" ", file(b"")), (b"...", file(b"")), (b"\\", file(b""))]),
        ),
        ("executable", words(&[b"(", b"type", b"regular", b"executable", b"", b"contents", b"x", b")"])),
        ("empty-file", file(b"")),
        ("empty-directory", directory(&[])),
        ("link-to-nothing", link(b"/proc/self/exe")),
    ];
    for (name, node) in &cases {
        let path = cache.add(name, &archive(node))?;
        setup.fetch(&path).await.with_context(|| (*name).to_owned())?;
    }
    let at = |name: &str| -> Result<PathBuf> {
        let valid = setup.store().valid_paths()?;
        let info = valid.iter().find(|info| info.path.base_name().ends_with(&format!("-{name}")));
        Ok(setup.store().layout().physical(&info.context("it is valid")?.path))
    };
    let odd = std::ffi::OsStr::from_bytes(b"\x80\xfe\xff");
    assert_eq!(fs::read_link(at("not-utf8")?.join(odd))?.as_os_str().as_bytes(), b"\xff/\xfe");
    assert_eq!(fs::read(at("case")?.join("A"))?, b"upper");
    assert_eq!(fs::read(at("case")?.join("a"))?, b"lower");
    tree::wait_until_clean(&setup.root())?;
    nix::verify(&setup.root())
}

/// Every bad fixture, and a part of what is said about it.
const BAD_FIXTURES: &[(&str, &str)] = &[
    ("unsigned", "it has no signature"),
    ("wrong-key", "signed by nix-csi-other-1, none of which is in trusted-public-keys"),
    ("forged-key", "its signature by nix-csi-test-1 is not right"),
    ("tampered", "signed was sha256:"),
    ("missing-nar", "is gone, although its narinfo is there"),
    ("other-path", "not about the path it was asked for"),
    ("size-lies-small", "bytes that were signed"),
    ("size-lies-large", "bytes that were signed"),
    ("narinfo-no-hash", "the field NarHash is missing"),
    ("narinfo-twice", "the field StorePath stands twice"),
    ("narinfo-huge", "answered with more than 262144 bytes"),
    ("narinfo-html", "is not a valid narinfo"),
    ("nar-trailing", "bytes that were signed"),
    ("nar-truncated", "bytes that were signed"),
    ("file-truncated", "cannot decompress"),
    ("nar-bomb", "bytes that were signed"),
    ("compression-unknown", "compression \"lrzip\" is not supported"),
    ("url-outside", "neither below the cache nor an http(s) address"),
    ("ca-lies-content", "its content does not have the hash of its content address, fixed:sha256:"),
    ("ca-lies-text", "its content does not have the hash of its content address, text:sha256:"),
    ("ca-lies-recursive", "its content does not have the hash of its content address, fixed:r:sha256:"),
    ("ca-lies-path", "it has no signature"),
    ("ca-lies-refs", "it has no signature"),
    ("ca-md5", "it has no signature"),
];

#[rstest]
#[case::zstd("zstd")]
#[case::xz("xz")]
#[tokio::test(flavor = "multi_thread")]
async fn each_bad_fixture_is_refused_for_what_is_wrong_with_it(#[case] compression: &str) -> Result<()> {
    let fixtures = Fixtures::find()?;
    let paths = fixtures.cache(compression).join("../../paths.json");
    let all: serde_json::Value = serde_json::from_slice(&fs::read(paths)?)?;
    let mut names: Vec<_> = BAD_FIXTURES.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    let bad = all.as_object().context("an object")?.iter().filter(|(_, fixture)| fixture["bad"] == true);
    assert_eq!(names, bad.map(|(name, _)| name.as_str()).collect::<Vec<_>>(), "the fixtures and this table");

    let server = SlowServer::start(&fixtures.cache(compression), u64::MAX)?;
    let setup = Setup::new(&server.url(), &fixtures.public_key()?)?;
    setup.fetch(&fixtures.get("hello")?.path).await?;
    let before = setup.seen()?;
    let mut wrong = String::new();
    for (name, reason) in BAD_FIXTURES {
        server.take_asked();
        let path = fixtures.get(name)?.path;
        match setup.refused(&path).await {
            Ok(message) => {
                for part in [reason, path.base_name(), &server.url()] {
                    if !message.contains(part) {
                        writeln!(wrong, "{name}: {part:?} is not in: {message}")?;
                    }
                }
            }
            Err(error) => writeln!(wrong, "{name}: {error}")?,
        }
        let nars = server.take_asked().into_iter().filter(|file| file.starts_with("nar/")).count();
        let is_refused_before = reason.contains("signature")
            || reason.contains("none of which")
            || name.starts_with("narinfo-")
            || ["other-path", "compression-unknown", "url-outside"].contains(name);
        if is_refused_before == (nars > 0) {
            writeln!(wrong, "{name}: {nars} NARs were asked for")?;
        }
        for change in setup.changes(&before)? {
            writeln!(wrong, "{name}: {change}")?;
        }
        ensure!(setup.store().closure(&[path])?.is_none(), "{name}: it is valid");
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    setup.fetch(&fixtures.get("jq")?.path).await?;
    nix::verify(&setup.root())
}

#[rstest]
#[case::zstd("zstd")]
#[case::xz("xz")]
#[tokio::test(flavor = "multi_thread")]
async fn what_proves_itself_needs_no_signature(#[case] compression: &str) -> Result<()> {
    let fixtures = Fixtures::find()?;
    let url = format!("file://{}", fixtures.cache(compression).display());
    let setup = Setup::new(&url, &NarCache::new()?.public_key())?;
    for name in ["ca-text", "ca-text-refs", "ca-recursive", "ca-flat", "ca-flat-sha1", "ca-flat-sha512"] {
        let fixture = fixtures.get(name)?;
        let closure = setup.fetch(&fixture.path).await.with_context(|| name.to_owned())?;
        assert_eq!(closure.paths, fixture.closure, "{name}");
        let root = setup.root();
        let info = nix::nix([
            "nix",
            "path-info",
            "--json",
            "--store",
            root.to_str().context("a path of this test")?,
            &fixture.path.to_string(),
        ])?;
        assert!(info.contains("\"ca\":\"fixed:") || info.contains("\"ca\":\"text:"), "{info}");
    }
    tree::wait_until_clean(&setup.root())?;
    nix::verify(&setup.root())
}

/// Compressed by the tool itself, which does not know the size when it writes the header.
fn piped(program: &str, args: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program}; e2e/setup.sh installs it"))?;
    let mut stdin = child.stdin.take().context("it is piped")?;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || stdin.write_all(input));
        let output = child.wait_with_output()?;
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        ensure!(output.status.success(), "{program}: {}", output.status);
        Ok(output.stdout)
    })
}

/// An archive with one file of that many bytes, which compresses to next to nothing.
fn large(len: usize) -> Result<Vec<u8>> {
    let pattern: Vec<u8> = (0..=250).collect();
    let mut nar = NarWriter::new(Vec::with_capacity(len + 1024))?;
    nar.file(false, len as u64)?;
    let contents: Vec<u8> = pattern.iter().copied().cycle().take(len).collect();
    nar.data(&contents)?;
    nar.file_end()?;
    Ok(nar.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_is_bounded_and_a_large_one_runs_alone() -> Result<()> {
    let cache = NarCache::new()?;
    let setup = Setup::new(&cache.url(), &cache.public_key())?;
    let (small, big) = (large(1000)?, large(60 << 20)?);
    let offer = |name: &str, compression: &str, nar: &[u8], file: &[u8]| {
        let (nar_hash, nar_size) = (sha256(nar), nar.len() as u64);
        cache.offer(&Offer { name, compression, file, nar_hash, nar_size, references: &[] })
    };
    let before = setup.seen()?;
    for (name, nar) in [("small-long-30", &small), ("big-long-30", &big)] {
        let path = offer(name, "zstd", nar, &piped("zstd", &["-c", "--long=30"], nar)?)?;
        let message = setup.refused(&path).await?;
        for part in ["needs a window of 1073741824 bytes", path.base_name(), &cache.url()] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
    }
    // The first frame says nothing of the second.
    let half = big.len() / 2;
    let frames =
        [piped("zstd", &["-c"], &big[..half])?, piped("zstd", &["-c", "--long=30"], &big[half..])?].concat();
    let path = offer("second-long-30", "zstd", &big, &frames)?;
    let message = setup.refused(&path).await?;
    assert!(message.contains("cannot decompress"), "{message}");
    assert_eq!(setup.changes(&before)?, Vec::<String>::new());
    assert_eq!(setup.substituter.ran_alone(), 0);

    for (n, (name, compression, args)) in [
        ("long-26", "zstd", &["-c", "--long=26"][..]),
        ("long-27", "zstd", &["-c", "--long=27"]),
        ("xz-9", "xz", &["-c", "-9"]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = offer(name, compression, &big, &piped(compression, args, &big)?)?;
        setup.fetch(&path).await.with_context(|| name.to_owned())?;
        assert_eq!(setup.substituter.ran_alone(), n as u64 + 1, "{name}");
    }
    // A large window alone takes no memory: there is no more content than that.
    let path = offer("small-long-27", "zstd", &small, &piped("zstd", &["-c", "--long=27"], &small)?)?;
    setup.fetch(&path).await?;
    assert_eq!(setup.substituter.ran_alone(), 3);
    tree::wait_until_clean(&setup.root())?;
    nix::verify(&setup.root())
}

/// A tmpfs in this test's mount namespace; gone with the value.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, options: &str) -> Result<Self> {
        mount(&["-t", "tmpfs", "-o", options, "tmpfs"], at)?;
        Ok(Self(at.to_owned()))
    }

    fn remount(&self, options: &str) -> Result<()> {
        mount(&["-o", &format!("remount,{options}")], &self.0)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn mount(args: &[&str], at: &Path) -> Result<()> {
    let output = Command::new("mount").args(args).arg(at).output().context("mount")?;
    ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What kubelet is told.
fn told(error: FetchError) -> (Code, String) {
    let error = PublishError::from(error);
    (error.code(), format!("{:#}", anyhow::Error::new(error)))
}

/// Nothing half done, and no file in the store directory that the database does not know.
fn only_what_is_valid(setup: &Setup) -> Result<usize> {
    tree::wait_until_clean(&setup.root())?;
    let valid = setup.check_valid()?;
    let mut strangers = Vec::new();
    for entry in fs::read_dir(setup.store().layout().store_dir())? {
        let name = entry?.file_name().into_string().map_err(|name| anyhow::anyhow!("{}", name.display()))?;
        let path = StorePath::from_base_name(&name);
        let known =
            path.is_ok_and(|path| setup.store().closure(&[path]).is_ok_and(|closure| closure.is_some()));
        if name != ".links" && !known {
            strangers.push(name);
        }
    }
    ensure!(strangers.is_empty(), "in the store directory and not valid: {strangers:?}");
    Ok(valid)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_leaves_what_is_valid() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let python = fixtures.get("python3")?;
    let server = SlowServer::start(&fixtures.cache("zstd"), u64::MAX)?;
    for size in ["24m", "48m", "64m", "80m"] {
        let setup = Setup::on_disk(&format!("size={size}"), &server.url(), &fixtures.public_key()?)?;
        let error = setup.fetch(&python.path).await.err().with_context(|| format!("{size} are enough"))?;
        let (code, message) = told(error);
        assert_eq!(code, Code::ResourceExhausted, "{size}: {message}");
        assert!(message.contains("no space") && message.contains("are free in"), "{size}: {message}");
        only_what_is_valid(&setup).with_context(|| size.to_owned())?;
        setup.remount("size=200m")?;
        let closure = setup.fetch(&python.path).await.with_context(|| size.to_owned())?;
        assert_eq!(closure.paths, python.closure);
        drop(closure);
        only_what_is_valid(&setup)?;
        nix::verify(&setup.root())?;
    }
    Ok(())
}

/// The margin keeps fetches from filling a disk; somebody else may fill it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_fill_is_told_and_leaves_what_is_valid() -> Result<()> {
    let fixtures = Fixtures::find()?;
    let python = fixtures.get("python3")?;
    let server = SlowServer::start(&fixtures.cache("zstd"), u64::MAX)?;
    let setup = Setup::on_disk("size=200m", &server.url(), &fixtures.public_key()?)?;
    // Each NAR that is larger than a page waits for the rest of its file.
    for path in &python.closure {
        server.hold(&nar_file(&fixtures, path)?);
    }
    let fetching = {
        let (substituter, path) = (setup.substituter.clone(), python.path.clone());
        tokio::spawn(async move { substituter.fetch(&[path], &watch::channel(Progress::default()).0).await })
    };
    wait_for(|| fs::read_dir(setup.root().join("staging")).is_ok_and(|mut dir| dir.next().is_some())).await?;
    let ballast = setup.root().join("ballast");
    let filled = fs::write(&ballast, vec![7; 200 << 20]);
    assert_eq!(filled.expect_err("a small disk").kind(), io::ErrorKind::StorageFull);
    server.release();
    let error = fetching.await?.err().context("the disk is full")?;
    let (code, message) = told(error);
    assert_eq!(code, Code::ResourceExhausted, "{message}");
    // The database says it in another way, if what arrived was to be registered just then.
    let said = if message.contains("cannot register") { "full" } else { "no space" };
    assert!(message.to_lowercase().contains(said), "{message}");
    only_what_is_valid(&setup)?;
    setup.remount("size=400m")?;
    setup.fetch(&python.path).await?;
    only_what_is_valid(&setup)?;
    nix::verify(&setup.root())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_inodes_is_told_and_leaves_what_is_valid() -> Result<()> {
    let cache = NarCache::new()?;
    let files = |count: usize, len: usize| {
        let names: Vec<_> = (0..count).map(|n| format!("{n:04}")).collect();
        let entries: Vec<_> = names.iter().map(|name| (name.as_bytes(), file(&vec![7; len]))).collect();
        archive(&directory(&entries))
    };
    // In one piece, and in many that more than one thread writes.
    let (few, tiny, small) = (files(10, 10), files(3000, 10), files(3000, 3000));
    let few = cache.add("few", &few)?;
    for (name, nar) in [("tiny", &tiny), ("small", &small)] {
        let path = cache.add(name, nar)?;
        let setup = Setup::on_disk("size=200m,nr_inodes=1500", &cache.url(), &cache.public_key())?;
        setup.fetch(&few).await?;
        let error = setup.fetch(&path).await.err().context("there are too few inodes")?;
        let (code, message) = told(error);
        assert_eq!(code, Code::ResourceExhausted, "{name}: {message}");
        assert!(
            message.to_lowercase().contains("no space") && message.contains(path.base_name()),
            "{name}: {message}"
        );
        assert_eq!(only_what_is_valid(&setup)?, 1);
        setup.remount("nr_inodes=100000")?;
        setup.fetch(&path).await?;
        assert_eq!(only_what_is_valid(&setup)?, 2);
        nix::verify(&setup.root())?;
    }
    Ok(())
}

/// Everything is restored, and there is not even space for the rows of the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_the_last_moment_registers_all_or_nothing() -> Result<()> {
    let cache = NarCache::new()?;
    let needed = cache.add("needed", &archive(&link(b"anywhere")))?;
    let nar = archive(&directory(&[(b"a", file(b"contents"))]));
    let (name, file, references) = ("needs", &nar[..], std::slice::from_ref(&needed));
    let (nar_hash, nar_size) = (sha256(file), file.len() as u64);
    let needs = cache.offer(&Offer { name, compression: "none", file, nar_hash, nar_size, references })?;
    let server = SlowServer::start(cache.dir(), u64::MAX)?;
    server.hold(&format!("nar/{}.nar", needed.hash()));

    let setup = Setup::on_disk("size=100m", &server.url(), &cache.public_key())?;
    let fetching = {
        let (substituter, path) = (setup.substituter.clone(), needs.clone());
        tokio::spawn(async move { substituter.fetch(&[path], &watch::channel(Progress::default()).0).await })
    };
    let asked_for = format!("nar/{}.nar", needed.hash());
    // Written down is what is complete; a file alone may still be empty.
    let is_record = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "json"))
    };
    wait_for(|| {
        let arrived = fs::read_dir(setup.root().join("staging")).is_ok_and(|mut dir| dir.any(is_record));
        arrived && server.asked().contains(&asked_for)
    })
    .await?;
    let ballast = setup.root().join("ballast");
    fs::write(&ballast, vec![7; 100 << 20]).expect_err("a small disk");
    server.release();
    let error = fetching.await?.err().context("the disk is full")?;
    assert!(matches!(error.root(), FetchError::Register(_)), "{error:?}");
    let (code, message) = told(error);
    assert!(message.contains("full"), "{message}");
    assert_eq!(setup.check_valid()?, 0);
    tree::wait_until_clean(&setup.root())?;
    // The same call, without what was in the way.
    fs::remove_file(&ballast)?;
    assert_eq!(setup.fetch(&needs).await?.paths.len(), 2);
    nix::verify(&setup.root())?;
    assert_eq!(code, Code::ResourceExhausted, "{message}");
    assert_eq!(only_what_is_valid(&setup)?, 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_fit_is_not_downloaded() -> Result<()> {
    let cache = NarCache::new()?;
    let nar = archive(&file(b"small"));
    let (nar_hash, nar_size) = (NarHash::new([7; 32]), 1 << 30);
    let path = cache.offer(&Offer {
        name: "large",
        compression: "none",
        file: &nar,
        nar_hash,
        nar_size,
        references: &[],
    })?;
    let server = SlowServer::start(cache.dir(), u64::MAX)?;
    let setup = Setup::on_disk("size=100m", &server.url(), &cache.public_key())?;
    let error = setup.fetch(&path).await.expect_err("too large");
    assert!(matches!(error.root(), FetchError::NoSpace { .. }), "{error:?}");
    let message = format!("{:#}", anyhow::Error::new(error));
    for part in ["no space for", path.base_name(), "are needed", "are free in"] {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
    let asked = server.take_asked();
    assert!(asked.iter().all(|file| !file.starts_with("nar/")), "{asked:?}");
    only_what_is_valid(&setup)?;
    Ok(())
}

/// The file of a path's NAR, relative to the cache.
fn nar_file(fixtures: &Fixtures, path: &StorePath) -> Result<String> {
    let text = fs::read_to_string(fixtures.cache("zstd").join(format!("{}.narinfo", path.hash())))?;
    let url = text.lines().find_map(|line| line.strip_prefix("URL: ")).context("a URL")?;
    Ok(url.to_owned())
}

async fn wait_for(mut is_so: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_so() {
        ensure!(start.elapsed() < Duration::from_mins(2), "that does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
