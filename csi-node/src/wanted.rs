//! What a volume asks for: packages that it needs, and others that it can do without. Pure.

use nix_csi_store::StorePath;

use crate::substituter::FetchError;
use crate::view::ViewSpec;
use crate::volume::Optional;

/// What is to be at a volume's target, as far as it can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The view without anything optional.
    pub(crate) spec: ViewSpec,
    /// What comes behind its packages.
    pub(crate) optional: Vec<StorePath>,
}

impl Wanted {
    /// The view with these packages too.
    pub(crate) fn with<'a>(&self, optional: impl IntoIterator<Item = &'a StorePath>) -> ViewSpec {
        let mut spec = self.spec.clone();
        spec.packages.extend(optional.into_iter().cloned());
        spec
    }

    /// The view with all of it, which can be looked up without asking anybody.
    pub(crate) fn complete(&self) -> ViewSpec {
        self.with(&self.optional)
    }

    /// What a record says of it; nothing if nothing is optional.
    pub(crate) fn record(&self) -> Option<Optional> {
        (!self.optional.is_empty()).then(|| Optional {
            complete: self.complete().id().to_string(),
            paths: names(&self.optional),
            left_out: Vec::new(),
        })
    }

    /// The same as `found`, whatever could be had now: what a pod wrote lies over that view and no other.
    pub(crate) fn kept_as(self, found: &Optional) -> Self {
        let is_in = |path: &&StorePath| !found.left_out.iter().any(|name| name == path.base_name());
        Self { spec: self.with(self.optional.iter().filter(is_in)), optional: Vec::new() }
    }
}

/// The base names of paths, for a record.
pub(crate) fn names<'a>(paths: impl IntoIterator<Item = &'a StorePath>) -> Vec<String> {
    paths.into_iter().map(|path| path.base_name().to_owned()).collect()
}

/// Whether an optional path of which this is said is left out. What is wrong with this node is wrong with the volume:
/// nobody knows what the path would have been.
pub(crate) fn is_left_out(error: &FetchError) -> bool {
    match error {
        FetchError::NotFound { .. }
        | FetchError::Lookup { .. }
        | FetchError::Untrusted { .. }
        | FetchError::Download { .. }
        | FetchError::Decode { .. }
        | FetchError::Nar { .. }
        | FetchError::Size { .. }
        | FetchError::Hash { .. }
        | FetchError::ContentAddress { .. }
        | FetchError::Window { .. }
        | FetchError::OtherContent { .. }
        | FetchError::TooManyPaths { .. }
        | FetchError::TooManyBytes { .. } => true,
        FetchError::NoSpace { .. }
        | FetchError::Restore { .. }
        | FetchError::Staging(_)
        | FetchError::Register(_)
        | FetchError::Database(_)
        | FetchError::Provenance(_)
        | FetchError::Stopped => false,
        FetchError::Shared(error) => is_left_out(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(letter: &str) -> StorePath {
        StorePath::from_base_name(&format!("{}-x", letter.repeat(32))).unwrap()
    }

    #[test]
    fn a_volume_keeps_what_it_found() {
        let wanted = Wanted { spec: ViewSpec::of(vec![path("a")]), optional: vec![path("b"), path("c")] };
        let mut found = wanted.record().unwrap();
        assert_eq!(wanted.complete(), ViewSpec::of(vec![path("a"), path("b"), path("c")]));
        assert_eq!(wanted.clone().kept_as(&found).spec, wanted.complete());
        found.left_out = names([&path("b")]);
        let kept = wanted.kept_as(&found);
        assert_eq!(kept, Wanted { spec: ViewSpec::of(vec![path("a"), path("c")]), optional: Vec::new() });
        assert_eq!(kept.record(), None);
    }
}
