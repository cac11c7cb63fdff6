//! The package fixtures: closures that real Nix built, in signed caches. See `e2e/fixtures/README.md`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix_csi_store::StorePath;

/// One package of the fixtures.
#[derive(Debug, Clone)]
pub struct Fixture {
    /// Its store path.
    pub path: StorePath,
    /// All that it refers to, with itself, sorted.
    pub closure: Vec<StorePath>,
}

/// The directory that `e2e/fixtures/build.sh` prints.
#[derive(Debug, Clone)]
pub struct Fixtures {
    dir: PathBuf,
    paths: serde_json::Value,
}

impl Fixtures {
    /// From `NIX_CSI_FIXTURES`.
    pub fn find() -> Result<Self> {
        let dir = std::env::var_os("NIX_CSI_FIXTURES").context(
            "NIX_CSI_FIXTURES is not set: run these tests by `make kernel` or `make cluster-tests`",
        )?;
        let dir = PathBuf::from(dir);
        let text =
            fs::read(dir.join("paths.json")).with_context(|| format!("fixtures in {}", dir.display()))?;
        Ok(Self { paths: serde_json::from_slice(&text)?, dir })
    }

    /// The fixture of that name.
    pub fn get(&self, name: &str) -> Result<Fixture> {
        let of = &self.paths[name];
        let path = |value: &serde_json::Value| -> Result<StorePath> {
            Ok(value.as_str().with_context(|| format!("no fixture {name}"))?.parse()?)
        };
        let closure = of["closure"].as_array().into_iter().flatten().map(path).collect::<Result<_>>()?;
        Ok(Fixture { path: path(&of["path"])?, closure })
    }

    /// The names of all that can be fetched, from either of the zstd and xz caches.
    pub fn good(&self) -> Vec<String> {
        let all = self.paths.as_object().into_iter().flatten();
        all.filter(|(_, fixture)| fixture["bad"] != true && fixture["special"] != true)
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// The binary cache of one compression, as a directory.
    pub fn cache(&self, compression: &str) -> PathBuf {
        self.dir.join("caches").join(compression)
    }

    /// The store that real Nix wrote.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// The public key that the good ones are signed with.
    pub fn public_key(&self) -> Result<String> {
        let path: &Path = &self.dir.join("keys/nix-csi-test-1.pub");
        Ok(fs::read_to_string(path)?.trim().to_owned())
    }
}
