//! Which kinds of objects are asked for annotations: those that come with Kubernetes, and those that the
//! administrator adds.

use std::str::FromStr;

use kube::core::{ApiResource, GroupVersionKind};

/// What owns pods in every cluster: group, version, kind, plural.
const BUILT_IN: [(&str, &str, &str, &str); 6] = [
    ("apps", "v1", "ReplicaSet", "replicasets"),
    ("apps", "v1", "Deployment", "deployments"),
    ("apps", "v1", "StatefulSet", "statefulsets"),
    ("apps", "v1", "DaemonSet", "daemonsets"),
    ("batch", "v1", "Job", "jobs"),
    ("batch", "v1", "CronJob", "cronjobs"),
];

/// A kind of objects that own pods, directly or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerKind(pub(crate) ApiResource);

/// Why a kind cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not <group>/<version>/<Kind>:<plural>, as in argoproj.io/v1alpha1/Rollout:rollouts")]
pub struct ParseOwnerKindError(String);

impl OwnerKind {
    /// Those that come with Kubernetes.
    pub fn built_in() -> impl Iterator<Item = Self> {
        BUILT_IN.into_iter().map(|(group, version, kind, plural)| Self::new(group, version, kind, plural))
    }

    fn new(group: &str, version: &str, kind: &str, plural: &str) -> Self {
        Self(ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural))
    }
}

impl FromStr for OwnerKind {
    type Err = ParseOwnerKindError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseOwnerKindError(text.to_owned());
        let (kind, plural) = text.trim().split_once(':').ok_or_else(bad)?;
        let parts: Vec<_> = kind.split('/').collect();
        let [group, version, kind] = parts[..] else { return Err(bad()) };
        let is_word = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
        };
        if [group, version, kind, plural].into_iter().all(is_word) {
            Ok(Self::new(group, version, kind, plural))
        } else {
            Err(bad())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn a_kind_of_somebody_else() {
        let OwnerKind(kind) = "argoproj.io/v1alpha1/Rollout:rollouts".parse().unwrap();
        assert_eq!((kind.api_version.as_str(), kind.kind.as_str()), ("argoproj.io/v1alpha1", "Rollout"));
        assert_eq!(kind.plural, "rollouts");
    }

    #[rstest]
    #[case("")]
    #[case("argoproj.io/v1alpha1/Rollout")]
    #[case("v1/Pod:pods")]
    #[case("a/b/c/d:e")]
    #[case("a//Kind:kinds")]
    #[case("a/v1/Kind:")]
    #[case("a/v1/../Kind:kinds")]
    fn what_is_none(#[case] text: &str) {
        assert!(text.parse::<OwnerKind>().is_err());
    }
}
