//! Nix's own database of a view, for pods that run Nix: exactly the closure, as if it were all of a store.

use std::fs;
use std::path::Path;

use nix_csi_proto::volume::Database;
use nix_csi_store::StorePath;

use super::ViewError;
use crate::path_error::PathError;
use crate::store::NodeStore;

/// Names of packages that have a Nix in them.
const NIXES: [&str; 3] = ["nix-", "lix-", "determinate-nix-"];

/// Whether a view over `closure` gets a database.
pub(super) fn is_wanted(store: &NodeStore, asked: Database, closure: &[StorePath]) -> bool {
    match asked {
        Database::Always => true,
        Database::Never => false,
        // Documentation and libraries of Nix are called so too.
        Database::WithNix => closure.iter().any(|path| {
            let named = NIXES.iter().any(|name| path.name().starts_with(name));
            named && store.layout().physical(path).join("bin/nix-store").exists()
        }),
    }
}

/// Writes the database into the view `at`, and makes what Nix makes when it opens a store: where nothing can be
/// written, it must be there.
pub(super) fn write(store: &NodeStore, closure: &[StorePath], at: &Path) -> Result<(), ViewError> {
    let state = at.join("var/nix");
    let dirs = ["db", "gcroots/auto", "gcroots/per-user", "profiles/per-user", "temproots"];
    for dir in dirs.map(|dir| state.join(dir)).into_iter().chain([at.join("store/.links")]) {
        fs::create_dir_all(&dir).map_err(PathError::on("create", &dir))?;
    }
    store.export_database(closure, &state.join("db")).map_err(ViewError::Database)
}
