//! Binary caches over TLS: whose certificates count, what is said about those that do not, and HTTP/2 with its ways to
//! end a stream.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use h2::Reason;
use hyper::Version;
use nix_csi_e2e::{Authority, Ending, Fixtures, Identity, TlsServer, chain, nix, refusal, tree};
use nix_csi_node::config::Config;
use nix_csi_node::start_substituter;
use nix_csi_node::store::NodeStore;
use nix_csi_node::substituter::{Closure, FetchError, Progress, Substituter};
use nix_csi_store::{NarInfo, StorePath};
use rstest::rstest;
use tempfile::TempDir;
use tokio::sync::watch;

const HOST: &str = "127.0.0.1";

/// A cache behind TLS, and the authority that vouches for it.
struct Cache {
    authority: Authority,
    server: TlsServer,
    dir: TempDir,
}

impl Cache {
    fn new(compression: &str, protocols: &[&str]) -> Result<Self> {
        let authority = Authority::new("of the cache")?;
        let identity = good(&authority)?;
        Self::with(compression, protocols, authority, &identity)
    }

    fn with(
        compression: &str,
        protocols: &[&str],
        authority: Authority,
        identity: &Identity,
    ) -> Result<Self> {
        let server = TlsServer::start(&Fixtures::find()?.cache(compression), identity, protocols)?;
        Ok(Self { authority, server, dir: tempfile::tempdir()? })
    }

    fn url(&self) -> String {
        self.server.url(HOST)
    }

    /// A file for `ssl-cert-file`.
    fn file(&self, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.dir.path().join("ca-bundle.crt");
        fs::write(&path, content)?;
        Ok(path)
    }

    /// Options of a node that uses the cache, and trusts who is in that file.
    fn config(&self, ssl_cert_file: Option<PathBuf>) -> Result<Config> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Config {
            substituters: vec![self.url().parse()?],
            trusted_public_keys: vec![Fixtures::find()?.public_key()?.parse()?],
            // A request that waits for a stream counts as stalled, and a machine may be slow.
            stalled_download_timeout: Duration::from_mins(1),
            download_attempts: 3,
            ssl_cert_file,
            ..Config::default()
        })
    }

    /// The options that are right.
    fn trusted(&self) -> Result<Config> {
        self.config(Some(self.file(self.authority.pem())?))
    }

    /// How many connections there were with requests.
    fn connections(&self) -> usize {
        let asked = self.server.asked("");
        asked.iter().map(|asked| asked.connection).collect::<BTreeSet<_>>().len()
    }
}

/// A certificate that is right.
fn good(authority: &Authority) -> Result<Identity> {
    authority.certify(&[HOST], 2000..4000)
}

/// A store, and who fetches into it.
struct Setup {
    fixtures: Fixtures,
    root: TempDir,
    substituter: Substituter,
}

impl Setup {
    fn new(config: &Config) -> Result<Self> {
        let root = tempfile::tempdir()?;
        let store = Arc::new(NodeStore::open(root.path())?);
        let substituter = start_substituter(store, config)?;
        Ok(Self { fixtures: Fixtures::find()?, root, substituter })
    }

    /// The same store with other options.
    fn now_with(&mut self, config: &Config) -> Result<()> {
        self.substituter = start_substituter(Arc::clone(self.substituter.store()), config)?;
        Ok(())
    }

    async fn fetch(&self, name: &str) -> Result<Closure, FetchError> {
        let path = self.fixtures.get(name).expect("a fixture").path;
        self.substituter.fetch(&[path], &watch::channel(Progress::default()).0).await
    }

    /// Fetches what must arrive whole and right.
    async fn gets(&self, name: &str) -> Result<()> {
        let closure = self.fetch(name).await.with_context(|| name.to_owned())?;
        self.has(name, closure)
    }

    /// The same, as soon as the cache is no longer left alone.
    async fn gets_later(&self, name: &str) -> Result<()> {
        for _ in 0..150 {
            match self.fetch(name).await {
                Ok(closure) => return self.has(name, closure),
                Err(error) => ensure!(chain(&error).contains("is asked again in"), "{}", chain(&error)),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        bail!("the cache is left alone for ever")
    }

    fn has(&self, name: &str, closure: Closure) -> Result<()> {
        let fixture = self.fixtures.get(name)?;
        assert_eq!(closure.paths, fixture.closure, "{name}");
        for path in &fixture.closure {
            let theirs = self.fixtures.store().join("nix/store").join(path.base_name());
            let ours = self.substituter.store().layout().physical(path);
            assert_eq!(tree::describe(&ours)?, tree::describe(&theirs)?, "{path}");
        }
        // It keeps them from collectors.
        drop(closure);
        tree::wait_until_clean(self.root.path())?;
        // It hashes the contents.
        nix::verify(self.root.path())
    }

    /// Fetches what must not arrive. What is said about it has these parts, and a path of it; nothing is left.
    async fn fails(&self, name: &str, parts: &[&str]) -> Result<FetchError> {
        let fixture = self.fixtures.get(name)?;
        let fetched = self.fetch(name).await;
        refusal(&self.substituter, self.root.path(), &fixture, fetched, parts)
    }
}

/// The NAR file of the path of a fixture's closure with that name, whatever its version.
fn nar(compression: &str, fixture: &str, name: &str) -> Result<String> {
    let closure = Fixtures::find()?.get(fixture)?.closure;
    let mut found = closure.iter().filter(|path| path.base_name().contains(&format!("-{name}-")));
    let path: &StorePath = found.next().with_context(|| format!("no {name} in {fixture}"))?;
    let file = Fixtures::find()?.cache(compression).join(format!("{}.narinfo", path.hash()));
    Ok(fs::read_to_string(file)?.parse::<NarInfo>()?.url)
}

#[rstest]
#[case::h2(&["h2"], Version::HTTP_2)]
#[case::both(&["h2", "http/1.1"], Version::HTTP_2)]
#[case::http_1(&["http/1.1"], Version::HTTP_11)]
#[case::nothing_is_offered(&[], Version::HTTP_11)]
#[tokio::test(flavor = "multi_thread")]
async fn closures_arrive_by_the_http_that_the_server_offers(
    #[case] protocols: &[&str],
    #[case] version: Version,
) -> Result<()> {
    let cache = Cache::new("zstd", protocols)?;
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets("hello").await?;
    setup.gets("jq").await?;
    let asked = cache.server.asked("");
    assert!(asked.iter().all(|asked| asked.version == version), "{asked:?}");
    let closures = ["hello", "jq"].map(|name| setup.fixtures.get(name).unwrap().closure).concat();
    let paths: BTreeSet<_> = closures.iter().collect();
    assert_eq!(cache.server.asked(".narinfo").len(), paths.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn by_http_2_many_requests_share_a_connection() -> Result<()> {
    let cache = Cache::new("none", &["h2"])?;
    let setup = Setup::new(&cache.trusted()?)?;
    // Larger than what one stream may have under way.
    setup.gets("hello").await?;
    assert!(cache.server.asked("").len() >= 5);
    assert_eq!(cache.connections(), 1);
    Ok(())
}

#[rstest]
#[case::one(1)]
#[case::three(3)]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_take_few_streams_at_once(#[case] streams: u32) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    cache.server.takes_streams(streams);
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets("python3").await?;
    let paths = setup.fixtures.get("python3")?.closure.len();
    assert_eq!([".narinfo", ".nar.zst"].map(|suffix| cache.server.asked(suffix).len()), [paths, paths]);
    assert_eq!(cache.connections(), 1);
    Ok(())
}

/// What people have in such files.
#[rstest]
#[case::alone("", "")]
#[case::with_text_around_it("# Ours\nsubject=CN = ours\n", "\nissuer=CN = ours\n")]
#[case::among_others("OTHER", "OTHER")]
#[case::with_a_key_beside_it("KEY", "")]
#[tokio::test(flavor = "multi_thread")]
async fn ssl_cert_file_names_who_is_trusted(
    #[case] before: &str,
    #[case] behind: &str,
    #[values("\n", "\r\n")] newline: &str,
) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    let fill = |text: &str| -> Result<String> {
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        Ok(text.replace("OTHER", Authority::new("another one")?.pem()).replace("KEY", key))
    };
    let text = [&fill(before)?, cache.authority.pem(), &fill(behind)?].concat();
    let text = text.replace("\r\n", "\n").replace('\n', newline);
    let setup = Setup::new(&cache.config(Some(cache.file(text)?))?)?;
    setup.gets("hello").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_in_between_comes_from_the_server() -> Result<()> {
    let authority = Authority::new("of the cache")?;
    let identity = good(&authority.intermediate("in between")?)?;
    let cache = Cache::with("zstd", &["h2"], authority, &identity)?;
    Setup::new(&cache.trusted()?)?.gets("hello").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_has_a_name_as_well_as_an_address() -> Result<()> {
    let authority = Authority::new("of the cache")?;
    let identity = authority.certify(&["localhost"], 2000..4000)?;
    let cache = Cache::with("zstd", &["h2"], authority, &identity)?;
    let url = cache.server.url("localhost").parse()?;
    Setup::new(&Config { substituters: vec![url], ..cache.trusted()? })?.gets("hello").await
}

/// By whom the certificate is not signed.
#[rstest]
#[case::the_usual_ones(None)]
#[case::another_one(Some("another one"))]
#[case::another_one_of_that_name(Some("of the cache"))]
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_an_unknown_authority_is_the_reason(
    #[case] other: Option<&str>,
    #[values("h2", "http/1.1")] protocol: &str,
) -> Result<()> {
    let cache = Cache::new("zstd", &[protocol])?;
    let file = other.map(|name| cache.file(Authority::new(name)?.pem())).transpose()?;
    let mut setup = Setup::new(&cache.config(file)?)?;
    // The second time the cache is left alone, and whoever looks then wants to know why.
    for _ in 0..2 {
        setup.fails("hello", &[&cache.url(), "invalid peer certificate"]).await?;
    }
    assert!(cache.server.asked("").is_empty(), "nothing was asked");
    setup.now_with(&cache.trusted()?)?;
    setup.gets("hello").await
}

#[rstest]
#[case::of_another_host(&["cache.test"], 2000..4000, "not valid for name \"127.0.0.1\"")]
#[case::of_another_address(&["127.0.0.2"], 2000..4000, "not valid for name \"127.0.0.1\"")]
#[case::expired(&[HOST], 2000..2020, "certificate expired")]
#[case::not_yet_valid(&[HOST], 3000..4000, "not valid yet")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_told(
    #[case] names: &[&str],
    #[case] years: std::ops::Range<i32>,
    #[case] reason: &str,
) -> Result<()> {
    let authority = Authority::new("of the cache")?;
    let identity = authority.certify(names, years)?;
    let cache = Cache::with("zstd", &["h2", "http/1.1"], authority, &identity)?;
    let setup = Setup::new(&cache.trusted()?)?;
    setup.fails("hello", &[&cache.url(), "certificate", reason]).await?;
    assert!(cache.server.asked("").is_empty(), "nothing was asked");
    // The cache gets a good one, and the node goes on as it is.
    cache.server.becomes(&good(&cache.authority)?)?;
    setup.gets_later("hello").await
}

#[rstest]
#[case::missing(None, "No such file")]
#[case::empty(Some(""), "no certificate")]
#[case::not_pem(Some("0\u{2}\u{1}\0"), "no certificate")]
#[case::a_key(Some("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "no certificate")]
#[case::cut(Some("-----BEGIN CERTIFICATE-----\nAAAA\n"), "cannot read certificates")]
#[case::not_base64(
    Some("-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n"),
    "cannot read certificates"
)]
#[case::not_a_certificate(
    Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    "cannot be used"
)]
#[tokio::test(flavor = "multi_thread")]
async fn an_ssl_cert_file_that_cannot_be_used_is_named(
    #[case] content: Option<&str>,
    #[case] reason: &str,
) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    let file = match content {
        Some(content) => cache.file(content)?,
        None => cache.dir.path().join("missing.crt"),
    };
    let error = Setup::new(&cache.config(Some(file.clone()))?).err().context("it cannot be used")?;
    let text = format!("{error:#}");
    for part in [&*file.display().to_string(), reason] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    Ok(())
}

#[test]
fn a_directory_is_no_ssl_cert_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = Config { ssl_cert_file: Some(dir.path().to_owned()), ..Config::default() };
    let text = format!("{:#}", Setup::new(&config).err().context("it cannot be used")?);
    assert!(text.contains(&dir.path().display().to_string()) && text.contains("directory"), "{text}");
    Ok(())
}

/// The larger one is restored while it arrives, the smaller one afterwards.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_whose_stream_is_reset_goes_on_where_it_was(
    #[values(("hello", "glibc", 3_000_000), ("multi-dev", "busybox", 700_000))] (fixture, name, at): (
        &str,
        &str,
        usize,
    ),
    #[values(Reason::INTERNAL_ERROR, Reason::CANCEL, Reason::ENHANCE_YOUR_CALM, Reason::NO_ERROR)]
    reason: Reason,
    #[values(1, usize::MAX)] times: usize,
) -> Result<()> {
    let cache = Cache::new("none", &["h2"])?;
    let file = nar("none", fixture, name)?;
    cache.server.rule(&file, times, Ending::Reset { at, reason });
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets(fixture).await?;
    let asked = cache.server.asked(&file);
    assert!(asked.len() >= 2, "{asked:?}");
    assert_eq!(asked[0].range, "");
    for (n, rest) in asked.iter().enumerate().skip(1) {
        assert_eq!(rest.range, format!("bytes={}-", n * at));
    }
    assert_eq!(cache.connections(), 1, "the others are not concerned");
    Ok(())
}

#[rstest]
#[case::narinfos(".narinfo")]
#[case::nars(".nar.zst")]
#[case::all_of_it("")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_asked_for_again(
    #[case] suffix: &str,
    #[values(Reason::REFUSED_STREAM, Reason::INTERNAL_ERROR, Reason::NO_ERROR)] reason: Reason,
) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    cache.server.rule(suffix, 2, Ending::Refused(reason));
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets("jq").await
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_narinfo_whose_stream_is_reset_is_asked_for_again(
    #[values(Reason::INTERNAL_ERROR, Reason::NO_ERROR)] reason: Reason,
    #[values(1, 100)] at: usize,
) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    cache.server.rule(".narinfo", 1, Ending::Reset { at, reason });
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets("jq").await
}

#[rstest]
#[case::narinfos_are_reset(".narinfo", Ending::Reset { at: 1, reason: Reason::INTERNAL_ERROR })]
#[case::narinfos_end_without_a_reason(".narinfo", Ending::Reset { at: 1, reason: Reason::NO_ERROR })]
#[case::narinfos_are_refused(".narinfo", Ending::Refused(Reason::REFUSED_STREAM))]
#[case::nars_are_refused(".nar.zst", Ending::Refused(Reason::REFUSED_STREAM))]
#[case::nars_fail(".nar.zst", Ending::Refused(Reason::INTERNAL_ERROR))]
#[case::connections_end(".nar.zst", Ending::Closed { at: 0, reason: Reason::ENHANCE_YOUR_CALM })]
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_always_end_early_are_an_error(
    #[case] suffix: &str,
    #[case] ending: Ending,
) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    cache.server.rule(suffix, usize::MAX, ending);
    let setup = Setup::new(&cache.trusted()?)?;
    let error = setup.fails("hello", &[&cache.url()]).await?;
    // A matter of the transfer, and not of what was transferred.
    let (FetchError::Lookup { source, .. } | FetchError::Download { source, .. }) = error.root() else {
        bail!("{error:?}");
    };
    assert!(source.is_temporary(), "{error:?}");
    cache.server.behave();
    setup.gets_later("hello").await
}

/// As nginx does after `keepalive_requests`.
#[rstest]
#[case::each_time(1)]
#[case::now_and_then(7)]
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_may_end_after_some_requests(#[case] requests: usize) -> Result<()> {
    let cache = Cache::new("zstd", &["h2"])?;
    cache.server.takes_requests(requests);
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets("python3").await?;
    setup.gets("jq").await?;
    assert!(cache.connections() > 1);
    Ok(())
}

/// As a server that is stopped does.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_may_end_under_its_streams(
    #[values(Reason::NO_ERROR, Reason::INTERNAL_ERROR, Reason::ENHANCE_YOUR_CALM)] reason: Reason,
    #[values(("hello", "glibc", "none", 3_000_000), ("python3", "glibc", "zstd", 100_000))]
    (fixture, name, compression, at): (&str, &str, &str, usize),
) -> Result<()> {
    let cache = Cache::new(compression, &["h2"])?;
    let file = nar(compression, fixture, name)?;
    cache.server.rule(&file, 2, Ending::Closed { at, reason });
    let setup = Setup::new(&cache.trusted()?)?;
    setup.gets(fixture).await?;
    let asked = cache.server.asked(&file);
    assert!(asked.len() >= 3, "{asked:?}");
    assert!(cache.connections() >= 3);
    Ok(())
}
