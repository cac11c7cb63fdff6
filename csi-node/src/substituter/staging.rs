//! The directory of one fetch, which goes when the last one who may write into it is done.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::store::NodeStore;

/// Where the paths of one fetch are restored. Held by the fetch and by each restore thread that works for it:
/// a fetch that ends early must not have its directory deleted under a thread that still writes.
pub(super) struct Staging {
    store: Arc<NodeStore>,
    dir: PathBuf,
}

impl Staging {
    pub(super) fn create(store: Arc<NodeStore>) -> io::Result<Arc<Self>> {
        let dir = store.staging()?;
        Ok(Arc::new(Self { store, dir }))
    }

    /// The directory itself: for the first attempt at each path.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory in it, for another attempt: the thread of the one before may not have noticed its end.
    pub(super) fn again(&self, name: &str) -> io::Result<PathBuf> {
        let dir = self.dir.join(name);
        std::fs::create_dir(&dir)?;
        Ok(dir)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a fetch that went well it is empty.
        if std::fs::remove_dir(&self.dir).is_ok() || self.store.discard(&self.dir).is_err() {
            return;
        }
        let store = Arc::clone(&self.store);
        std::thread::spawn(move || store.empty_trash());
    }
}
