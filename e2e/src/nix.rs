//! Real Nix, as the judge of what was written. Debian's own unless another release is asked for.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The Nix of one Debian release.
#[derive(Debug, Clone)]
pub struct Nix {
    /// Its programs and libraries; the machine's own if there is none.
    rootfs: Option<PathBuf>,
    /// Whose `nix` is at `/nix`; nothing is there otherwise.
    root: Option<PathBuf>,
    /// More lines of `nix.conf`.
    config: String,
}

impl Nix {
    /// The one of this machine's release.
    pub fn own() -> Self {
        Self { rootfs: None, root: None, config: String::new() }
    }

    /// The one of another release, `trixie` or `sid`: downloaded once.
    pub fn of(release: &str) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("nix-version.sh");
        let rootfs = run(Command::new(script).arg(release))?;
        Ok(Self { rootfs: Some(rootfs.trim_end().into()), ..Self::own() })
    }

    /// The same with these lines of `nix.conf`.
    #[must_use]
    pub fn with_config(self, config: &str) -> Self {
        Self { config: config.to_owned(), ..self }
    }

    /// The same with `<root>/nix` at `/nix`.
    #[must_use]
    pub fn in_root(self, root: &Path) -> Self {
        Self { root: Some(root.to_owned()), ..self }
    }

    /// Runs one of its commands, or any other, where it cannot touch the machine's own `/nix`; gives back what it
    /// printed.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<String> {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/nix.sh"));
        command.args(args);
        if !self.config.is_empty() {
            command.env("NIX_SH_CONFIG", &self.config);
        }
        if let Some(root) = &self.root {
            command.env("NIX_SH_ROOT", root);
        }
        if let Some(rootfs) = &self.rootfs {
            command.env("NIX_SH_ROOTFS", rootfs);
        }
        run(&mut command)
    }

    /// Fails unless it finds every byte of the store under `root` as its database says.
    pub fn verify(&self, root: &Path) -> Result<()> {
        let root = root.to_str().context("a path of this test")?;
        self.run(["nix-store", "--store", root, "--verify", "--check-contents"]).map(drop)
    }
}

/// Runs a command of this machine's Nix; gives back what it printed.
pub fn nix<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<String> {
    Nix::own().run(args)
}

/// Fails unless this machine's Nix finds every byte of the store under `root` as its database says.
pub fn verify(root: &Path) -> Result<()> {
    Nix::own().verify(root)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{}", command.get_program().display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, text(&output.stderr));
    Ok(text(&output.stdout))
}
