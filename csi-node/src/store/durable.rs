//! What a power cut cannot take any more.
//!
//! Nobody waits for the disk: a path may be used as soon as it is registered. The file `durable` says how far the
//! disk has come: in which boot, and up to which row of the database everything was synced. In the same boot
//! nothing can be lost, whoever is killed. In another one, every path beyond that row is hashed again before it is
//! used. Without the file nothing counts as synced.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::boot_id;
use crate::fault;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    boot: String,
    /// The largest id of `ValidPaths` that was committed before a sync that went well.
    row: i64,
    /// A sync failed in this boot. The kernel tells that once, and not to whoever asks later.
    #[serde(default)]
    is_broken: bool,
}

/// The mark of one store.
pub(super) struct Durable {
    file: PathBuf,
    /// Opened once: an error of writing back is told once to each open file, and must not be missed.
    root: File,
    state: Mutex<State>,
}

struct State {
    row: i64,
    /// The file says this boot.
    is_current: bool,
    /// An error of writing back: what was lost is not known, so nothing more counts as synced in this boot.
    is_broken: bool,
}

/// What is known when a store is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// The same boot: the page cache has everything, synced or not.
    SameBoot,
    /// Another boot: only what is not beyond this row is surely there.
    UpTo(i64),
}

impl Durable {
    pub(super) fn open(root: &std::path::Path) -> io::Result<(Self, Known)> {
        let file = root.join("durable");
        let mark: Option<Mark> = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let row = mark.as_ref().map_or(0, |mark| mark.row);
        let boot = boot_id()?;
        let same = mark.filter(|mark| mark.boot == boot);
        let known = if same.is_some() { Known::SameBoot } else { Known::UpTo(row) };
        let is_broken = same.is_some_and(|mark| mark.is_broken);
        let state = Mutex::new(State { row, is_current: known == Known::SameBoot, is_broken });
        Ok((Self { file, root: File::open(root)?, state }, known))
    }

    /// Syncs the filesystem, and remembers that all rows up to `row` were committed before.
    pub(super) fn sync(&self, row: i64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_broken {
            return Err(io::Error::other(
                "an earlier sync failed; what was fetched since then is checked after the next boot",
            ));
        }
        if let Err(error) = rustix::fs::syncfs(&self.root) {
            state.is_broken = true;
            self.write(&Mark { boot: boot_id()?, row: state.row, is_broken: true })?;
            return Err(error.into());
        }
        fault::point("sync.synced");
        let row = row.max(state.row);
        self.write(&Mark { boot: boot_id()?, row, is_broken: false })?;
        fault::point("sync.marked");
        (state.row, state.is_current) = (row, true);
        Ok(())
    }

    /// Remembers this boot for a store without a row, which has nothing to sync.
    pub(super) fn begin(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&Mark { boot: boot_id()?, row: 0, is_broken: false })?;
        (state.row, state.is_current) = (0, true);
        Ok(())
    }

    fn write(&self, mark: &Mark) -> io::Result<()> {
        let beside = self.file.with_extension("new");
        let mut new = File::create(&beside)?;
        new.write_all(&serde_json::to_vec(mark)?)?;
        new.sync_all()?;
        fs::rename(&beside, &self.file)?;
        // The rename itself.
        self.root.sync_all()
    }

    /// Whether all rows up to `row` are synced, and the file says so of this boot.
    pub(super) fn covers(&self, row: i64) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_current && state.row >= row
    }
}
