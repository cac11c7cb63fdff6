//! What is expected of a fetch that must not succeed.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix_csi_node::substituter::{Closure, FetchError, Substituter};

use crate::{Fixture, tree};

/// An error with all its causes, as a person reads it.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The error of `fetched`, which must have these parts and name a path of `fixture`; nothing of it is valid, and
/// nothing is left in the store under `root`.
pub fn refusal(
    substituter: &Substituter,
    root: &Path,
    fixture: &Fixture,
    fetched: Result<Closure, FetchError>,
    parts: &[&str],
) -> Result<FetchError> {
    let error = fetched.err().with_context(|| format!("{} arrived", fixture.path))?;
    let text = chain(&error);
    for part in parts {
        ensure!(text.contains(part), "{part:?} is not in: {text}");
    }
    let is_named = fixture.closure.iter().any(|path| text.contains(&path.to_string()));
    ensure!(is_named, "no path of {} is in: {text}", fixture.path);
    tree::wait_until_clean(root)?;
    let valid = substituter.store().closure(std::slice::from_ref(&fixture.path))?;
    ensure!(valid.is_none(), "{} is valid", fixture.path);
    Ok(error)
}
