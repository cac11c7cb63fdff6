//! Small filesystems of a test's own, so that a disk can be full. To be mounted in a mount namespace that ends with
//! the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

/// A mounted filesystem, unmounted and deleted with the value.
pub struct SmallFs {
    at: PathBuf,
    // After the unmounting: deleting it must not descend.
    _dir: TempDir,
}

/// What a filesystem has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

impl SmallFs {
    /// A tmpfs. There each link takes an inode too.
    pub fn tmpfs(bytes: u64, inodes: Option<u64>) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Zero means no limit.
        let options = format!("size={bytes},nr_inodes={},mode=755", inodes.unwrap_or_default());
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()))?;
        Ok(Self { at: dir.path().to_owned(), _dir: dir })
    }

    /// An ext4 with a journal, in a file.
    pub fn ext4(bytes: u64, inodes: Option<u64>) -> Result<Self> {
        Self::made(bytes, inodes, &["-O", "has_journal"], "loop")
    }

    /// The same, with quotas of projects; `None` if this kernel has none.
    pub fn ext4_with_quotas(bytes: u64) -> Result<Option<Self>> {
        let features = ["-O", "has_journal,quota,project", "-E", "quotatype=prjquota"];
        match Self::made(bytes, None, &features, "loop,prjquota") {
            Ok(made) => Ok(Some(made)),
            // Built without CONFIG_QFMT_V2, it says so in its log and here nothing but that.
            Err(error) if error.to_string().contains("wrong fs type, bad option") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn made(bytes: u64, inodes: Option<u64>, features: &[&str], options: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (image, at) = (dir.path().join("image"), dir.path().join("fs"));
        File::create(&image)?.set_len(bytes)?;
        fs::create_dir(&at)?;
        let mut make = Command::new("mkfs.ext4");
        make.args(["-q", "-F", "-m", "0"]).args(features);
        if let Some(inodes) = inodes {
            make.args(["-N", &inodes.to_string()]);
        }
        run(make.arg(&image))?;
        run(Command::new("mount").args(["-o", options]).args([&image, &at]))?;
        Ok(Self { at, _dir: dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// What is left.
    pub fn free(&self) -> Result<Free> {
        let stat = rustix::fs::statvfs(&self.at)?;
        Ok(Free { bytes: stat.f_bavail.saturating_mul(stat.f_frsize), inodes: stat.f_favail })
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // Lazily: a thread that empties the trash may still be there.
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{}", command.get_program().display()))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
