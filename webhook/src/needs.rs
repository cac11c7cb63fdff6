//! Which containers need what, and why: packages that somebody lists for them, an image that is packages, store paths in
//! their text. Pure.

use nix_csi_proto::References;
use nix_csi_proto::annotations::PACKAGES;
use nix_csi_store::StorePath;
use serde_json::Value;

use crate::decide::{Policy, list, name_of};
use crate::farm::{Farm, Farmed};
use crate::image_map::{ImageMaps, Replacement};
use crate::sidecars;
use crate::status::Status;
use crate::wish::{Selection, Wish};

/// Whose texts are looked into for store paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Farming {
    /// Nobody's.
    Off,
    /// Theirs who get packages anyway, or whose image has nothing to lose.
    Harmless,
    /// Everybody's: somebody asked for it.
    Everywhere,
}

impl Farming {
    pub(crate) fn of(asked: Option<bool>, is_opted_in: bool) -> Self {
        match asked {
            Some(true) => Self::Everywhere,
            None if is_opted_in => Self::Harmless,
            Some(false) | None => Self::Off,
        }
    }
}

/// Why a container gets something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why<'a> {
    /// Somebody lists packages for it.
    Listed,
    /// Its image is packages.
    Mapped(&'a Replacement),
    /// It names store paths, and that is all.
    Farmed,
}

/// What one container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Need<'a> {
    pub(crate) container: &'a Value,
    pub(crate) why: Why<'a>,
    pub(crate) packages: References,
    /// What it can do without.
    pub(crate) optional: Vec<StorePath>,
}

/// What is known when needs are found out.
pub(crate) struct Finder<'a, 's> {
    pub(crate) pod: &'a Value,
    pub(crate) policy: &'a Policy,
    pub(crate) wish: &'a Wish,
    pub(crate) status: Option<&'s Status>,
    /// Those that apply to this pod.
    pub(crate) maps: Option<&'a ImageMaps>,
    pub(crate) farming: Farming,
}

impl<'a> Finder<'a, '_> {
    /// The needs of the containers, in the order of the pod; `listed` says what somebody lists for a container.
    pub(crate) fn find<E>(
        &self,
        listed: impl Fn(&'a Value) -> Option<Result<&'a References, E>>,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Need<'a>>, E> {
        let mut farm = Farm::new(self.pod);
        let mut needs = Vec::new();
        let sidecars = sidecars::of(self.pod);
        let all = || list(self.pod, "initContainers").iter().chain(list(self.pod, "containers"));
        // Later calls must not take what another webhook added in between.
        let is_in = |status: &Status, container: &Value| status.confirmed(self.pod, container).is_some();
        let earlier = self.status.filter(|status| all().any(|container| is_in(status, container)));
        for container in all() {
            let is_theirs = !sidecars.contains(name_of(container))
                && earlier.is_none_or(|status| is_in(status, container));
            let mapped = self.maps.filter(|_| is_theirs && self.is_selected(container)).and_then(|maps| {
                let found = maps.find(self.image(container))?;
                if let Some(other) = found.tied_with {
                    warnings.push(tie(container, found.replacement, other));
                }
                Some(found.replacement)
            });
            let (why, mut packages) = match (mapped, listed(container)) {
                (Some(mapped), Some(Ok(listed))) => {
                    (Why::Mapped(mapped), mapped.packages.followed_by(listed))
                }
                (Some(mapped), Some(Err(_)) | None) => (Why::Mapped(mapped), mapped.packages.clone()),
                (None, Some(listed)) => (Why::Listed, listed?.clone()),
                (None, None) => (Why::Farmed, References::default()),
            };
            let may_farm = match self.farming {
                Farming::Off => false,
                Farming::Harmless => why != Why::Farmed || (is_theirs && self.is_marker(container)),
                Farming::Everywhere => why != Why::Farmed || is_theirs,
            };
            let farmed = if may_farm { farm.look_into(container) } else { Farmed::default() };
            if why == Why::Farmed && farmed.is_empty() {
                continue;
            }
            let Farmed { required, mut optional } = farmed;
            if let Some(required) = required {
                packages = packages.followed_by(&References::from(required));
            }
            // By hash: whatever stands behind it in a text may be a part of the text.
            let is_listed = |path: &StorePath| {
                packages
                    .items()
                    .iter()
                    .any(|item| item.system.is_none() && item.reference.path.hash() == path.hash())
            };
            optional.retain(|path| !is_listed(path));
            // A node takes no volume that could be empty.
            if packages.is_empty() {
                warnings.push(only_optional(container));
                continue;
            }
            needs.push(Need { container, why, packages, optional });
        }
        warnings.append(&mut farm.warnings);
        Ok(needs)
    }

    /// Whether the annotation `containers` leaves it in.
    fn is_selected(&self, container: &Value) -> bool {
        match &self.wish.containers {
            Some(Selection::Named(names)) => names.iter().any(|name| name == name_of(container)),
            Some(Selection::All) | None => true,
        }
    }

    /// The image that the author wrote.
    fn image<'b>(&'b self, container: &'b Value) -> &'b str {
        let before = self.status.and_then(|status| status.confirmed(self.pod, container));
        let before = before.and_then(|injected| injected.image.as_deref());
        before.or_else(|| container.get("image").and_then(Value::as_str)).unwrap_or_default()
    }

    /// Whether its image holds nothing that `/nix` could hide.
    fn is_marker(&self, container: &Value) -> bool {
        let image = container.get("image").and_then(Value::as_str);
        image.is_some_and(|image| self.policy.is_marker(image))
    }
}

fn tie(container: &Value, taken: &Replacement, other: &str) -> String {
    let (name, map) = (name_of(container), &taken.map);
    format!("container {name}: ImageMaps {map} and {other} have a rule for the same images; {map} is used")
}

fn only_optional(container: &Value) -> String {
    let name = name_of(container);
    format!("container {name}: it names store paths, but none is its program; list them in {PACKAGES}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(None, false, Farming::Off)]
    #[case(None, true, Farming::Harmless)]
    #[case(Some(true), false, Farming::Everywhere)]
    #[case(Some(true), true, Farming::Everywhere)]
    #[case(Some(false), true, Farming::Off)]
    fn who_is_farmed(#[case] asked: Option<bool>, #[case] opted_in: bool, #[case] expected: Farming) {
        assert_eq!(Farming::of(asked, opted_in), expected);
    }
}
