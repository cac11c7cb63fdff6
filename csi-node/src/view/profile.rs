//! `/nix/var/result`: one package as it is, several merged the way `buildEnv` does it.
//!
//! Directories that more than one package has become directories; everything else is a link to the first
//! package that has it. So the order of the packages decides, and nothing depends on the system's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;

use super::ViewError;
use super::inside::Inside;
use crate::path_error::PathError;

/// A directory of some package: as a pod will see it, and where it is now.
struct Source {
    logical: PathBuf,
    physical: PathBuf,
}

/// Makes `result` out of the packages.
pub(super) fn build(inside: &Inside<'_>, packages: &[StorePath], result: &Path) -> Result<(), ViewError> {
    if let [package] = packages {
        return link(Path::new(&package.to_string()), result);
    }
    let packages = packages.iter().map(|path| PathBuf::from(path.to_string())).collect();
    // A package that is a file has nothing to merge.
    merge(inside, directories(inside, packages), result)
}

/// Those that are directories, or lead to one.
fn directories(inside: &Inside<'_>, logical: Vec<PathBuf>) -> Vec<Source> {
    let source = |logical: PathBuf| {
        let physical = inside.resolve(&logical).filter(|physical| physical.is_dir())?;
        Some(Source { logical, physical })
    };
    logical.into_iter().filter_map(source).collect()
}

fn merge(inside: &Inside<'_>, sources: Vec<Source>, target: &Path) -> Result<(), ViewError> {
    fs::create_dir(target).map_err(PathError::on("create", target))?;
    let mut entries: BTreeMap<OsString, Vec<PathBuf>> = BTreeMap::new();
    for source in sources {
        for entry in fs::read_dir(&source.physical).map_err(PathError::on("read", &source.physical))? {
            let name = entry.map_err(PathError::on("read", &source.physical))?.file_name();
            let logical = source.logical.join(&name);
            entries.entry(name).or_default().push(logical);
        }
    }
    for (name, all) in entries {
        let target = target.join(&name);
        let count = all.len();
        let first = all[0].clone();
        let sources = if count > 1 { directories(inside, all) } else { Vec::new() };
        if count > 1 && sources.len() == count {
            merge(inside, sources, &target)?;
            continue;
        }
        if count > 1 {
            tracing::warn!(used = %first.display(), others = count - 1, "several packages have this file");
        }
        link(&first, &target)?;
    }
    Ok(())
}

fn link(to: &Path, at: &Path) -> Result<(), ViewError> {
    Ok(symlink(to, at).map_err(PathError::on("link", at))?)
}
