//! Real Nix, as the judge of what was written.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Runs a Nix command where it cannot touch the machine's own `/nix`; gives back what it printed.
pub fn nix<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/nix.sh");
    let output = Command::new(script).args(args).output().context("e2e/fixtures/nix.sh")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "nix: {}: {}", output.status, text(&output.stderr));
    Ok(text(&output.stdout))
}

/// Fails unless Nix finds every byte of the store under `root` as its database says.
pub fn verify(root: &Path) -> Result<()> {
    let root = root.to_str().context("a path of this test")?;
    nix(["nix-store", "--store", root, "--verify", "--check-contents"]).map(drop)
}
