//! A cache of closures in sizes that the corpora do not have: small paths, made and signed here in a second.

use std::fmt::Write as _;

use anyhow::Result;
use nix_csi_e2e::nar_cache::{NarCache, Offer, sha256};
use nix_csi_store::StorePath;
use nix_csi_store::nar::NarWriter;

/// Files of each path, and bytes of each file.
const FILES: usize = 5;
const BYTES: usize = 1500;

/// A closure of `paths` paths, added to `cache`: its root, which refers to all the others.
pub(crate) fn add_closure(cache: &NarCache, paths: usize) -> Result<StorePath> {
    let mut made = Vec::with_capacity(paths);
    for n in 0..paths {
        let is_root = n + 1 == paths;
        // The others refer to two before them, as packages refer to libraries.
        let references: Vec<StorePath> = if is_root {
            made.clone()
        } else {
            let mut references: Vec<_> =
                [n / 2, n / 3].iter().filter_map(|n| made.get(*n).cloned()).collect();
            references.dedup();
            references
        };
        let name = format!("of-{paths}-{n}");
        let nar = nar(&name)?;
        let hash = sha256(&nar);
        let mut references = references;
        references.sort();
        made.push(cache.offer(&Offer {
            name: &name,
            compression: "none",
            file: &nar,
            nar_hash: hash,
            nar_size: nar.len() as u64,
            references: &references,
        })?);
    }
    made.pop().ok_or_else(|| anyhow::anyhow!("a closure of no paths"))
}

/// `bin/<name>` and four more files.
fn nar(name: &str) -> Result<Vec<u8>> {
    let mut nar = NarWriter::new(Vec::new())?;
    nar.directory()?;
    for (dir, files) in [("bin", 1), ("share", FILES - 1)] {
        nar.entry(dir.as_bytes())?;
        nar.directory()?;
        for n in 0..files {
            nar.entry(format!("{name}-{n}").as_bytes())?;
            let mut contents = String::with_capacity(BYTES);
            while contents.len() < BYTES {
                writeln!(contents, "This is file {n} of {name}.")?;
            }
            nar.file(dir == "bin", contents.len() as u64)?;
            nar.data(contents.as_bytes())?;
            nar.file_end()?;
            nar.entry_end()?;
        }
        nar.directory_end()?;
        nar.entry_end()?;
    }
    nar.directory_end()?;
    Ok(nar.into_inner())
}
