//! What is on the disk, entry by entry.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// Every entry below `root`: kind, mode, size or target, owner and time, by its path. Names need not be UTF-8.
pub fn describe(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
        let what = if meta.is_symlink() {
            format!("-> {}", fs::read_link(&path)?.as_os_str().as_encoded_bytes().escape_ascii())
        } else if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
            format!("{:o}", meta.mode())
        } else {
            format!("{:o} {} bytes", meta.mode(), meta.len())
        };
        let (uid, gid, time) = (meta.uid(), meta.gid(), meta.mtime());
        found.insert(path.strip_prefix(root)?.to_owned(), format!("{what} {uid}:{gid} {time}"));
    }
    Ok(found)
}

/// Waits until nothing half done is left in the store under `root`, and no lock. What was broken off is deleted, and
/// locks are given back, beside other work.
pub fn wait_until_clean(root: &Path) -> Result<()> {
    let left = || -> Result<Vec<_>> {
        let mut left = Vec::new();
        for dir in ["staging", "trash", "nix/var/nix/temproots"] {
            for entry in
                fs::read_dir(root.join(dir)).with_context(|| format!("{dir} in {}", root.display()))?
            {
                left.push(entry?.path());
            }
        }
        for entry in fs::read_dir(root.join("nix/store"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "lock") {
                left.push(path);
            }
        }
        Ok(left)
    };
    let start = Instant::now();
    loop {
        let left = left()?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_mins(1), "left: {left:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
