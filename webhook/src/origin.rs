//! Where a pod comes from: the objects that own it, nearest first, and its Namespace. Only what a decision
//! needs of them: a cluster has a hundred thousand ReplicaSets.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix_csi_proto::annotations::PREFIX;

use crate::image_map::ImageMaps;

/// Kept by the Deployment controller: which revision of a Deployment a ReplicaSet is, and which one is the
/// Deployment's current one.
pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";

/// An object that owns pods, or owns what owns them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// Which object.
    pub object: ObjectRef,
    /// Its annotations: ours, and the revision.
    pub annotations: BTreeMap<String, String>,
    /// What controls it.
    pub controller: Option<ObjectRef>,
}

/// One object of a namespace that is known from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ObjectRef {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Which one of that name.
    pub uid: String,
}

/// A Namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// The value of its label `inject`.
    pub inject: Option<String>,
    /// Its annotations of ours.
    pub annotations: BTreeMap<String, String>,
}

/// Where one pod comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origin {
    /// Its controller, the controller of that one, and so on.
    pub owners: Vec<Arc<Owner>>,
    /// Its Namespace, if that is known.
    pub namespace: Option<Arc<Namespace>>,
    /// Which images are packages, in all namespaces that are opted in.
    pub image_maps: Arc<ImageMaps>,
}

impl ObjectRef {
    /// The API group; empty for the core group.
    pub fn group(&self) -> &str {
        self.api_version.split_once('/').map_or("", |(group, _)| group)
    }

    fn is(&self, group: &str, kind: &str) -> bool {
        self.group() == group && self.kind == kind
    }
}

impl Namespace {
    /// The administrator's word: nothing below it counts.
    pub fn is_excluded(&self) -> bool {
        self.inject.as_deref() == Some("disabled")
    }

    /// Whether its pods are offered packages that they do not ask for themselves.
    pub fn is_opted_in(&self) -> bool {
        self.inject.as_deref() == Some("enabled")
    }
}

impl Owner {
    /// What it says to us.
    fn ours(&self) -> impl Iterator<Item = (&String, &String)> {
        self.annotations.iter().filter(|(key, _)| key.starts_with(PREFIX))
    }
}

impl Origin {
    /// The owners whose annotations count, nearest first.
    ///
    /// A Deployment copies its annotations to its current ReplicaSet, but takes none away there. So as long as
    /// a ReplicaSet is the current one, its Deployment is asked; an older one has those of its time.
    pub(crate) fn deciding(&self) -> impl Iterator<Item = &Owner> {
        let owners: Vec<&Owner> = self.owners.iter().map(AsRef::as_ref).collect();
        let skipped = match owners[..] {
            [set, deployment, ..]
                if set.object.is("apps", "ReplicaSet") && deployment.object.is("apps", "Deployment") =>
            {
                let revision = set.annotations.get(REVISION);
                let is_current = revision.is_some() && revision == deployment.annotations.get(REVISION);
                // A Deployment learns its new revision after the first pods of it. The name that people know is better.
                let says_the_same = set.ours().eq(deployment.ours());
                Some(usize::from(!is_current && !says_the_same))
            }
            _ => None,
        };
        owners.into_iter().enumerate().filter(move |(at, _)| Some(*at) != skipped).map(|(_, owner)| owner)
    }

    /// The one that people know: a Deployment rather than its ReplicaSet.
    pub fn topmost(&self) -> Option<&ObjectRef> {
        self.owners.last().map(|owner| owner.controller.as_ref().unwrap_or(&owner.object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix_csi_proto::annotations::PACKAGES;
    use rstest::rstest;

    fn owner(api_version: &str, kind: &str, revision: Option<&str>, packages: &str) -> Arc<Owner> {
        let mut annotations = BTreeMap::from([(PACKAGES.to_owned(), packages.to_owned())]);
        annotations.extend(revision.map(|revision| (REVISION.to_owned(), revision.to_owned())));
        let object = ObjectRef { api_version: api_version.into(), kind: kind.into(), ..ObjectRef::default() };
        Arc::new(Owner { object, annotations, controller: None })
    }

    #[rstest]
    #[case::current(Some("3"), Some("3"), "b", "Deployment")]
    #[case::older(Some("2"), Some("3"), "b", "ReplicaSet")]
    #[case::the_deployment_lags(Some("4"), Some("3"), "b", "ReplicaSet")]
    #[case::neither_has_one(None, None, "b", "ReplicaSet")]
    #[case::both_say_the_same(Some("4"), Some("3"), "a", "Deployment")]
    fn who_decides_for_a_deployment(
        #[case] set: Option<&str>,
        #[case] deployment: Option<&str>,
        #[case] of_deployment: &str,
        #[case] kind: &str,
    ) {
        let owners = vec![
            owner("apps/v1", "ReplicaSet", set, "a"),
            owner("apps/v1", "Deployment", deployment, of_deployment),
        ];
        let origin = Origin { owners, ..Origin::default() };
        let kinds: Vec<_> = origin.deciding().map(|owner| owner.object.kind.as_str()).collect();
        assert_eq!(kinds, [kind]);
    }

    #[test]
    fn others_all_count() {
        let owners = vec![owner("batch/v1", "Job", None, "a"), owner("batch/v1", "CronJob", None, "a")];
        assert_eq!(Origin { owners, ..Origin::default() }.deciding().count(), 2);
        let owners = vec![
            owner("apps/v1", "ReplicaSet", Some("1"), "a"),
            owner("argoproj.io/v1alpha1", "Rollout", Some("1"), "a"),
        ];
        assert_eq!(Origin { owners, ..Origin::default() }.deciding().count(), 2);
    }
}
