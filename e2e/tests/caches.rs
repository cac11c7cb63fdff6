//! How binary caches are spoken to: what they may do, what they do wrong, and what is done about it.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::nar_cache::{NarCache, SlowServer, nar_of_file};
use nix_csi_e2e::{CacheServer, Fixtures, Rule, chain, nix, node_program, refusal, tree};
use nix_csi_node::config::Config;
use nix_csi_node::start_substituter;
use nix_csi_node::store::NodeStore;
use nix_csi_node::substituter::{CacheError, Closure, FetchError, Largest, Progress, Substituter};
use nix_csi_store::{NarInfo, StorePath};
use rstest::rstest;
use tempfile::TempDir;
use tokio::sync::watch;

/// How long a cache is left alone at first, and how long it is not asked again for what it is.
const PAUSE: Duration = Duration::from_secs(5);
/// Longer than any pause, on any machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// A store that fetches from some caches.
struct Setup {
    fixtures: Fixtures,
    root: TempDir,
    substituter: Substituter,
}

impl Setup {
    fn new<const N: usize>(caches: [&CacheServer; N]) -> Result<Self> {
        Self::at(&caches.map(CacheServer::url))
    }

    fn at(caches: &[String]) -> Result<Self> {
        Self::with(&config(caches)?)
    }

    fn with(config: &Config) -> Result<Self> {
        let root = tempfile::tempdir()?;
        let store = Arc::new(NodeStore::open(root.path())?);
        let substituter = start_substituter(store, config)?;
        Ok(Self { fixtures: Fixtures::find()?, root, substituter })
    }

    async fn fetch(&self, name: &str) -> Result<Closure, FetchError> {
        let path = self.fixtures.get(name).expect("a fixture").path;
        self.substituter.fetch(&[path], &watch::channel(Progress::default()).0).await
    }

    /// Asks for what no cache has, so that every cache is asked that is not left alone.
    async fn asks(&self) -> Result<FetchError> {
        let path: StorePath = "/nix/store/00000000000000000000000000000000-unknown".parse()?;
        let fetched = self.substituter.fetch(&[path], &watch::channel(Progress::default()).0).await;
        fetched.err().context("no cache has it")
    }

    /// Fetches what must arrive whole and right.
    async fn gets(&self, name: &str) -> Result<()> {
        let fixture = self.fixtures.get(name)?;
        let closure = self.fetch(name).await.with_context(|| name.to_owned())?;
        assert_eq!(closure.paths, fixture.closure, "{name}");
        for path in &fixture.closure {
            let theirs = self.fixtures.store().join("nix/store").join(path.base_name());
            assert_same(&self.substituter.store().layout().physical(path), &theirs)?;
        }
        Ok(())
    }

    /// Fetches what must not arrive. What is said about it has these parts, and a path of it.
    async fn fails(&self, name: &str, parts: &[&str]) -> Result<FetchError> {
        let fixture = self.fixtures.get(name)?;
        let fetched = self.fetch(name).await;
        refusal(&self.substituter, self.root.path(), &fixture, fetched, parts)
    }

    /// Nix finds everything right, and nothing is left half done.
    fn judge(&self) -> Result<()> {
        tree::wait_until_clean(self.root.path())?;
        nix::verify(self.root.path())
    }
}

fn config(caches: &[String]) -> Result<Config> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(Config {
        substituters: caches.iter().map(|url| url.parse()).collect::<Result<_, _>>()?,
        trusted_public_keys: vec![Fixtures::find()?.public_key()?.parse()?],
        // A request that is made again because the machine is slow would be one too many for these tests.
        stalled_download_timeout: Duration::from_mins(1),
        download_attempts: 3,
        ..Config::default()
    })
}

/// The cache of that compression, behind a server without rules.
fn serve(compression: &str) -> Result<CacheServer> {
    CacheServer::start(&Fixtures::find()?.cache(compression))
}

/// What the cache of that compression says about a path.
fn info(compression: &str, path: &StorePath) -> Result<NarInfo> {
    let file = Fixtures::find()?.cache(compression).join(format!("{}.narinfo", path.hash()));
    Ok(fs::read_to_string(file)?.parse()?)
}

/// The NAR file of a path in the cache of that compression.
fn nar(compression: &str, path: &StorePath) -> Result<Vec<u8>> {
    Ok(fs::read(Fixtures::find()?.cache(compression).join(info(compression, path)?.url))?)
}

/// The path of a fixture's closure with that name, whatever its version.
fn part(fixture: &str, name: &str) -> Result<StorePath> {
    let closure = Fixtures::find()?.get(fixture)?.closure;
    let mut found = closure.into_iter().filter(|path| path.base_name().contains(&format!("-{name}-")));
    found.next().with_context(|| format!("no {name} in {fixture}"))
}

/// A rule for the NAR of the C library in the xz cache.
fn on_glibc() -> Rule {
    Rule::on(info("xz", &part("hello", "glibc").unwrap()).unwrap().url)
}

/// The same entries, with the same attributes and contents.
fn assert_same(ours: &Path, theirs: &Path) -> Result<()> {
    let entries = tree::describe(theirs)?;
    assert_eq!(tree::describe(ours)?, entries, "{}", theirs.display());
    for path in entries.keys() {
        // An empty path would have a slash behind it, which is no name of a file.
        let [ours, theirs] = [ours, theirs]
            .map(|root| if path.as_os_str().is_empty() { root.to_owned() } else { root.join(path) });
        if fs::symlink_metadata(&theirs)?.is_file() {
            assert!(fs::read(&ours)? == fs::read(&theirs)?, "another content: {}", ours.display());
        }
    }
    Ok(())
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Brotli without compression: RFC 7932, 9.2, meta-blocks that are said to be uncompressed.
fn brotli(bytes: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::new();
    for (n, block) in bytes.chunks(1 << 16).enumerate() {
        let header = (u32::try_from(block.len() - 1).unwrap() << 3) | (1 << 19);
        // Before the first one stands the bit that says how large the window is.
        let header = if n == 0 { header << 1 } else { header };
        encoded.extend(&header.to_le_bytes()[..3]);
        encoded.extend(block);
    }
    encoded.push(3);
    encoded
}

fn encode(encoding: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(match encoding {
        "gzip" => gzip(bytes)?,
        "br" => brotli(bytes),
        "zstd" => zstd::encode_all(bytes, 1)?,
        _ => bytes.to_owned(),
    })
}

/// Rules by which the NARs of a fixture, or its narinfos, come with a Content-Encoding.
fn encoded(server: &CacheServer, compression: &str, fixture: &str, file: &str, encoding: &str) -> Result<()> {
    for path in Fixtures::find()?.get(fixture)?.closure {
        let name = match file {
            "narinfo" => format!("{}.narinfo", path.hash()),
            _ => info(compression, &path)?.url,
        };
        let plain = fs::read(Fixtures::find()?.cache(compression).join(&name))?;
        let body = encode(encoding, &plain)?;
        server.rule(Rule::on(name).body(body).header("Content-Encoding", encoding));
    }
    Ok(())
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn every_compression_gives_what_nix_wrote(
    #[values(
        "zstd",
        "xz",
        "bzip2",
        "gzip",
        "br",
        "none",
        "zstd-frames",
        "xz-streams",
        "gzip-members",
        "bzip2-streams"
    )]
    compression: &str,
) -> Result<()> {
    let server = serve(compression)?;
    let setup = Setup::new([&server])?;
    for name in ["hello", "odd-names", "multi-dev"] {
        setup.gets(name).await?;
    }
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_large_arrives() -> Result<()> {
    let server = serve("zstd")?;
    let setup = Setup::new([&server])?;
    let large = setup.fixtures.get("large")?;
    assert_eq!(setup.fetch("large").await?.paths, large.closure);
    assert_eq!(server.requests(".nar.zst").len(), 1, "it came in one piece");
    setup.judge()
}

#[rstest]
#[case::zstd("zstd", "")]
#[case::xz("xz", "/")]
#[case::none("none", "/")]
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_a_cache(#[case] compression: &str, #[case] slash: &str) -> Result<()> {
    let dir = Fixtures::find()?.cache(compression);
    let setup = Setup::at(&[format!("file://{}{slash}", dir.display())])?;
    for name in ["hello", "odd-names"] {
        setup.gets(name).await?;
    }
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_directory_does_not_have_is_told() -> Result<()> {
    let url = format!("file://{}", Fixtures::find()?.cache("none").display());
    let setup = Setup::at(std::slice::from_ref(&url))?;
    let error = setup.fails("jq", &[&url]).await?;
    assert!(matches!(error.root(), FetchError::NotFound { .. }), "{error:?}");
    setup.gets("hello").await
}

#[rstest]
#[case::of_a_server(false)]
#[case::of_a_directory(true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_outside_of_its_cache_is_not_read(#[case] is_directory: bool) -> Result<()> {
    let server = serve("zstd")?;
    let directory = format!("file://{}", Fixtures::find()?.cache("zstd").display());
    let url = if is_directory { directory } else { server.url() };
    let setup = Setup::at(std::slice::from_ref(&url))?;
    setup.fails("url-outside", &[&url, "etc/passwd", "neither below the cache"]).await?;
    setup.gets("hello").await?;
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_with_the_lower_priority_number_is_asked_first() -> Result<()> {
    // 90 before 41, where the order of the options counts for nothing.
    let (later, earlier) = (serve("none")?, serve("zstd-frames")?);
    let setup = Setup::new([&later, &earlier])?;
    setup.gets("hello").await?;
    assert_eq!(
        later.requests("").len(),
        later.requests("/nix-cache-info").len(),
        "the first one has all of it"
    );
    assert_eq!(earlier.requests(".narinfo").len(), setup.fixtures.get("hello")?.closure.len());

    // What the first one does not have comes from the second.
    let all = serve("zstd")?;
    all.about("StoreDir: /nix/store\nPriority: 42\n");
    let setup = Setup::new([&earlier, &all])?;
    let jq = setup.fixtures.get("jq")?;
    setup.gets("jq").await?;
    assert!(!earlier.requests(&format!("{}.narinfo", jq.path.hash())).is_empty());
    let glibc = part("jq", "glibc")?;
    assert!(all.requests(&format!("{}.narinfo", glibc.hash())).is_empty(), "the first one has it");
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_of_one_priority_are_asked_at_the_same_time() -> Result<()> {
    let (slow, quick) = (serve("none")?, serve("zstd-frames")?);
    for server in [&slow, &quick] {
        server.about("StoreDir: /nix/store\nPriority: 7\n");
    }
    // Never, as far as this test goes.
    slow.rule(Rule::on(".narinfo").delay(Duration::from_hours(1)));
    // Not before the other one has heard of the question.
    quick.rule(Rule::on(".narinfo").once_asked(&slow));
    let setup = Setup::new([&slow, &quick])?;
    setup.gets("hello").await?;
    for path in setup.fixtures.get("hello")?.closure {
        let file = format!("{}.narinfo", path.hash());
        assert_eq!([&slow, &quick].map(|server| server.requests(&file).len()), [1, 1], "{file}");
    }
    assert!(slow.requests(".nar").is_empty(), "the quicker one answered first");
    setup.judge()
}

/// 50, as in Nix.
#[rstest]
#[case::an_earlier_one(49, false)]
#[case::a_later_one(51, true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_says_nothing_of_itself_has_a_priority(
    #[case] other: u32,
    #[case] is_first: bool,
    #[values("404", "empty")] nothing: &str,
) -> Result<()> {
    let (silent, telling) = (serve("none")?, serve("zstd-frames")?);
    let about = Rule::on("/nix-cache-info");
    silent.rule(if nothing == "404" { about.status(404) } else { about.body("") });
    telling.about(&format!("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: {other}\n"));
    let setup = Setup::new([&silent, &telling])?;
    setup.gets("hello").await?;
    let asked = [&silent, &telling].map(|server| !server.requests(".narinfo").is_empty());
    assert_eq!(asked, [is_first, !is_first]);

    // Alone it does, too.
    let setup = Setup::new([&silent])?;
    setup.gets("odd-names").await?;
    setup.judge()
}

#[rstest]
#[case::it_has_the_path("hello")]
#[case::it_does_not_have_the_path("jq")]
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_of_another_store_says_so_and_does_not_count(#[case] name: &str) -> Result<()> {
    let (other, good) = (serve("none")?, serve("zstd")?);
    other.about("StoreDir: /gnu/store\nPriority: 1\n");
    let setup = Setup::new([&other, &good])?;
    setup.gets(name).await?;
    assert!(other.requests(".nar").is_empty());
    setup.judge()?;

    let alone = Setup::new([&other])?;
    alone.fails(name, &[&other.url(), "/gnu/store"]).await?;
    Ok(())
}

/// It is asked for before anything else, so asking again for each path would make every fetch a slow one.
#[rstest]
#[case::good(Rule::on("/nix-cache-info"))]
#[case::not_there(Rule::on("/nix-cache-info").status(404))]
#[case::refused(Rule::on("").status(401))]
#[case::of_another_store(Rule::on("/nix-cache-info").body("StoreDir: /gnu/store\n"))]
#[tokio::test(flavor = "multi_thread")]
async fn what_a_cache_says_of_itself_is_not_asked_for_again_with_each_path(#[case] rule: Rule) -> Result<()> {
    let (asked, good) = (serve("xz")?, serve("zstd")?);
    asked.rule(rule);
    let setup = Setup::new([&asked, &good])?;
    let start = Instant::now();
    setup.gets("python3").await?;
    // Where that failed it is asked for again, but not before this time is over.
    let most = 1 + start.elapsed().as_secs() / PAUSE.as_secs();
    let times = asked.requests("/nix-cache-info").len();
    assert!(times as u64 <= most, "{times} times for {} paths", setup.fixtures.get("python3")?.closure.len());
    Ok(())
}

/// A server that compresses on the way, whether that makes sense or not.
#[rstest]
#[case::plain_by_zstd("none", "zstd")]
#[case::plain_by_gzip("none", "gzip")]
#[case::plain_by_br("none", "br")]
#[case::plain_by_nothing("none", "identity")]
#[case::zstd_by_gzip("zstd", "gzip")]
#[case::zstd_by_zstd("zstd", "zstd")]
#[case::zstd_by_br("zstd", "br")]
#[case::xz_by_gzip("xz", "gzip")]
#[case::gzip_by_gzip("gzip", "gzip")]
#[tokio::test(flavor = "multi_thread")]
async fn nars_may_be_compressed_on_the_way(#[case] compression: &str, #[case] encoding: &str) -> Result<()> {
    let server = serve(compression)?;
    encoded(&server, compression, "hello", "nar", encoding)?;
    encoded(&server, compression, "odd-names", "nar", encoding)?;
    let setup = Setup::new([&server])?;
    setup.gets("hello").await?;
    setup.gets("odd-names").await?;
    let asked_for = if compression == "none" { "zstd" } else { "" };
    for path in setup.fixtures.get("hello")?.closure {
        let seen = server.requests(&info(compression, &path)?.url);
        assert_eq!(seen[0].header("accept-encoding").replace("identity", ""), asked_for);
    }
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_compressed_as_was_asked_for_is_asked_for_once() -> Result<()> {
    let server = serve("none")?;
    encoded(&server, "none", "hello", "nar", "zstd")?;
    let setup = Setup::new([&server])?;
    setup.gets("hello").await?;
    for path in setup.fixtures.get("hello")?.closure {
        assert_eq!(server.requests(&info("none", &path)?.url).len(), 1, "{path}");
    }
    setup.judge()
}

/// Nix's `narinfo-compression` makes such caches: files that are stored compressed, and always sent so.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn narinfos_may_be_compressed_on_the_way(#[values("zstd", "gzip", "br")] encoding: &str) -> Result<()> {
    let server = serve("xz")?;
    encoded(&server, "xz", "hello", "narinfo", encoding)?;
    let setup = Setup::new([&server])?;
    setup.gets("hello").await?;
    setup.judge()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_encoding_is_named(
    #[values("none", "zstd")] compression: &str,
    #[values("narinfo", "nar")] file: &str,
) -> Result<()> {
    let server = serve(compression)?;
    encoded(&server, compression, "hello", file, "pied-piper")?;
    let setup = Setup::new([&server])?;
    setup.fails("hello", &[&server.url(), "Content-Encoding", "pied-piper"]).await?;
    server.behave();
    setup.gets("hello").await?;
    setup.judge()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_another_host_takes_no_credentials_along(
    #[values(".narinfo", ".nar.xz")] suffix: &str,
) -> Result<()> {
    let (server, elsewhere) = (serve("xz")?, serve("xz")?);
    server.rule(Rule::on("").demand("Bearer secret"));
    server.rule(Rule::on(suffix).redirect(&elsewhere.url()));
    let secrets = tempfile::tempdir()?;
    let file = secrets.path().join("tokens");
    fs::write(&file, format!("127.0.0.1:{} secret\n", server.port()))?;
    let setup = Setup::with(&Config { bearer_tokens_file: Some(file), ..config(&[server.url()])? })?;
    setup.gets("hello").await?;
    assert!(server.requests("").iter().all(|seen| seen.header("authorization") == "Bearer secret"));
    assert_eq!(elsewhere.requests(suffix).len(), setup.fixtures.get("hello")?.closure.len());
    assert!(elsewhere.requests("").iter().all(|seen| seen.header("authorization").is_empty()));
    setup.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_within_the_host_takes_them_along() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for name in ["cache", "elsewhere"] {
        symlink(Fixtures::find()?.cache("xz"), dir.path().join(name))?;
    }
    let server = CacheServer::start(dir.path())?;
    server.rule(Rule::on("").demand("Bearer secret"));
    let hello = Fixtures::find()?.get("hello")?;
    for path in &hello.closure {
        let file = info("xz", path)?.url;
        server.rule(
            Rule::on(format!("/cache/{file}")).redirect("").header("location", &format!("/elsewhere/{file}")),
        );
    }
    let tokens = dir.path().join("tokens");
    fs::write(&tokens, "127.0.0.1 secret\n")?;
    let urls = [format!("{}cache", server.url())];
    let setup = Setup::with(&Config { bearer_tokens_file: Some(tokens), ..config(&urls)? })?;
    setup.gets("hello").await?;
    for path in &hello.closure {
        let file = info("xz", path)?.url;
        assert_eq!(server.requests(&format!("/elsewhere/{file}")).len(), 1);
    }
    assert!(server.requests("").iter().all(|seen| seen.status != 401));
    setup.judge()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn redirects_that_do_not_end_are_an_error(#[values(".narinfo", ".nar.xz")] suffix: &str) -> Result<()> {
    let server = serve("xz")?;
    server.rule(Rule::on(suffix).redirect(&server.url()));
    let setup = Setup::new([&server])?;
    setup.fails("hello", &[&server.url(), "redirect"]).await?;
    server.behave();
    // One file of it leads nowhere; that says nothing against the rest of the cache.
    setup.gets("hello").await?;
    setup.judge()
}

/// How this node is told who it is.
#[derive(Debug, Clone, Copy)]
enum Login {
    Netrc,
    Token,
    TokenOfThatPort,
    Address,
}

impl Login {
    /// What a server hears.
    fn header(self) -> &'static str {
        match self {
            Self::Netrc | Self::Address => "Basic bWU6eHl6enlwbHVnaA==",
            Self::Token | Self::TokenOfThatPort => "Bearer xyzzyplugh",
        }
    }

    fn config(self, dir: &Path, server: &CacheServer) -> Result<Config> {
        let (file, port) = (dir.join("secrets"), server.port());
        fs::write(
            &file,
            match self {
                Self::Netrc => "machine 127.0.0.1 login me password xyzzyplugh\n".to_owned(),
                Self::Token => "127.0.0.1 xyzzyplugh\n".to_owned(),
                Self::TokenOfThatPort => format!("127.0.0.1 other\n127.0.0.1:{port} xyzzyplugh\n"),
                Self::Address => String::new(),
            },
        )?;
        let config = config(&[server.url()])?;
        Ok(match self {
            Self::Netrc => Config { netrc_file: Some(file), ..config },
            Self::Token | Self::TokenOfThatPort => Config { bearer_tokens_file: Some(file), ..config },
            Self::Address => Config {
                substituters: vec![format!("http://me:xyzzyplugh@127.0.0.1:{port}/").parse()?],
                ..config
            },
        })
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_hears_who_asks(
    #[values(Login::Netrc, Login::Token, Login::TokenOfThatPort, Login::Address)] login: Login,
) -> Result<()> {
    let server = serve("xz")?;
    server.rule(Rule::on("").demand(login.header()));
    let secrets = tempfile::tempdir()?;
    let setup = Setup::with(&login.config(secrets.path(), &server)?)?;
    setup.gets("hello").await?;
    assert!(server.requests("").iter().all(|seen| seen.header("authorization") == login.header()));
    setup.judge()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_named_but_not_shown(
    #[values(Login::Netrc, Login::Token, Login::Address)] login: Login,
    #[values("", ".narinfo", ".nar.xz")] suffix: &str,
) -> Result<()> {
    let server = serve("xz")?;
    server.rule(Rule::on(suffix).demand("Bearer of something else"));
    let secrets = tempfile::tempdir()?;
    let config = login.config(secrets.path(), &server)?;
    let setup = Setup::with(&config)?;
    let error = setup.fails("hello", &[&server.url(), "401", "credentials"]).await?;
    let (FetchError::Lookup { source, .. } | FetchError::Download { source, .. }) = error.root() else {
        anyhow::bail!("{error:?}");
    };
    assert!(matches!(source, CacheError::Unauthorized { .. }), "{error:?}");
    for text in [chain(&error), format!("{error:?}")] {
        assert!(!text.contains("xyzzyplugh") && !text.contains("bWU6eH"), "a secret: {text}");
    }
    // It was not missing, and is not remembered as that.
    server.behave();
    setup.gets("hello").await?;
    setup.judge()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn options_are_shown_without_secrets(
    #[values(Login::Netrc, Login::Token, Login::Address)] login: Login,
) -> Result<()> {
    let secrets = tempfile::tempdir()?;
    let config = login.config(secrets.path(), &serve("xz")?)?;
    for text in [format!("{config:?}"), format!("{:?}", config.logins()?)] {
        assert!(!text.contains("xyzzyplugh"), "a secret: {text}");
    }
    Ok(())
}

#[rstest]
#[case::netrc("machine 127.0.0.1 login me password \"xyzzyplugh\n", "")]
#[case::tokens("", "127.0.0.1 xyzzyplugh xyzzyplugh\n")]
#[case::not_a_host("", "xyzzyplugh\n")]
#[tokio::test(flavor = "multi_thread")]
async fn secrets_that_cannot_be_read_are_not_shown_either(
    #[case] netrc: &str,
    #[case] tokens: &str,
) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let files = ["netrc", "tokens"].map(|name| dir.path().join(name));
    fs::write(&files[0], netrc)?;
    fs::write(&files[1], tokens)?;
    let [netrc_file, bearer_tokens_file] = files.map(Some);
    let config = Config { netrc_file, bearer_tokens_file, ..config(&["http://127.0.0.1:1/".to_owned()])? };
    let error = Setup::with(&config).err().context("they cannot be read")?;
    for text in [format!("{error:#}"), format!("{error:?}")] {
        assert!(!text.contains("xyzzyplugh"), "a secret: {text}");
        assert!(text.contains("line 1"), "{text}");
    }
    Ok(())
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_there_however_that_is_said(
    #[values(404, 403, 410)] status: u16,
) -> Result<()> {
    let (without, with) = (serve("xz")?, serve("zstd")?);
    without.rule(Rule::on(".narinfo").status(status));
    let alone = Setup::new([&without])?;
    let error = alone.fails("hello", &[&without.url()]).await?;
    assert!(matches!(error.root(), FetchError::NotFound { .. }), "{error:?}");
    assert_eq!(without.requests(".narinfo").len(), 1, "there is nothing to try again");

    let setup = Setup::new([&without, &with])?;
    setup.gets("hello").await?;
    setup.judge()
}

#[rstest]
#[case::all_of_it("")]
#[case::narinfos(".narinfo")]
#[case::nars(".nar.xz")]
#[tokio::test(flavor = "multi_thread")]
async fn what_a_private_cache_does_not_give_comes_from_a_public_one(#[case] suffix: &str) -> Result<()> {
    let (private, public) = (serve("xz")?, serve("zstd")?);
    private.rule(Rule::on(suffix).demand("Bearer of something"));
    let setup = Setup::new([&private, &public])?;
    setup.gets("hello").await?;
    setup.judge()?;

    // What neither gives is a matter of credentials, and not missing.
    public.rule(Rule::on(".narinfo").status(404));
    let setup = Setup::new([&private, &public])?;
    setup.fails("hello", &[&private.url(), "401"]).await?;
    Ok(())
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_has_too_much_to_do_is_given_time(
    #[values("/nix-cache-info", ".narinfo", ".nar.xz")] suffix: &str,
    #[values((429, Some(1)), (503, None))] answer: (u16, Option<u64>),
) -> Result<()> {
    let (status, after) = answer;
    let server = serve("xz")?;
    let rule = Rule::on(suffix).times(1).status(status);
    server.rule(match after {
        Some(seconds) => rule.header("Retry-After", &seconds.to_string()),
        None => rule,
    });
    let setup = Setup::new([&server])?;
    let start = Instant::now();
    setup.gets("hello").await?;
    let waited = loop {
        let seen = server.requests(suffix);
        let refused = seen.iter().find(|seen| seen.status == status).context("the rule fits")?;
        let mut same = seen.iter().filter(|seen| seen.target == refused.target);
        if let Some(again) = same.nth(1) {
            break again.at - refused.at;
        }
        // The paths did not wait for what a slow cache says of itself; it is asked for with a later one.
        assert_eq!(suffix, "/nix-cache-info", "asked again before anything arrives");
        assert!(start.elapsed() < PATIENCE, "never asked again");
        tokio::time::sleep(Duration::from_millis(200)).await;
        setup.asks().await?;
    };
    let least = after.map_or(Duration::from_millis(300), Duration::from_secs);
    assert!(waited >= least, "asked again after {waited:?}");
    setup.judge()
}

#[rstest]
#[case::while_it_is_restored("hello", "glibc", 3_000_000, "\"a\"", "identity")]
#[case::before_it_is_restored("multi-dev", "busybox", 700_000, "\"a\"", "identity")]
#[case::by_its_date_where_its_tag_is_weak("hello", "glibc", 3_000_000, "W/\"a\"", "identity")]
#[case::compressed_on_the_way("multi-dev", "busybox", 500_000, "\"a\"", "zstd")]
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_is_cut_goes_on_where_it_was(
    #[case] fixture: &str,
    #[case] name: &str,
    #[case] bytes: usize,
    #[case] tag: &str,
    #[case] encoding: &str,
    #[values(1, 2)] times: usize,
) -> Result<()> {
    let server = serve("none")?;
    let path = part(fixture, name)?;
    let file = info("none", &path)?.url;
    let body = encode(encoding, &nar("none", &path)?)?;
    let size = body.len();
    server.rule(Rule::on(&file).body(body).header("Content-Encoding", encoding).header("ETag", tag));
    server.rule(Rule::on(&file).times(times).cut_at(bytes));
    let setup = Setup::new([&server])?;
    setup.gets(fixture).await?;
    let seen = server.requests(&file);
    assert_eq!(seen.len(), 1 + times);
    for (n, rest) in seen.iter().enumerate().skip(1) {
        assert_eq!(rest.header("range"), format!("bytes={}-", n * bytes));
        let validator = if tag.starts_with('W') { "Thu, 01 Jan 1970 00:00:01 GMT" } else { tag };
        assert_eq!(rest.header("if-range"), validator);
        assert_eq!(rest.status, 206);
        // Another encoding would be other bytes.
        let accepted: &[_] = if encoding == "zstd" { &["zstd"] } else { &["", "identity"] };
        assert!(accepted.contains(&rest.header("accept-encoding")), "{rest:?}");
    }
    assert_eq!(seen.iter().map(|seen| seen.sent).sum::<usize>(), size, "nothing was sent twice");
    setup.judge()
}

#[rstest]
#[case::while_it_is_restored("hello", "glibc", 1_000_000)]
#[case::before_it_is_restored("multi-dev", "busybox", 500_000)]
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_changed_behind_the_cut_begins_anew(
    #[case] fixture: &str,
    #[case] name: &str,
    #[case] bytes: usize,
) -> Result<()> {
    let server = serve("zstd")?;
    let path = part(fixture, name)?;
    let file = info("zstd", &path)?.url;
    // The same NAR, compressed less.
    let old = zstd::encode_all(&nar("none", &path)?[..], 1)?;
    server.rule(Rule::on(&file).times(1).body(old).header("ETag", "\"old\"").cut_at(bytes));
    let setup = Setup::new([&server])?;
    setup.gets(fixture).await?;
    let seen = server.requests(&file);
    assert_eq!((seen[1].header("if-range"), seen[1].status), ("\"old\"", 200));
    assert_eq!(seen.last().map(|seen| seen.status), Some(200));
    assert!(seen.len() <= 3, "{seen:?}");
    setup.judge()
}

#[rstest]
#[case::that_are_not_known(Rule::on(".nar.zst").no_ranges(), true)]
#[case::without_a_validator(Rule::on(".nar.zst").without("etag").without("last-modified"), false)]
#[tokio::test(flavor = "multi_thread")]
async fn without_ranges_a_nar_that_is_cut_begins_anew(
    #[case] rule: Rule,
    #[case] asks_for_one: bool,
    #[values("glibc", "hello")] name: &str,
) -> Result<()> {
    let server = serve("zstd")?;
    server.rule(rule);
    let file = info("zstd", &part("hello", name)?)?.url;
    server.rule(Rule::on(&file).times(1).cut_at(20_000));
    let setup = Setup::new([&server])?;
    setup.gets("hello").await?;
    let seen = server.requests(&file);
    assert_eq!(!seen[1].header("range").is_empty(), asks_for_one);
    assert!(seen.iter().all(|seen| seen.status == 200), "{seen:?}");
    assert_eq!(seen.len(), 2, "the second answer is not thrown away");
    setup.judge()
}

#[rstest]
#[case::gone(vec![Rule::on(".nar.xz").status(404)], "is gone")]
#[case::forbidden(vec![Rule::on(".nar.xz").status(403)], "is gone")]
#[case::gone_behind_a_cut(vec![on_glibc().times(1).cut_at(10_000), on_glibc().after(1).status(404)], "is gone")]
#[case::another_one(vec![Rule::on(".nar.xz").body("not xz")], "cannot decompress")]
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_cannot_be_used_comes_from_the_next_cache(
    #[case] rules: Vec<Rule>,
    #[case] reason: &str,
) -> Result<()> {
    let spoiled = || -> Result<CacheServer> {
        let server = serve("xz")?;
        for rule in &rules {
            server.rule(rule.clone());
        }
        Ok(server)
    };
    let (first, next) = (spoiled()?, serve("zstd")?);
    let setup = Setup::new([&first, &next])?;
    setup.gets("hello").await?;
    assert!(!next.requests(".nar.zst").is_empty());
    setup.judge()?;

    let server = spoiled()?;
    let alone = Setup::new([&server])?;
    alone.fails("hello", &[&server.url(), reason]).await?;
    server.behave();
    alone.gets("hello").await?;
    alone.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_narinfo_of_another_path_is_not_taken() -> Result<()> {
    let (wrong, good) = (serve("xz")?, serve("zstd")?);
    let (hello, other) = (part("hello", "hello")?, Fixtures::find()?.get("plain-file")?.path);
    let theirs = fs::read(Fixtures::find()?.cache("xz").join(format!("{}.narinfo", other.hash())))?;
    wrong.rule(Rule::on(format!("{}.narinfo", hello.hash())).body(theirs));
    let setup = Setup::new([&wrong, &good])?;
    setup.gets("hello").await?;
    setup.judge()?;

    let alone = Setup::new([&wrong])?;
    alone.fails("hello", &[&wrong.url(), &hello.to_string(), other.base_name()]).await?;
    wrong.behave();
    alone.gets("hello").await?;
    alone.judge()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_later_is_found_within_ten_seconds() -> Result<()> {
    let server = serve("xz")?;
    let path = Fixtures::find()?.get("plain-file")?.path;
    let file = format!("{}.narinfo", path.hash());
    server.rule(Rule::on(&file).status(404));
    let setup = Setup::new([&server])?;
    setup.fails("plain-file", &[&server.url()]).await?;
    let start = Instant::now();
    server.behave();
    loop {
        let begun = start.elapsed();
        if setup.fetch("plain-file").await.is_ok() {
            break;
        }
        assert_eq!(server.requests(&file).len(), 1, "it was said a moment ago that it is not there");
        // However long the fetch itself took.
        assert!(begun < Duration::from_secs(10), "it is there");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(server.requests(&file).len(), 2);
    setup.judge()
}

#[rstest]
#[case::it_hangs_up(Rule::on("").hang_up())]
#[case::it_fails(Rule::on("").status(503))]
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_down_is_left_alone_for_a_while(#[case] broken: Rule) -> Result<()> {
    let (down, good) = (serve("xz")?, serve("zstd")?);
    down.rule(broken);
    let setup = Setup::new([&down, &good])?;
    setup.gets("jq").await?;
    let asked = down.requests("").len();
    setup.gets("redis").await?;
    // However long that took: what is new came when the pause was over.
    let seen = down.requests("");
    if let Some(new) = seen.get(asked) {
        let after = new.at - seen[asked - 1].at;
        assert!(after >= PAUSE, "asked after {after:?}, while it was to be left alone");
    }

    let alone = Setup::new([&down])?;
    let mut start = Instant::now();
    alone.fails("jq", &[&down.url()]).await?;
    let error = loop {
        let (asked, begun) = (down.requests("").len(), Instant::now());
        let error = alone.fails("jq", &[&down.url()]).await?;
        let seen = down.requests("");
        let Some(new) = seen.get(asked) else { break error };
        // This machine is so slow that the pause was over. The next one is longer.
        assert!(new.at - start >= PAUSE, "it was asked while it was to be left alone");
        assert!(begun.elapsed() < PATIENCE, "it is left alone for a while");
        start = begun;
    };
    assert!(chain(&error).contains("is asked again in"), "{error:?}");
    assert!(
        matches!(error.root(), FetchError::Lookup { source: CacheError::Paused { .. }, .. }),
        "{error:?}"
    );

    let asked = down.requests("").len();
    down.behave();
    let behaves = Instant::now();
    while let Err(error) = alone.fetch("jq").await {
        assert!(chain(&error).contains("is asked again in"), "{error:?}");
        assert_eq!(down.requests("").len(), asked);
        assert!(behaves.elapsed() < PATIENCE, "a pause is over");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(start.elapsed() >= PAUSE, "there was a pause of 5 s");
    alone.gets("jq").await?;
    alone.judge()?;

    // Its priority number is lower: as soon as it has said so, it is asked first.
    let told = down.requests("/nix-cache-info").len();
    while down.requests("/nix-cache-info").len() == told {
        assert!(behaves.elapsed() < 2 * PATIENCE, "a pause is over");
        tokio::time::sleep(Duration::from_millis(200)).await;
        setup.asks().await?;
    }
    let asked = down.requests(".nar.xz").len();
    setup.gets("nginx").await?;
    assert!(down.requests(".nar.xz").len() > asked);
    setup.judge()
}

#[rstest]
#[case::for_all_hosts("http://cache.test/", "", true)]
#[case::but_for_this_one("", "127.0.0.1", false)]
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_taken_from_the_environment(
    #[case] cache: &str,
    #[case] without: &str,
    #[case] is_used: bool,
) -> Result<()> {
    let program = node_program()?;
    let (proxy, direct) = (serve("xz")?, serve("xz")?);
    let cache = if cache.is_empty() { direct.url() } else { cache.to_owned() };
    let dir = tempfile::tempdir()?;
    let options = dir.path().join("nix.conf");
    let key = Fixtures::find()?.public_key()?;
    fs::write(&options, format!("substituters = {cache}\ntrusted-public-keys = {key}\n"))?;
    let (root, proxy_url) = (dir.path().join("root"), proxy.url());
    let hello = Fixtures::find()?.get("hello")?;
    let mut command = Command::new(program);
    command.arg("--root").arg(&root).arg("--config").arg(&options).arg("fetch").arg(hello.path.to_string());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY"] {
        command.env_remove(name);
    }
    command.env("http_proxy", &proxy_url).env("no_proxy", without);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(proxy.requests("").is_empty(), !is_used);
    assert_eq!(direct.requests("").is_empty(), is_used);
    assert!(proxy.requests("").iter().all(|seen| seen.target.starts_with("http://cache.test/")));
    nix::verify(&root)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_are_under_way_at_once() -> Result<()> {
    const MANY: usize = 16;
    let server = serve("zstd")?;
    // But for the package itself, which says what else is needed.
    server.rule(Rule::on(".narinfo").after(1).once_at_once(MANY));
    server.rule(Rule::on(".nar.zst").once_at_once(MANY));
    let setup = Setup::new([&server])?;
    setup.gets("python3").await?;
    assert!(server.most_at_once() >= MANY, "only {} at once", server.most_at_once());
    let asked = server.requests(".narinfo").len();
    assert_eq!(asked, setup.fixtures.get("python3")?.closure.len(), "each path once");
    setup.judge()
}

/// A closure of two paths, one of which a large fetch has asked for first, and would get last.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_small_closure_shares_with_a_large_one_is_not_behind_all_of_it() -> Result<()> {
    let cache = NarCache::new()?;
    let add = |name: &str, size: usize| cache.add(name, &nar_of_file(&vec![b'x'; size]));
    let large: Vec<_> = (0..10).map(|n| add(&format!("large-{n}"), 200_000 - n)).collect::<Result<_>>()?;
    let (shared, own) = (add("shared", 1000)?, add("own", 900)?);
    let server = SlowServer::start(cache.dir(), u64::MAX)?;
    let nar_file = |path: &StorePath| -> Result<String> {
        let narinfo = fs::read_to_string(cache.dir().join(format!("{}.narinfo", path.hash())))?;
        Ok(narinfo.parse::<NarInfo>()?.url)
    };
    server.hold(&nar_file(&large[0])?);
    let config = Config {
        trusted_public_keys: vec![cache.public_key().parse()?],
        http_connections: 1,
        ..config(&[server.url()])?
    };
    let setup = Setup::with(&config)?;
    let fetch = |roots: Vec<StorePath>| {
        let (substituter, (sender, progress)) =
            (setup.substituter.clone(), watch::channel(Progress::default()));
        (tokio::spawn(async move { substituter.fetch(&roots, &sender).await }), progress)
    };
    let all: Vec<_> = large.iter().chain([&shared]).cloned().collect();
    let (first, _) = fetch(all);
    let held = nar_file(&large[0])?;
    while !server.asked().contains(&held) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (second, mut progress) = fetch(vec![shared.clone(), own.clone()]);
    progress.wait_for(|progress| progress.paths_total == 2).await?;
    server.release();
    second.await??;
    let asked = server.asked();
    let place = |path: &StorePath| -> Result<usize> {
        let file = nar_file(path)?;
        asked.iter().position(|asked| *asked == file).with_context(|| format!("{file} in {asked:?}"))
    };
    let last = place(&shared)?.max(place(&own)?);
    let before = large.iter().filter(|path| place(path).is_ok_and(|place| place < last)).count();
    assert!(before <= 5, "{before} of {} came before: {asked:?}", large.len());
    first.await??;
    setup.judge()
}

#[rstest]
#[case::paths(Largest { paths: 1, ..Largest::default() }, "more than 1 paths, which is this node's max-closure-paths")]
#[case::bytes(Largest { bytes: 1 << 20, ..Largest::default() }, "which is this node's max-closure-size")]
#[tokio::test(flavor = "multi_thread")]
async fn a_closure_that_is_too_large_for_the_node_is_refused(
    #[case] largest: Largest,
    #[case] reason: &str,
) -> Result<()> {
    let server = serve("zstd")?;
    let setup = Setup::with(&Config { largest, ..config(&[server.url()])? })?;
    let error = setup.fetch("hello").await.err().context("it is larger")?;
    assert!(chain(&error).contains(reason), "{}", chain(&error));
    tree::wait_until_clean(setup.root.path())
}
