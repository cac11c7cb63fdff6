//! Container images of store paths, in a directory from which [`crate::registry`] serves them.
//!
//! ```text
//! blobs/<digest>      layers, configurations, manifests
//! manifests/<name>    the digest of the image of that name
//! ```

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use data_encoding::HEXLOWER;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix_csi_store::StorePath;
use serde_json::{Value, json};

/// The media type of what the digests of `manifests` name.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A layer: as it is sent, and its digest when it is unpacked.
#[derive(Clone)]
struct Layer {
    blob: Value,
    diff_id: String,
}

/// Images in the making. What was made already is not made again.
pub(crate) struct Images {
    dir: PathBuf,
    /// The store that the paths are taken from: the directory with `nix/store`.
    store: PathBuf,
    layers: HashMap<Vec<StorePath>, Layer>,
}

impl Images {
    pub(crate) fn new(dir: &Path, store: &Path) -> Result<Self> {
        for of in ["blobs", "manifests"] {
            fs::create_dir_all(dir.join(of))?;
        }
        Ok(Self { dir: dir.to_owned(), store: store.to_owned(), layers: HashMap::new() })
    }

    /// An image whose layers have these paths.
    pub(crate) fn add(&mut self, name: &str, layers: &[Vec<StorePath>]) -> Result<()> {
        let layers: Vec<_> = layers.iter().map(|paths| self.layer(paths)).collect::<Result<_>>()?;
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| layer.diff_id.as_str()).collect::<Vec<_>>(),
            },
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config,
            "layers": layers.into_iter().map(|layer| layer.blob).collect::<Vec<_>>(),
        });
        let manifest = self.blob(MANIFEST, &serde_json::to_vec(&manifest)?)?;
        let digest = manifest["digest"].as_str().unwrap_or_default();
        Ok(fs::write(self.dir.join("manifests").join(name), digest)?)
    }

    fn layer(&mut self, paths: &[StorePath]) -> Result<Layer> {
        if let Some(layer) = self.layers.get(paths) {
            return Ok(layer.clone());
        }
        let mut tar = Command::new("tar");
        tar.args([
            "--sort=name",
            "--mtime=@1",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "-cf",
            "-",
            "-C",
        ]);
        tar.arg(&self.store);
        tar.args(paths.iter().map(|path| format!("nix/store/{}", path.base_name())));
        let tar = tar.output()?;
        ensure!(tar.status.success(), "tar: {}", String::from_utf8_lossy(&tar.stderr));
        // As `docker push` sends them.
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&tar.stdout)?;
        let blob = self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip.finish()?)?;
        let layer = Layer { blob, diff_id: digest(&tar.stdout) };
        self.layers.insert(paths.to_vec(), layer.clone());
        Ok(layer)
    }

    /// Keeps `bytes`, and says what a manifest says of them.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        fs::write(self.dir.join("blobs").join(&digest), bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }
}

fn digest(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    format!("sha256:{}", HEXLOWER.encode(digest.as_ref()))
}
