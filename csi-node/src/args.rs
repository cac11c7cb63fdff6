//! The command line.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use nix_csi_proto::control::verify_event::Event as Finding;
use nix_csi_proto::{DRIVER_NAME, References, System};
use nix_csi_store::StorePath;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::Config;
use crate::control::ask_to_verify;
use crate::driver::{Driver, DriverOptions, start_substituter};
use crate::kubernetes::Kubernetes;
use crate::mount;
use crate::progress::{self, Event};
use crate::server::{Sockets, serve};
use crate::store::{NodeStore, OpenError, RootLock, control_socket};
use crate::substituter::{Closure, Progress, Substituter};
use crate::verify::{self, Findings, Repairer};
use crate::view::{self, ViewSpec};
use crate::volume::Volumes;

/// The node side of nix-csi.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Args {
    /// The directory of the node store, of its views and its volumes.
    #[arg(long, global = true, env = "NIX_CSI_ROOT", default_value = "/var/lib/nix-csi")]
    root: PathBuf,
    /// Options as in nix.conf. Without it: Nix's defaults.
    #[arg(long, global = true, env = "NIX_CSI_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the driver.
    Serve(Serve),
    /// Fetch closures into the store, without a cluster.
    Fetch {
        /// Store paths.
        #[arg(required = true)]
        paths: Vec<String>,
        /// Begin to fetch this one first, as for another volume, and leave it when the others are here. For
        /// the benchmark of fairness.
        #[arg(long, hide = true)]
        beside: Option<String>,
    },
    /// Build a view of store paths, fetching what is missing, and print where it is.
    View {
        /// Store paths, in the order in which their files win.
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Hash every path of the store, and say which ones are not what the database says.
    ///
    /// Alone it changes no path. It may run beside a driver.
    Verify {
        /// Fetch what is damaged again. If a driver holds the store, it is asked to do so.
        #[arg(long)]
        repair: bool,
    },
    /// Delete the whole node store with its views. Refuses while a volume is recorded or a driver runs.
    DeleteNodeData {
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Do nothing until told to end: the rest of a DaemonSet whose work is done.
    Wait,
    /// List the volumes on this node, a JSON object a line. Only reads.
    Volumes,
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// The node's name.
    #[arg(long, env = "KUBE_NODE_NAME")]
    node_name: String,
    /// Where to make the CSI socket.
    #[arg(long, default_value = "/csi/csi.sock")]
    csi_socket: PathBuf,
    /// Kubelet's directory on the host; its `pods` must be mounted at the same place here.
    #[arg(long, env = "KUBELET_DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Where kubelet looks for plugins, as seen here. Without it the driver does not register.
    #[arg(long)]
    registration_dir: Option<PathBuf>,
    /// Where to tell metrics and whether the driver works, over HTTP, as `[::]:9808`.
    #[arg(long)]
    http_address: Option<SocketAddr>,
    /// Take the taint nix.lillecarl.com/agent-not-ready off the node when kubelet has registered the driver.
    #[arg(long)]
    remove_startup_taint: bool,
    /// Seconds a call waits for a fetch. Kubelet gives a call 120.
    #[arg(long, default_value_t = 110)]
    patience: u64,
}

/// Runs a command. Errors go to standard error, with the chain of their causes.
pub fn run(args: Args) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NIX_CSI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if matches!(args.command, Command::Serve(_)) {
        log.json().flatten_event(true).init();
    } else {
        log.without_time().init();
    }
    // One provider for everything; a second call would only say that it is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match execute(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(args: Args) -> anyhow::Result<()> {
    // What is restored gets its modes from the call that creates it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    match args.command {
        Command::Volumes => return list_volumes(&args.root),
        Command::DeleteNodeData { yes } => return delete_node_data(&args.root, yes),
        _ => {}
    }
    let config = match &args.config {
        Some(path) => Config::read(path).with_context(|| format!("options in {}", path.display()))?,
        None => Config::default(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match args.command {
            Command::Serve(options) => Box::pin(serve_driver(&args.root, &config, options)).await,
            Command::Fetch { paths, beside } => {
                let (store, _lock) = open(&args.root, "nix-csi-node fetch")?;
                let beside = beside.map(|path| parse_paths(&[path])).transpose()?;
                fetch(&store, &config, &parse_paths(&paths)?, beside).await.map(drop)
            }
            Command::View { paths } => {
                let (store, _lock) = open(&args.root, "nix-csi-node view")?;
                let packages = parse_paths(&paths)?;
                let closure = fetch(&store, &config, &packages, None).await?;
                let spec = ViewSpec::of(packages);
                print_line(&view::build(&store, &spec, &closure.paths)?.display());
                Ok(())
            }
            Command::Verify { repair } => verify(&args.root, &config, repair).await,
            Command::Wait => {
                ending()?.await;
                Ok(())
            }
            // Answered above, without options.
            Command::Volumes | Command::DeleteNodeData { .. } => Ok(()),
        }
    })
}

#[expect(clippy::print_stdout, reason = "the one result of a command")]
fn print_line(line: &dyn std::fmt::Display) {
    println!("{line}");
}

fn open(root: &Path, who: &str) -> anyhow::Result<(Arc<NodeStore>, RootLock)> {
    let lock = RootLock::acquire(root, who)?;
    raise_file_limit();
    Ok((Arc::new(NodeStore::open(root)?), lock))
}

fn parse_paths(paths: &[String]) -> anyhow::Result<Vec<StorePath>> {
    let references = References::parse(&paths.join("\n"))?;
    Ok(references.items().iter().map(|item| item.reference.path.clone()).collect())
}

/// Fetches closures, shows how far it is, and waits until they are on the disk.
async fn fetch(
    store: &Arc<NodeStore>,
    config: &Config,
    paths: &[StorePath],
    beside: Option<Vec<StorePath>>,
) -> anyhow::Result<Closure> {
    recover(store).await?;
    let substituter = start_substituter(Arc::clone(store), config)?;
    if let Some(beside) = beside {
        begin(&substituter, beside).await?;
    }
    let start = Instant::now();
    let (sender, progress) = watch::channel(Progress::default());
    let shown = tokio::spawn(progress::show(progress));
    let fetched = substituter.fetch(paths, &sender).await;
    drop(sender);
    if std::io::stderr().is_terminal() {
        shown.await?;
    } else {
        // Between two lines: the last one says more.
        shown.abort();
    }
    if let Ok(closure) = &fetched {
        progress::tell(&Event::Valid {
            paths: closure.paths.len(),
            fetched: closure.fetched.len(),
            register_seconds: closure.registering.as_secs_f64(),
            ran_alone: substituter.ran_alone(),
            seconds: start.elapsed().as_secs_f64(),
        });
    }
    let store = Arc::clone(store);
    tokio::task::spawn_blocking(move || {
        // Here, because a thread that does it later ends with the process.
        store.empty_trash()?;
        store.sync().map_err(anyhow::Error::new)
    })
    .await??;
    let closure = fetched?;
    progress::tell(&Event::Durable { seconds: start.elapsed().as_secs_f64() });
    Ok(closure)
}

/// Begins to fetch `paths`, and comes back when some of it is here.
async fn begin(substituter: &Substituter, paths: Vec<StorePath>) -> anyhow::Result<()> {
    const SOME: u64 = 64 << 20;
    let (sender, mut progress) = watch::channel(Progress::default());
    let substituter = substituter.clone();
    tokio::spawn(async move { substituter.fetch(&paths, &sender).await });
    progress.wait_for(|progress| progress.bytes > SOME).await.context("what is fetched beside has ended")?;
    Ok(())
}

async fn recover(store: &Arc<NodeStore>) -> anyhow::Result<()> {
    let store = Arc::clone(store);
    Ok(tokio::task::spawn_blocking(move || store.recover()).await??)
}

/// Verifies the store, by way of the driver if one holds it and something is to be repaired.
async fn verify(root: &Path, config: &Config, repair: bool) -> anyhow::Result<()> {
    // Opening one makes what is missing, which is not what this is for.
    let schema = root.join("nix/var/nix/db/schema");
    anyhow::ensure!(schema.exists(), "there is no store in {}", root.display());
    let (findings, mut found) = tokio::sync::mpsc::channel(16);
    let telling = async {
        let mut last = None;
        while let Some(finding) = found.recv().await {
            match &finding {
                Finding::Verified(verified) => last = Some(*verified),
                Finding::NotRepaired(failed) => {
                    tracing::error!(path = failed.path, "cannot repair: {}", failed.error);
                }
                Finding::Damaged(_) | Finding::Repaired(_) => {}
            }
            progress::tell(&finding.into());
        }
        last
    };
    let held = if repair { Some(RootLock::acquire(root, "nix-csi-node verify --repair")) } else { None };
    let verifying = async {
        let findings = findings;
        match held {
            Some(Err(OpenError::Held { by, .. })) => {
                tracing::info!("asking {by}, which holds {}", root.display());
                ask_to_verify(&control_socket(root), repair, findings).await
            }
            lock => verify_here(root, config, lock.transpose()?, &findings).await,
        }
    };
    let (verified, last) = tokio::join!(verifying, telling);
    verified?;
    let last = last.context("the driver ended before it was done")?;
    let left = last.damaged - last.repaired;
    anyhow::ensure!(left == 0, "{left} paths are damaged");
    Ok(())
}

async fn verify_here(
    root: &Path,
    config: &Config,
    lock: Option<RootLock>,
    findings: &Findings,
) -> anyhow::Result<()> {
    raise_file_limit();
    let store = Arc::new(NodeStore::open(root)?);
    let repairer = if lock.is_some() {
        recover(&store).await?;
        let substituter = start_substituter(Arc::clone(&store), config)?;
        Some(Repairer { substituter, building: Arc::default(), kubernetes: Kubernetes::default() })
    } else {
        None
    };
    verify::verify(&store, repairer.as_ref(), findings).await.map(drop)
}

async fn serve_driver(root: &Path, config: &Config, options: Serve) -> anyhow::Result<()> {
    mount::probe().context("this kernel is too old for detached mounts: Linux 5.12 or newer is needed")?;
    let (store, _lock) = open(root, "the driver (nix-csi-node serve)")?;
    let substituter = start_substituter(Arc::clone(&store), config)?;
    let kubernetes = Kubernetes::in_cluster(&options.node_name).context("this pod's service account")?;
    let driver = Driver::new(
        Arc::clone(&store),
        substituter,
        DriverOptions {
            node_name: options.node_name,
            system: System::current(),
            pods_dir: options.kubelet_dir.join("pods"),
            patience: Duration::from_secs(options.patience),
            kubernetes,
            limits: config.limits,
            max_size_limit: config.max_size_limit,
            remove_startup_taint: options.remove_startup_taint,
        },
    );
    let recovering = driver.clone();
    tokio::task::spawn_blocking(move || recovering.recover())
        .await?
        .context("cannot put the store in order")?;
    let sockets = Sockets {
        csi: options.csi_socket,
        csi_on_host: options.kubelet_dir.join("plugins").join(DRIVER_NAME).join("csi.sock"),
        http: options.http_address,
        registration: options.registration_dir.map(|dir| dir.join(format!("{DRIVER_NAME}-reg.sock"))),
    };
    let beside = driver.work_beside();
    let finishing = driver.clone();
    let served = serve(driver, &sockets, ending()?).await;
    drop(beside);
    tokio::task::spawn_blocking(move || finishing.finish()).await?.context("cannot sync the store")?;
    Ok(served?)
}

/// Ends when a signal asks for the end. Signals are caught from the call on, not from the first wait.
fn ending() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn delete_node_data(root: &Path, yes: bool) -> anyhow::Result<()> {
    anyhow::ensure!(yes, "this deletes everything in {}; say --yes", root.display());
    let _lock = RootLock::acquire(root, "nix-csi-node delete-node-data")?;
    let volumes = Volumes::at(root).list()?.len();
    anyhow::ensure!(
        volumes == 0,
        "{volumes} volumes are recorded in {}; delete their pods first",
        root.display()
    );
    for entry in std::fs::read_dir(root)? {
        let path = entry?.path();
        // Last: whoever starts meanwhile must find it held.
        if path.ends_with("lock") {
            continue;
        }
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.with_context(|| format!("cannot delete {}", path.display()))?;
    }
    std::fs::remove_file(root.join("lock")).context("cannot delete the lock")?;
    Ok(())
}

/// As many open files as allowed: each path of a closure is locked while it is registered.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn list_volumes(root: &Path) -> anyhow::Result<()> {
    for record in Volumes::at(root).list()? {
        match record {
            Ok(record) => print_line(&serde_json::to_string(&record)?),
            Err(error) => tracing::warn!("{:#}", anyhow::Error::new(error)),
        }
    }
    Ok(())
}
