//! A closure as links: how long a view takes to be built, beside others who make a tree of hard links.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix_csi_e2e::nar_cache::NarCache;
use nix_csi_node::store::NodeStore;
use nix_csi_node::view::{self, ViewSpec};
use nix_csi_store::StorePath;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::corpus::{Corpus, nix_conf};
use crate::made;
use crate::report::{Against, Figure, LIMIT_BUDGET};
use crate::server::Servers;
use crate::{Filter, Run};

/// How many threads the limit has, whatever the machine has.
const THREADS: usize = 2;
/// The highest ratio to `cp -al` that is good.
const CP_BUDGET: f64 = 0.7;

/// Who links a closure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contestant {
    /// `view::build`: roots, links, seals, profile, rename.
    Ours,
    /// `mkdir` and `link` and nothing else, by threads that have the list of what is to be linked.
    Limit,
    /// `cp -al`.
    Cp,
    /// `rsync -a --link-dest`.
    Rsync,
}

impl Contestant {
    const ALL: [Self; 4] = [Self::Ours, Self::Limit, Self::Cp, Self::Rsync];

    /// How it is called as a peer, and the highest ratio to it that is good.
    fn as_peer(self) -> Option<(&'static str, Option<f64>)> {
        match self {
            Self::Ours => None,
            Self::Limit => Some(("limit: mkdir + link on two cores", Some(LIMIT_BUDGET))),
            Self::Cp => Some(("cp -al", Some(CP_BUDGET))),
            Self::Rsync => Some(("rsync --link-dest", None)),
        }
    }
}

/// One closure in the store.
struct Case {
    name: &'static str,
    root: StorePath,
}

/// Measures the closures that are wanted.
pub(crate) fn measure(options: &Run, filter: &Filter, servers: &Servers) -> Result<Vec<Figure>> {
    const NAMES: [&str; 3] = [
        "view of B: 300 paths, 6,000 files",
        "view of C: 1 path, 5,000 files",
        "view of 2,000 paths, 10,000 files",
    ];
    if !NAMES.iter().any(|name| filter.wants(name)) {
        return Ok(Vec::new());
    }
    let url = servers.url(Duration::ZERO)?;
    let made = NarCache::with_key("nix-csi-bench-made-1")?;
    let (b, c) = (Corpus::open(&options.corpora, "B", "zstd")?, Corpus::open(&options.corpora, "C", "zstd")?);
    let of = |corpus: &Corpus| (format!("{url}/{}", corpus.url_path), corpus.public_key.clone());
    let config = nix_conf(&[of(&b), of(&c), (made.url(), made.public_key())]);
    let roots = [b.root()?.clone(), c.root()?.clone(), made::add_closure(&made, 2000)?];
    let cases = NAMES.into_iter().zip(roots).map(|(name, root)| Case { name, root });

    let dir = options.scratch.join("view");
    fs::create_dir(&dir)?;
    let mut figures = Vec::new();
    for case in cases.filter(|case| filter.wants(case.name)) {
        eprintln!("bench: {}", case.name);
        fetch(&options.node, &dir, &config, &case.root)?;
        figures.extend(case.measure(&dir, options.rounds)?);
    }
    fs::remove_dir_all(&dir)?;
    Ok(figures)
}

fn fetch(program: &Path, dir: &Path, config: &str, path: &StorePath) -> Result<()> {
    let file = dir.join("nix.conf");
    fs::write(&file, config)?;
    let mut command = Command::new(program);
    command.arg("--root").arg(dir.join("root")).arg("--config").arg(file).arg("fetch").arg(path.to_string());
    let fetched = command.output()?;
    ensure!(fetched.status.success(), "fetching {path}: {}", String::from_utf8_lossy(&fetched.stderr));
    Ok(())
}

impl Case {
    /// All rounds. Who begins changes from round to round.
    fn measure(&self, dir: &Path, rounds: usize) -> Result<Vec<Figure>> {
        let store = NodeStore::open(&dir.join("root"))?;
        let closure = store.closure(std::slice::from_ref(&self.root))?.context("the closure is not valid")?;
        let directories = directories(&store.layout().store_dir(), &closure)?;
        let mut contestants = Contestant::ALL;
        let mut seconds: Vec<(Contestant, f64)> = Vec::new();
        for _ in 0..rounds {
            for who in contestants {
                rustix::fs::syncfs(fs::File::open(dir)?)?;
                let took = self.run(who, &store, &closure, &directories, dir)?;
                eprintln!("  {who:<6?} {took:7.3} s");
                seconds.push((who, took));
            }
            contestants.rotate_left(1);
        }
        let of = |who| seconds.iter().filter(|(of, _)| *of == who).map(|(_, took)| *took).collect::<Vec<_>>();
        let ours = of(Contestant::Ours);
        let figures = Contestant::ALL.into_iter().filter_map(|who| {
            let (peer, budget) = who.as_peer()?;
            let against =
                Against { name: format!("{}, {peer}", self.name), peer_name: peer.to_owned(), budget };
            Figure::of_rounds(against, "s", &ours, &of(who))
        });
        Ok(figures.collect())
    }

    /// Seconds of one run, of which nothing is left.
    fn run(
        &self,
        who: Contestant,
        store: &NodeStore,
        closure: &[StorePath],
        directories: &[Directory],
        dir: &Path,
    ) -> Result<f64> {
        let store_dir = store.layout().store_dir();
        let to = dir.join("links");
        fs::create_dir(&to)?;
        let start = Instant::now();
        let built = match who {
            Contestant::Ours => view::build(store, &ViewSpec::of(vec![self.root.clone()]), closure)?,
            Contestant::Limit => {
                link(directories, &store_dir, &to)?;
                to.clone()
            }
            Contestant::Cp | Contestant::Rsync => {
                let mut command = Command::new(if who == Contestant::Cp { "cp" } else { "rsync" });
                if who == Contestant::Cp {
                    command.arg("-al").arg("-t").arg(&to);
                } else {
                    command.arg("-a").arg(option("--link-dest=", &store_dir));
                }
                command.args(closure.iter().map(|path| store_dir.join(path.base_name())));
                if who == Contestant::Rsync {
                    command.arg(&to);
                }
                let ended = command.status().with_context(|| format!("{who:?}; e2e/setup.sh installs it"))?;
                ensure!(ended.success(), "{who:?} failed");
                to.clone()
            }
        };
        let took = start.elapsed().as_secs_f64();
        let links = if who == Contestant::Ours { built.join("store") } else { built.clone() };
        let found = fs::read_dir(&links)?.count();
        ensure!(found == closure.len(), "{who:?} made {found} of {} paths", closure.len());
        if who == Contestant::Ours {
            fs::remove_dir_all(&built)?;
            store.remove_roots(ViewSpec::of(vec![self.root.clone()]).id().as_str())?;
        }
        fs::remove_dir_all(&to)?;
        Ok(took)
    }
}

fn option(name: &str, path: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from(name);
    option.push(path);
    option
}

/// A directory of the closure, below the store.
struct Directory {
    path: PathBuf,
    /// Which of the list it is in; the store itself is in none, and is there already.
    parent: Option<usize>,
    /// What is not a directory in it.
    entries: Vec<CString>,
}

/// The directories of a closure, each behind the one it is in. The first is the store.
fn directories(store_dir: &Path, closure: &[StorePath]) -> Result<Vec<Directory>> {
    let mut found = vec![Directory { path: PathBuf::new(), parent: None, entries: Vec::new() }];
    let mut todo = Vec::new();
    for path in closure {
        let name = OsStr::new(path.base_name());
        if fs::symlink_metadata(store_dir.join(name))?.is_dir() {
            todo.push((PathBuf::from(name), 0));
        } else {
            found[0].entries.push(CString::new(name.as_bytes())?);
        }
    }
    while let Some((path, parent)) = todo.pop() {
        let (this, mut entries) = (found.len(), Vec::new());
        for entry in fs::read_dir(store_dir.join(&path))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push((path.join(entry.file_name()), this));
            } else {
                entries.push(CString::new(entry.file_name().into_vec())?);
            }
        }
        found.push(Directory { path, parent: Some(parent), entries });
    }
    Ok(found)
}

/// Makes and links what `directories` says, each directory by one of the threads.
fn link(directories: &[Directory], from: &Path, to: &Path) -> Result<()> {
    let made: Vec<_> = directories.iter().map(|_| AtomicBool::new(false)).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        loop {
            let this = next.fetch_add(1, Ordering::Relaxed);
            let Some(dir) = directories.get(this) else { return Ok(()) };
            let to = to.join(&dir.path);
            let is_there = match dir.parent {
                None => Ok(()),
                Some(parent) => {
                    // Taken before this one, by the other thread, a moment ago.
                    while !made[parent].load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                    rustix::fs::mkdirat(CWD, &to, Mode::from_raw_mode(0o755))
                }
            };
            // Also where it failed, since the other thread may wait.
            made[this].store(true, Ordering::Release);
            is_there?;
            link_entries(dir, &from.join(&dir.path), &to)?;
        }
    };
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a worker panicked"))??;
        }
        Ok(())
    })
}

fn link_entries(dir: &Directory, from: &Path, to: &Path) -> Result<()> {
    let open = |path: &Path| rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
    let (from, to) = (open(from)?, open(to)?);
    for name in &dir.entries {
        rustix::fs::linkat(from.as_fd(), name, to.as_fd(), name, AtFlags::empty())?;
    }
    Ok(())
}
