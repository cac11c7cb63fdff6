//! Who may see which view.
//!
//! A path that a cache gave for a volume's own credentials only is private. A pod of a namespace may see it when
//! the same cache gave it to that namespace, or when a cache gives it for the credentials of the pod's volume; so
//! what is on the node already is worth no more than what could be fetched. Whoever may not see it is told what a node
//! without it would say.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use nix_csi_store::StorePath;

use crate::store::NodeStore;
use crate::substituter::{Closure, FetchError, Substituter};
use crate::view::ViewId;

/// More views than this are not kept in mind.
const MANY_VIEWS: usize = 10_000;

/// Which namespaces may see which views, as far as it was asked since the driver started.
#[derive(Clone, Default)]
pub(crate) struct Tenants(Arc<Mutex<HashMap<String, HashSet<String>>>>);

impl Tenants {
    /// Whether it is known that pods of `namespace` may see `view`.
    pub(crate) fn may_see(&self, namespace: &str, view: &ViewId) -> bool {
        let allowed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        allowed.get(view.as_str()).is_some_and(|namespaces| namespaces.contains(namespace))
    }

    /// From now on it is known.
    pub(crate) fn allow(&self, namespace: &str, view: &ViewId) {
        let mut allowed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if allowed.len() >= MANY_VIEWS {
            allowed.clear();
        }
        allowed.entry(view.to_string()).or_default().insert(namespace.to_owned());
    }

    /// The view is going, or built anew: who may see it is to be asked again.
    pub(crate) fn forget(&self, view: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(view);
    }
}

/// Makes sure that pods of `namespace` may see all of `closure`, by asking the caches for what is private to others.
/// `substituter` has the credentials of the pod's volume, and has just fetched what `closure` says.
pub(crate) async fn authorize(
    store: &Arc<NodeStore>,
    substituter: &Substituter,
    namespace: &str,
    roots: &[StorePath],
    closure: &Arc<Closure>,
) -> Result<(), FetchError> {
    let asked = Arc::clone(closure);
    let denied = on(store, namespace, move |store, namespace| {
        let denied = store.denied(namespace, &asked.paths)?;
        // What has just come for these credentials needs no second question.
        let (here, others): (Vec<_>, Vec<_>) =
            denied.into_iter().partition(|path| asked.fetched.contains(path));
        store.grant(namespace, &here)?;
        Ok(others)
    })
    .await?;
    let mut denied: HashSet<_> = denied.into_iter().collect();
    // From the roots on: the name of a path is said only to those who may see one that refers to it.
    let mut seen = HashSet::new();
    let mut level = roots.to_vec();
    while !denied.is_empty() && !level.is_empty() {
        let ask: Vec<_> = level.iter().filter(|path| denied.remove(*path)).cloned().collect();
        let proved = substituter.prove(&ask).await?;
        seen.extend(level.iter().cloned());
        let next = on(store, namespace, move |store, namespace| {
            let private = proved.iter().filter(|(_, origin)| origin.private);
            store.grant(namespace, &private.map(|(path, _)| path.clone()).collect::<Vec<_>>())?;
            store.make_public(proved.iter().map(|(path, origin)| (path, origin)))?;
            Ok(store.references(&level)?)
        })
        .await?;
        level = next.into_iter().filter(|path| !seen.contains(path)).collect();
    }
    // What no root leads to any more was changed by hand meanwhile.
    if denied.is_empty() { Ok(()) } else { Err(FetchError::Stopped) }
}

async fn on<T: Send + 'static>(
    store: &Arc<NodeStore>,
    namespace: &str,
    work: impl FnOnce(&NodeStore, &str) -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    let (store, namespace) = (Arc::clone(store), namespace.to_owned());
    tokio::task::spawn_blocking(move || work(&store, &namespace)).await.map_err(|_| FetchError::Stopped)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ViewSpec;

    #[test]
    fn a_view_that_is_built_anew_is_asked_for_anew() {
        let path = StorePath::from_base_name(&format!("{}-x", "a".repeat(32))).unwrap();
        let view = ViewSpec::of(vec![path]).id();
        let tenants = Tenants::default();
        assert!(!tenants.may_see("a", &view));
        tenants.allow("a", &view);
        assert!(tenants.may_see("a", &view) && !tenants.may_see("b", &view));
        tenants.forget(view.as_str());
        assert!(!tenants.may_see("a", &view));
    }
}
