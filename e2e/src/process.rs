//! The real driver's process under a kubelet that never gives up. To be used in a mount namespace that ends with the
//! test.

use std::error::Error as _;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix_csi_node::fault;
use nix_csi_proto::csi::node_client::NodeClient;
use nix_csi_proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic::{Code, Request, Status};

use crate::driver::{Volume, channel, mounts_below};
use crate::{Fixtures, nix, node_program, tree};

const ANOTHER_BOOT: &str = "22222222-3333-4444-8555-666666666666";
/// What a call is given. The driver answers five seconds before.
const DEADLINE: Duration = Duration::from_secs(20);
/// Long enough for any machine: nothing here waits for it unless something is broken.
pub const LIMIT: Duration = Duration::from_mins(2);

/// The program, and the directories of its node.
pub struct Process {
    /// The packages.
    pub fixtures: Fixtures,
    /// Everything of the node.
    pub dir: TempDir,
    program: PathBuf,
    child: Mutex<Option<Child>>,
    kills: AtomicUsize,
    /// Whether the process that runs ends itself at some point, and is then followed by one that does not.
    is_doomed: AtomicBool,
}

impl Process {
    /// A node whose driver asks `cache`, with `more` options. No driver runs yet.
    pub fn new(cache: &str, more: &str) -> Result<Self> {
        let fixtures = Fixtures::find()?;
        let dir = tempfile::tempdir()?;
        let config =
            // How full the disk of whoever tests is must not matter.
            format!("substituters = {cache}\ntrusted-public-keys = {}\nmin-free = 0\n{more}\n", fixtures.public_key()?);
        fs::write(dir.path().join("nix.conf"), config)?;
        fs::write(dir.path().join("boot-id"), format!("{ANOTHER_BOOT}\n"))?;
        fs::create_dir_all(dir.path().join("kubelet/pods"))?;
        let program = node_program()?;
        Ok(Self {
            fixtures,
            dir,
            program,
            child: Mutex::default(),
            kills: AtomicUsize::new(0),
            is_doomed: AtomicBool::new(false),
        })
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node store.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Where kubelet keeps its pods.
    pub fn pods(&self) -> PathBuf {
        self.dir.path().join("kubelet/pods")
    }

    /// Where the volume of a pod is mounted.
    pub fn target(&self, pod: &str) -> PathBuf {
        self.pods().join(pod).join("volumes/kubernetes.io~csi/nix/mount")
    }

    /// What the driver keeps of a volume.
    pub fn kept(&self, pod: &str) -> PathBuf {
        self.root().join("volumes").join(format!("csi-{pod}"))
    }

    fn serve(&self, command: &mut Command) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.dir.path().join("log"))?;
        command.arg("--root").arg(self.root()).arg("--config").arg(self.dir.path().join("nix.conf"));
        command.args(["serve", "--node-name", "node-under-test", "--patience", "110"]);
        command.arg("--csi-socket").arg(self.dir.path().join("csi.sock"));
        command.arg("--kubelet-dir").arg(self.dir.path().join("kubelet"));
        for name in ["KUBERNETES_SERVICE_HOST", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?)
    }

    /// Starts the driver.
    pub fn start(&self) -> Result<()> {
        let mut child = self.child();
        ensure!(child.is_none(), "one runs already");
        *child = Some(self.serve(&mut Command::new(&self.program))?);
        Ok(())
    }

    /// Starts one that ends as by SIGKILL at that point, and is followed by another one then.
    pub fn start_killed_at(&self, point: &str) -> Result<()> {
        let mut child = self.child();
        ensure!(child.is_none(), "one runs already");
        *child = Some(self.serve(Command::new(&self.program).env(fault::VARIABLE, point))?);
        self.is_doomed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Starts it on a machine that was booted in between: in a mount namespace of its own, where only the id of the
    /// boot is another. What it mounts below kubelet's pods is seen outside, as in a cluster.
    pub fn start_after_a_boot(&self) -> Result<()> {
        let pods = self.pods();
        rustix::mount::mount_bind(&pods, &pods)?;
        rustix::mount::mount_change(&pods, MountPropagationFlags::SHARED)?;
        let inside = "mount --bind \"$1\" /proc/sys/kernel/random/boot_id && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "unchanged", "sh", "-c", inside, "sh"]);
        command.arg(self.dir.path().join("boot-id")).arg(&self.program);
        *self.child() = Some(self.serve(&mut command)?);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child().take().context("none runs")?;
        if let Some(status) = child.try_wait()? {
            bail!("it ended before it was killed: {status}");
        }
        child.kill()?;
        child.wait()?;
        self.kills.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// How often it was killed.
    pub fn kills(&self) -> usize {
        self.kills.load(Ordering::Relaxed)
    }

    /// As kubelet or a person would, to the end.
    pub fn stop(&self) -> Result<()> {
        let mut child = self.child().take().context("none runs")?;
        let pid = Pid::from_raw(i32::try_from(child.id())?).context("a pid")?;
        kill_process(pid, Signal::TERM)?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > LIMIT {
                child.kill()?;
                child.wait()?;
                bail!("it does not stop");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }

    /// Fails if it has ended by itself. One that was doomed is followed by one that is not.
    pub fn is_well(&self) -> Result<()> {
        let Some(status) = self.child().as_mut().map(Child::try_wait).transpose()?.flatten() else {
            return Ok(());
        };
        let is_killed = status.signal() == Some(Signal::KILL.as_raw());
        ensure!(is_killed && self.is_doomed.swap(false, Ordering::Relaxed), "the driver has ended: {status}");
        self.kills.fetch_add(1, Ordering::Relaxed);
        *self.child() = None;
        self.start()
    }

    /// A connection of its own for each call, as kubelet makes it.
    pub async fn client(&self) -> Result<NodeClient<tonic::transport::Channel>, Status> {
        let channel = channel(&self.dir.path().join("csi.sock")).await;
        Ok(NodeClient::new(channel.map_err(|error| Status::unavailable(format!("{error:#}")))?))
    }

    /// A volume of some fixtures.
    pub fn volume(&self, pod: &str, names: &[&str], readonly: bool) -> Result<Volume> {
        let paths = names.iter().map(|name| Ok(self.fixtures.get(name)?.path.to_string()));
        let paths = paths.collect::<Result<Vec<_>>>()?.join("\n");
        Ok(Volume { readonly, ..Volume::new("shop", pod, &paths) })
    }

    /// Calls once. What kubelet does before is done before: the directory, and what it writes down.
    pub async fn publish_once(&self, volume: &Volume) -> Result<Result<(), Status>> {
        let (pod, target) = (&volume.pod, self.target(&volume.pod));
        let of_pod = target.parent().context("below pods")?;
        fs::create_dir_all(of_pod)?;
        let data = format!(r#"{{"driverName":"nix-csi","volumeHandle":"csi-{pod}"}}"#);
        fs::write(of_pod.join("vol_data.json"), data)?;
        Ok(self.ask(volume).await)
    }

    /// The bare call.
    pub async fn ask(&self, volume: &Volume) -> Result<(), Status> {
        let pod = &volume.pod;
        let of_kubelet = [
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", pod),
            ("csi.storage.k8s.io/pod.namespace", &volume.namespace),
            ("csi.storage.k8s.io/pod.uid", pod),
        ];
        let of_kubelet = of_kubelet.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let mut request = Request::new(NodePublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: volume.readonly,
            volume_context: volume.attributes.iter().cloned().chain(of_kubelet).collect(),
            ..Default::default()
        });
        request.set_timeout(DEADLINE);
        self.client().await?.node_publish_volume(request).await.map(drop)
    }

    /// Calls until the volume is there. An answer that kubelet would take as final is an error.
    pub async fn publish(&self, volume: &Volume) -> Result<()> {
        let start = Instant::now();
        loop {
            let Err(status) = self.publish_once(volume).await? else { return Ok(()) };
            self.is_well()?;
            ensure!(!is_final(&status) && start.elapsed() < LIMIT, "publish {}: {status:?}", volume.pod);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Calls until the answer is that nothing is left, and then forgets the pod as kubelet does: by `rmdir`.
    pub async fn unpublish(&self, pod: &str) -> Result<()> {
        let start = Instant::now();
        while let Err(status) = self.unpublish_once(pod).await {
            self.is_well()?;
            ensure!(!is_final(&status) && start.elapsed() < LIMIT, "unpublish {pod}: {status:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ensure!(!self.target(pod).exists(), "the target of {pod} is left");
        ensure!(!self.kept(pod).exists(), "a record of {pod} is left");
        self.forget(pod)
    }

    /// Calls once.
    pub async fn unpublish_once(&self, pod: &str) -> Result<(), Status> {
        let mut request = Request::new(NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
        });
        request.set_timeout(DEADLINE);
        self.client().await?.node_unpublish_volume(request).await.map(drop)
    }

    /// Removes the pod's directory. Only what is empty goes, so nothing of a volume can.
    pub fn forget(&self, pod: &str) -> Result<()> {
        let target = self.target(pod);
        for dir in target.ancestors().take_while(|dir| *dir != self.pods()) {
            let data = dir.join("vol_data.json");
            if data.exists() {
                fs::remove_file(data)?;
            }
            if dir.exists() {
                fs::remove_dir(dir).with_context(|| dir.display().to_string())?;
            }
        }
        Ok(())
    }

    /// Fails unless the volume shows a file of each package as real Nix built it.
    pub fn shows(&self, pod: &str, names: &[&str]) -> Result<()> {
        ensure!(mounts_below(&self.target(pod))?.len() == 1, "{pod} has not one mount");
        for name in names {
            let path = self.fixtures.get(name)?.path;
            let built = self.fixtures.store().join("nix/store").join(path.base_name());
            let file = some_file(&built)?.with_context(|| format!("{name} has no file"))?;
            let seen = self.target(pod).join("store").join(path.base_name()).join(file.strip_prefix(&built)?);
            let found = fs::read(&seen).with_context(|| seen.display().to_string())?;
            ensure!(found == fs::read(&file)?, "{} has another content", seen.display());
        }
        Ok(())
    }

    /// Nothing is left but the store and whole views, and real Nix finds it good. Ends the driver that runs.
    pub fn assert_in_order(&self) -> Result<()> {
        let mounted: Vec<_> = mounts_below(&self.pods())?.into_iter().map(|mount| mount.target).collect();
        ensure!(mounted.iter().all(|at| *at == self.pods()), "still mounted: {mounted:?}");
        let left = names_in(&self.root().join("volumes"))?;
        ensure!(left.is_empty(), "left in volumes: {left:?}");
        tree::wait_until_clean(&self.root())?;
        self.stop()?;
        tree::wait_until_clean(&self.root())?;
        for name in names_in(&self.root().join("views"))? {
            let view = self.root().join("views").join(&name);
            ensure!(!name.starts_with('.'), "half a view: {name}");
            ensure!(
                view.join("store").is_dir() && fs::symlink_metadata(view.join("var/result")).is_ok(),
                "not whole: {name}"
            );
        }
        nix::verify(&self.root())
    }

    /// With the end of the log, if it is an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(12).collect();
            let tail = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
            error.context(format!("after {} kills; the log ends:\n{tail}", self.kills()))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child().take() {
            let _ = (child.kill(), child.wait());
        }
        for mount in mounts_below(self.dir.path()).unwrap_or_default().into_iter().rev() {
            let _ = rustix::mount::unmount(&mount.target, UnmountFlags::DETACH);
        }
    }
}

/// Whether kubelet would forget the volume. What did not come from the driver never is.
pub fn is_final(status: &Status) -> bool {
    use Code::{Aborted, Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable};
    let is_answer = status.source().is_none();
    is_answer
        && !matches!(status.code(), Aborted | Cancelled | DeadlineExceeded | ResourceExhausted | Unavailable)
}

/// The names of what is in a directory.
pub fn names_in(dir: &Path) -> Result<Vec<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Those of them that end so.
pub fn names_ending(dir: &Path, suffix: &str) -> Result<Vec<String>> {
    Ok(names_in(dir)?.into_iter().filter(|name| name.ends_with(suffix)).collect())
}

/// The first file below `dir` that is not empty, in the order of names.
pub fn some_file(dir: &Path) -> Result<Option<PathBuf>> {
    let mut entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_file() && meta.len() > 0 {
            return Ok(Some(path));
        }
        if meta.is_dir()
            && let Some(found) = some_file(&path)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
