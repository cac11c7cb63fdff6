//! A corpus, as `corpora.sh` wrote it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix_csi_store::{NarInfo, StorePath};

/// One closure in one binary cache.
pub(crate) struct Corpus {
    /// The cache.
    pub(crate) dir: PathBuf,
    /// The cache below the directory that is served.
    pub(crate) url_path: String,
    /// The store paths to ask for.
    pub(crate) roots: Vec<StorePath>,
    /// The key they are signed with.
    pub(crate) public_key: String,
    /// What is fetched at the same time, where that is measured.
    pub(crate) beside: Option<Box<Self>>,
}

impl Corpus {
    pub(crate) fn open(corpora: &Path, name: &str, compression: &str) -> Result<Self> {
        let of = corpora.join(name);
        let own_key = of.join("public-key");
        let key = if own_key.exists() { own_key } else { corpora.join("public-key") };
        Ok(Self {
            dir: of.join(compression),
            url_path: format!("{name}/{compression}"),
            roots: read(&of.join("root"))?.lines().map(str::parse).collect::<Result<_, _>>()?,
            public_key: read(&key)?.trim().to_owned(),
            beside: None,
        })
    }

    /// The one store path to ask for.
    pub(crate) fn root(&self) -> Result<&StorePath> {
        self.roots.first().context("a corpus without roots")
    }

    /// Whose narinfos and NARs a fetch gets: the roots and all that they refer to.
    pub(crate) fn closure(&self) -> Result<Vec<NarInfo>> {
        let mut found = BTreeMap::new();
        let mut todo = self.roots.clone();
        while let Some(path) = todo.pop() {
            if found.contains_key(&path) {
                continue;
            }
            let name = path.base_name();
            let hash = name.split('-').next().context("a store path without a hash")?;
            let info: NarInfo = read(&self.dir.join(format!("{hash}.narinfo")))?.parse()?;
            todo.extend(info.references.iter().cloned());
            found.insert(path, info);
        }
        Ok(found.into_values().collect())
    }

    /// Reads the NARs once, so that the first round does not read them from a disk.
    pub(crate) fn warm(&self) -> Result<()> {
        for info in self.closure()? {
            std::io::copy(&mut fs::File::open(self.dir.join(&info.url))?, &mut std::io::sink())?;
        }
        Ok(())
    }
}

/// Options for caches, each with its key.
pub(crate) fn nix_conf(caches: &[(String, String)]) -> String {
    let of = |which: fn(&(String, String)) -> &str| caches.iter().map(which).collect::<Vec<_>>().join(" ");
    let (urls, keys) = (of(|(url, _)| url), of(|(_, key)| key));
    // How full the file system is must not matter.
    format!("substituters = {urls}\ntrusted-public-keys = {keys}\nrequire-sigs = true\nmin-free = 0\n")
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
