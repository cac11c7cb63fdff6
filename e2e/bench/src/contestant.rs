//! Who is measured, and one run of each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix_csi_store::StorePath;

use crate::corpus::Corpus;
use crate::limit;
use crate::stopwatch::{Request, Stopwatch, Timed};

/// Who fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contestant {
    /// `nix-csi-node fetch`.
    Ours,
    /// The same, while it fetches another corpus in the same process.
    OursBeside,
    /// `nix copy`: one path after the other.
    NixCopy,
    /// `nix-store -r`, which substitutes as `nix build` does.
    NixRealise,
    /// Nobody: the work that nobody can leave out.
    Limit,
}

impl Contestant {
    /// Whether it is what is measured, and not a peer.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::OursBeside)
    }
}

/// What one run took, in seconds and MiB.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Until the closure could have been published: all of it restored, verified and registered.
    pub(crate) publishable: f64,
    /// Until it would have survived a power failure.
    pub(crate) durable: Option<f64>,
    /// The fetch alone, without the start of the program; ours only.
    pub(crate) fetch: Option<f64>,
    /// The registration alone; ours only.
    pub(crate) register: Option<f64>,
    pub(crate) peak_memory: Option<f64>,
}

/// What runs need.
pub(crate) struct Field {
    node: PathBuf,
    scratch: PathBuf,
    plain: Stopwatch,
    nix: Stopwatch,
    nix_version: String,
    runs: usize,
}

impl Field {
    pub(crate) fn new(node: &Path, nix_rootfs: Option<&Path>, scratch: &Path) -> Result<Self> {
        let nix_sh = || {
            let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/nix.sh"));
            if let Some(rootfs) = nix_rootfs {
                command.env("NIX_SH_ROOTFS", rootfs);
            }
            command
        };
        let version = nix_sh().args(["nix", "--version"]).output().context("nix.sh")?;
        ensure!(version.status.success(), "nix.sh: {}", String::from_utf8_lossy(&version.stderr));
        let version = String::from_utf8(version.stdout)?;
        Ok(Self {
            node: node.to_owned(),
            scratch: scratch.to_owned(),
            // A program that does nothing but start the next one.
            plain: Stopwatch::start(Command::new("env"))?,
            nix: Stopwatch::start(nix_sh())?,
            nix_version: version.trim().trim_start_matches("nix (Nix) ").to_owned(),
            runs: 0,
        })
    }

    pub(crate) fn nix_version(&self) -> &str {
        &self.nix_version
    }

    /// One run, from an empty store that nothing is waiting to be written to.
    pub(crate) fn run(&mut self, who: Contestant, corpus: &Corpus, url: &str) -> Result<Outcome> {
        self.runs += 1;
        let dir = self.scratch.join(format!("run-{}", self.runs));
        let root = dir.join("root");
        fs::create_dir_all(&root)?;
        self.sync()?;
        let outcome = match who {
            Contestant::Ours => self.ours(&dir, corpus, url, None)?,
            Contestant::OursBeside => self.ours(&dir, corpus, url, corpus.beside.as_deref())?,
            Contestant::NixCopy | Contestant::NixRealise => self.nix(who, &dir, corpus, url)?,
            Contestant::Limit => {
                Outcome { publishable: limit::measure(corpus, &root)?, ..Outcome::default() }
            }
        };
        if who != Contestant::Limit {
            for path in &corpus.roots {
                let inside = root.join("nix/store").join(path.base_name());
                ensure!(inside.symlink_metadata().is_ok(), "{who:?} left no {}", inside.display());
            }
        }
        fs::remove_dir_all(&dir)?;
        self.sync()?;
        Ok(outcome)
    }

    fn ours(&mut self, dir: &Path, corpus: &Corpus, url: &str, beside: Option<&Corpus>) -> Result<Outcome> {
        let config = dir.join("nix.conf");
        let key = &corpus.public_key;
        // Corpora are next to each other on the server.
        let beside_url =
            beside.map_or_else(String::new, |beside| url.replace(&corpus.url_path, &beside.url_path));
        fs::write(
            &config,
            format!("substituters = {url} {beside_url}\ntrusted-public-keys = {key}\nrequire-sigs = true\n"),
        )?;
        let mut command = vec![
            text(&self.node)?,
            "--root".to_owned(),
            text(&dir.join("root"))?,
            "--config".to_owned(),
            text(&config)?,
            "fetch".to_owned(),
        ];
        command.extend(corpus.roots.iter().map(StorePath::to_string));
        for root in beside.iter().flat_map(|beside| &beside.roots) {
            command.extend(["--beside".to_owned(), root.to_string()]);
        }
        let timed = self.plain.time(&Request { command, env: Vec::new(), log: dir.join("log") })?;
        let (publishable, line) = timed.valid.as_ref().context("nix-csi-node printed no result")?;
        let who = if beside.is_some() { "ours, beside" } else { "ours" };
        tell(who, *publishable, timed.exited, &timed);
        Ok(Outcome {
            publishable: *publishable,
            durable: Some(timed.exited),
            fetch: line["seconds"].as_f64(),
            register: line["registerSeconds"].as_f64(),
            peak_memory: Some(timed.peak_memory),
        })
    }

    fn nix(&mut self, who: Contestant, dir: &Path, corpus: &Corpus, url: &str) -> Result<Outcome> {
        let root = text(&dir.join("root"))?;
        let mut command: Vec<String> = if who == Contestant::NixCopy {
            vec!["nix", "copy", "--from", url, "--to", &root]
        } else {
            vec!["nix-store", "--store", &root, "--option", "substituters", url, "-r"]
        }
        .into_iter()
        .map(str::to_owned)
        .collect();
        command.extend(corpus.roots.iter().map(StorePath::to_string));
        for (option, value) in [("trusted-public-keys", corpus.public_key.as_str()), ("require-sigs", "true")]
        {
            command.extend(["--option", option, value].map(str::to_owned));
        }
        // What it knows about caches is forgotten; in the tmpfs of nix.sh.
        let cache = format!("/.nix-sh/cache-{}", self.runs);
        let env = vec![("XDG_CACHE_HOME".to_owned(), cache)];
        let timed = self.nix.time(&Request { command, env, log: dir.join("log") })?;
        // Nix does not sync what it restores.
        let synced = Instant::now();
        self.sync()?;
        let durable = timed.exited + synced.elapsed().as_secs_f64();
        tell(
            if who == Contestant::NixCopy { "nix copy" } else { "nix-store -r" },
            timed.exited,
            durable,
            &timed,
        );
        Ok(Outcome {
            publishable: timed.exited,
            durable: Some(durable),
            fetch: None,
            register: None,
            peak_memory: Some(timed.peak_memory),
        })
    }

    fn sync(&self) -> Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(&self.scratch)?)?)
    }
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned())
}

fn tell(who: &str, publishable: f64, durable: f64, timed: &Timed) {
    eprintln!(
        "  {who:<12} {publishable:7.3} s, durable {durable:7.3} s, CPU {:7.3} s, {:4.0} MiB",
        timed.cpu, timed.peak_memory
    );
}
