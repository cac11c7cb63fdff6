//! `/nix/var/result`: one package as it is, several merged the way `buildEnv` does it.
//!
//! Directories that more than one package has become directories; everything else is a link to the first
//! package that has it. So the order of the packages decides, and nothing depends on the system's. What packages
//! propagate (`nix-support/propagated-user-env-packages`) comes behind all of them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use nix_csi_store::StorePath;

use super::ViewError;
use super::inside::Inside;
use crate::path_error::PathError;

/// As many as fit into an event.
const SHOWN: usize = 5;
/// Far more than any list of packages.
const LONGEST_LIST: u64 = 64 * 1024;

/// Files that more than one package has, with other contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Collisions {
    /// How many.
    pub(crate) count: usize,
    /// The first of them: below `result`, whose was taken, and whose was not.
    pub(crate) first: Vec<(PathBuf, PathBuf, PathBuf)>,
}

impl Collisions {
    fn add(&mut self, at: &Path, taken: &Path, left: &Path) {
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push((at.into(), taken.into(), left.into()));
        }
    }
}

/// What some package has: as a pod will see it, and where it is now, if it leads anywhere.
struct Source {
    logical: PathBuf,
    physical: Option<PathBuf>,
    /// Of a package that nobody named: nobody needs to hear that others win.
    is_propagated: bool,
}

impl Source {
    fn new(inside: &Inside<'_>, logical: PathBuf, is_propagated: bool) -> Self {
        let physical = inside.resolve(&logical);
        Self { logical, physical, is_propagated }
    }

    fn is_dir(&self) -> bool {
        self.physical.as_ref().is_some_and(|physical| physical.is_dir())
    }

    /// Whether it makes no difference which of them is taken.
    fn is_same(&self, other: &Self) -> bool {
        let (Some(one), Some(other)) = (&self.physical, &other.physical) else { return false };
        one == other || have_same_content(one, other).unwrap_or(false)
    }
}

/// Makes `result` out of the packages.
pub(super) fn build(
    inside: &Inside<'_>,
    packages: &[StorePath],
    result: &Path,
) -> Result<Collisions, ViewError> {
    let propagated = propagated(inside, packages);
    let mut collisions = Collisions::default();
    if let ([package], []) = (packages, &propagated[..]) {
        link(Path::new(&package.to_string()), result)?;
        return Ok(collisions);
    }
    let named = packages.iter().map(|package| (package, false));
    let all = named.chain(propagated.iter().map(|package| (package, true)));
    let sources = all.map(|(package, is)| Source::new(inside, PathBuf::from(package.to_string()), is));
    // A package that is a file has nothing to merge.
    let sources = sources.filter(Source::is_dir).collect();
    merge(inside, sources, result, Path::new(""), &mut collisions)?;
    Ok(collisions)
}

/// What `packages` want to have beside them, and what that wants, each once and none of `packages`.
fn propagated(inside: &Inside<'_>, packages: &[StorePath]) -> Vec<StorePath> {
    let mut seen: HashSet<_> = packages.iter().cloned().collect();
    let (mut found, mut level) = (Vec::new(), packages.to_vec());
    while !level.is_empty() {
        let next: BTreeSet<_> = level.iter().flat_map(|package| wanted_by(inside, package)).collect();
        level = next.into_iter().filter(|package| seen.insert(package.clone())).collect();
        found.extend(level.iter().cloned());
    }
    found
}

fn wanted_by(inside: &Inside<'_>, package: &StorePath) -> Vec<StorePath> {
    let list = PathBuf::from(package.to_string()).join("nix-support/propagated-user-env-packages");
    let read = || {
        let mut text = String::new();
        let file = File::open(inside.resolve(&list)?).ok()?;
        file.take(LONGEST_LIST).read_to_string(&mut text).ok()?;
        Some(text)
    };
    let text = read().unwrap_or_default();
    text.split_whitespace().filter_map(|path| path.parse().ok()).collect()
}

fn merge(
    inside: &Inside<'_>,
    sources: Vec<Source>,
    target: &Path,
    at: &Path,
    collisions: &mut Collisions,
) -> Result<(), ViewError> {
    fs::create_dir(target).map_err(PathError::on("create", target))?;
    let mut entries: BTreeMap<OsString, Vec<(PathBuf, bool)>> = BTreeMap::new();
    for source in sources {
        let Some(physical) = source.physical else { continue };
        for entry in fs::read_dir(&physical).map_err(PathError::on("read", &physical))? {
            let name = entry.map_err(PathError::on("read", &physical))?.file_name();
            let logical = source.logical.join(&name);
            entries.entry(name).or_default().push((logical, source.is_propagated));
        }
    }
    for (name, all) in entries {
        let (target, at) = (target.join(&name), at.join(&name));
        if is_left_out(&at) {
            continue;
        }
        if let [(only, _)] = &all[..] {
            link(only, &target)?;
            continue;
        }
        let mut all = all.into_iter().map(|(logical, is)| Source::new(inside, logical, is));
        let Some(first) = all.next() else { continue };
        let is_dir = first.is_dir();
        // Directories are merged into directories; of all else the first one is taken.
        let (merged, others): (Vec<_>, Vec<_>) = all.partition(|source| is_dir && source.is_dir());
        for other in others.iter().filter(|other| !other.is_propagated && !other.is_same(&first)) {
            collisions.add(&at, &first.logical, &other.logical);
        }
        let merged: Vec<_> = merged.into_iter().filter(|other| other.physical != first.physical).collect();
        if merged.is_empty() {
            link(&first.logical, &target)?;
        } else {
            let sources = std::iter::once(first).chain(merged).collect();
            merge(inside, sources, &target, &at, collisions)?;
        }
    }
    Ok(())
}

/// What is made of all packages of a system together, or is about one package: `buildEnv` leaves it out, too.
fn is_left_out(at: &Path) -> bool {
    let is_named = |name: &str| at.file_name().is_some_and(|found| found == name);
    at == Path::new("nix-support")
        || at == Path::new("propagated-build-inputs")
        || at.ends_with("info/dir")
        || (at.parent() == Some(Path::new("share/mime")) && !is_named("packages"))
        || is_named("perllocal.pod")
        || is_named("log")
}

/// Whether two files have the same bytes, and may be run alike.
fn have_same_content(one: &Path, other: &Path) -> io::Result<bool> {
    const PIECE: usize = 64 * 1024;
    let (of_one, of_other) = (fs::metadata(one)?, fs::metadata(other)?);
    if (of_one.dev(), of_one.ino()) == (of_other.dev(), of_other.ino()) {
        return Ok(true);
    }
    if !of_one.is_file() || !of_other.is_file() || of_one.len() != of_other.len() {
        return Ok(false);
    }
    if (of_one.mode() ^ of_other.mode()) & 0o111 != 0 {
        return Ok(false);
    }
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let mut rest = of_one.len();
    while rest > 0 {
        let piece = usize::try_from(rest).map_or(PIECE, |rest| rest.min(PIECE));
        one.read_exact(&mut left[..piece])?;
        other.read_exact(&mut right[..piece])?;
        if left[..piece] != right[..piece] {
            return Ok(false);
        }
        rest -= piece as u64;
    }
    Ok(true)
}

fn link(to: &Path, at: &Path) -> Result<(), ViewError> {
    Ok(symlink(to, at).map_err(PathError::on("link", at))?)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::store::{Layout, NodeStore};

    const LIST: &str = "nix-support/propagated-user-env-packages";

    /// A store with packages that are nothing but files, and their profile.
    struct Packages {
        root: tempfile::TempDir,
        paths: Vec<StorePath>,
    }

    impl Packages {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            drop(NodeStore::open(root.path()).unwrap());
            Self { root, paths: Vec::new() }
        }

        /// A package with these files, named by a letter.
        fn add(&mut self, letter: &str, files: &[(&str, &str)]) -> StorePath {
            let path = StorePath::from_base_name(&format!("{}-{letter}", letter.repeat(32))).unwrap();
            let at = self.root.path().join("nix/store").join(path.base_name());
            fs::create_dir(&at).unwrap();
            for (name, text) in files {
                let at = at.join(name);
                fs::create_dir_all(at.parent().unwrap()).unwrap();
                match text.strip_prefix("-> ") {
                    Some(target) => symlink(target, at).unwrap(),
                    None => fs::write(at, text).unwrap(),
                }
            }
            self.paths.push(path.clone());
            path
        }

        /// The profile: every file and link with what it leads to, by the first letter of the package, and what
        /// collides.
        fn merged(&self, packages: &[StorePath]) -> (BTreeMap<String, String>, Collisions) {
            let mut closure = self.paths.clone();
            closure.sort();
            let store = NodeStore::open(self.root.path()).unwrap();
            let layout: &Layout = store.layout();
            let inside = Inside::new(layout, &closure).unwrap();
            let result = self.root.path().join("result");
            let _ = (fs::remove_dir_all(&result), fs::remove_file(&result));
            let collisions = build(&inside, packages, &result).unwrap();
            let (mut found, mut open) = (BTreeMap::new(), vec![result.clone()]);
            while let Some(at) = open.pop() {
                if let Ok(target) = fs::read_link(&at) {
                    let name = at.strip_prefix(&result).unwrap().display().to_string();
                    let whose = target.to_str().unwrap()["/nix/store/".len()..][..1].to_owned();
                    found.insert(name, whose);
                } else {
                    open.extend(fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().path()));
                }
            }
            (found, collisions)
        }
    }

    fn map(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter().map(|(at, whose)| ((*at).to_owned(), (*whose).to_owned())).collect()
    }

    #[test]
    fn directories_are_merged_and_the_first_file_wins() {
        let mut packages = Packages::new();
        let a = packages.add("a", &[("bin/x", "of a"), ("bin/same", "s"), ("share/doc/a", ""), ("only", "")]);
        let b = packages.add("b", &[("bin/x", "of b"), ("bin/same", "s"), ("share/doc/b", "")]);
        let (found, collisions) = packages.merged(&[a.clone(), b.clone()]);
        let expected = map(&[
            ("bin/x", "a"),
            ("bin/same", "a"),
            ("only", "a"),
            ("share/doc/a", "a"),
            ("share/doc/b", "b"),
        ]);
        assert_eq!(found, expected);
        // The same bytes are no collision.
        let (one, other) = (format!("{a}/bin/x").into(), format!("{b}/bin/x").into());
        assert_eq!(collisions, Collisions { count: 1, first: vec![("bin/x".into(), one, other)] });
        // The order decides, nothing else.
        let (found, _) = packages.merged(&[b, a.clone()]);
        assert_eq!(found["bin/x"], "b");
        assert_eq!(packages.merged(&[a]).0, map(&[("", "a")]), "one is not merged");
    }

    #[rstest]
    #[case::file_first("a", "b", &[("x", "a")])]
    #[case::directory_first("b", "a", &[("x", "b")])]
    fn a_file_and_a_directory_collide(
        #[case] first: &str,
        #[case] second: &str,
        #[case] expected: &[(&str, &str)],
    ) {
        let mut packages = Packages::new();
        packages.add("a", &[("x", "file")]);
        packages.add("b", &[("x/in", "directory")]);
        let of = |letter: &str| packages.paths.iter().find(|path| path.name() == letter).unwrap().clone();
        let (found, collisions) = packages.merged(&[of(first), of(second)]);
        assert_eq!((found, collisions.count), (map(expected), 1));
    }

    #[test]
    fn what_comes_behind_a_collision_is_merged_all_the_same() {
        let mut packages = Packages::new();
        let a = packages.add("a", &[("x/a", "")]);
        let b = packages.add("b", &[("x", "file")]);
        let c = packages.add("c", &[("x/c", "")]);
        let (found, collisions) = packages.merged(&[a, b, c]);
        assert_eq!((found, collisions.count), (map(&[("x/a", "a"), ("x/c", "c")]), 1));
    }

    #[test]
    fn links_are_followed_within_the_closure() {
        let mut packages = Packages::new();
        let a = packages.add("a", &[("lib/a", ""), ("x", "-> /nowhere")]);
        let b = packages.add("b", &[("lib", "-> lib64"), ("lib64/b", ""), ("x", "of b")]);
        let c = packages.add("c", &[("lib", &format!("-> {a}/lib"))]);
        let (found, collisions) = packages.merged(&[a.clone(), b, c.clone()]);
        assert_eq!(found, map(&[("lib/a", "a"), ("lib/b", "b"), ("lib64", "b"), ("x", "a")]));
        assert_eq!(collisions.count, 1, "of x, which leads nowhere: {collisions:?}");
        // Two names of one directory are one directory.
        assert_eq!(packages.merged(&[a, c]).0, map(&[("lib", "a"), ("x", "a")]));
    }

    #[test]
    fn what_is_propagated_comes_last_and_in_silence() {
        let mut packages = Packages::new();
        let list = |of: &[&StorePath]| of.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n ");
        let d = packages.add("d", &[("bin/d", ""), ("bin/x", "of d")]);
        let c = packages.add("c", &[("bin/c", ""), ("bin/x", "of c"), (LIST, &list(&[&d]))]);
        let outside = StorePath::from_base_name(&format!("{}-z", "z".repeat(32))).unwrap();
        let a = packages.add("a", &[("bin/a", ""), (LIST, &list(&[&c, &outside]))]);
        let b = packages.add("b", &[("bin/x", "of b"), (LIST, &list(&[&a, &d]))]);
        let (found, collisions) = packages.merged(&[a.clone(), b]);
        assert_eq!(found, map(&[("bin/a", "a"), ("bin/c", "c"), ("bin/d", "d"), ("bin/x", "b")]));
        assert_eq!(collisions, Collisions::default());
        let (found, _) = packages.merged(&[a]);
        assert_eq!(found, map(&[("bin/a", "a"), ("bin/c", "c"), ("bin/d", "d"), ("bin/x", "c")]));
    }

    #[rstest]
    #[case("nix-support", true)]
    #[case("share/nix-support", false)]
    #[case("propagated-build-inputs", true)]
    #[case("share/info/dir", true)]
    #[case("share/mime/mime.cache", true)]
    #[case("share/mime/packages", false)]
    #[case("share/mime", false)]
    #[case("lib/perl5/perllocal.pod", true)]
    #[case("share/log", true)]
    #[case("share/logs", false)]
    fn what_no_profile_has(#[case] at: &str, #[case] expected: bool) {
        assert_eq!(is_left_out(Path::new(at)), expected);
    }
}
