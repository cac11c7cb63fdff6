//! Keeps what the cluster's ImageMaps say in memory, and says on each of them whether it can be used.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures::StreamExt as _;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use serde_json::{Value, json};

use crate::image_map::{ImageMapError, ImageMaps};

/// What all valid ImageMaps say, exchanged as a whole when one of them changes.
pub(crate) type LiveImageMaps = Arc<ArcSwap<ImageMaps>>;

fn resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("nix.lillecarl.com", "v1alpha1", "ImageMap"))
}

/// Keeps `live` up to date for as long as the process lives.
///
/// A cluster without the CustomResourceDefinition has no ImageMaps; it is asked again now and then.
pub(crate) async fn keep(client: kube::Client, live: LiveImageMaps) {
    let api: Api<DynamicObject> = Api::all_with(client, &resource());
    let mut events = watcher(api.clone(), Config::default()).default_backoff().boxed();
    let mut maps = Known::default();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if maps.take(event) {
                    let (index, errors) = maps.index();
                    live.store(Arc::new(index));
                    say(&api, &maps, &errors).await;
                }
            }
            Err(error) => tracing::debug!(%error, "cannot watch ImageMaps"),
        }
    }
}

/// The ImageMaps there are, by name.
#[derive(Default)]
struct Known {
    all: BTreeMap<String, DynamicObject>,
    /// Those of a list that is not complete yet.
    listed: BTreeMap<String, DynamicObject>,
}

impl Known {
    /// Whether there is something new to be known.
    fn take(&mut self, event: Event<DynamicObject>) -> bool {
        let named = |object: DynamicObject| (object.metadata.name.clone().unwrap_or_default(), object);
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => self.listed.extend([named(object)]),
            Event::InitDone => self.all = std::mem::take(&mut self.listed),
            Event::Apply(object) => self.all.extend([named(object)]),
            Event::Delete(object) => drop(self.all.remove(&named(object).0)),
        }
        self.listed.is_empty()
    }

    fn index(&self) -> (ImageMaps, BTreeMap<String, ImageMapError>) {
        ImageMaps::read(self.all.iter().map(|(name, object)| (name.as_str(), &object.data["spec"])))
    }
}

/// Writes the status of those that say something else. Every replica does; they write the same.
async fn say(api: &Api<DynamicObject>, maps: &Known, errors: &BTreeMap<String, ImageMapError>) {
    for (name, object) in &maps.all {
        let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let generation = object.metadata.generation;
        let Some(status) = status(&object.data["status"], generation, errors.get(name), &now) else {
            continue;
        };
        if let Some(error) = errors.get(name) {
            tracing::warn!(image_map = name, %error, "not used");
        }
        let patch = Patch::Merge(json!({ "status": status }));
        if let Err(error) = api.patch_status(name, &PatchParams::default(), &patch).await {
            tracing::warn!(image_map = name, %error, "cannot write the status of an ImageMap");
        }
    }
}

/// The status to write, if it is not what `present` says. Other conditions than ours stay.
fn status(
    present: &Value,
    generation: Option<i64>,
    error: Option<&ImageMapError>,
    now: &str,
) -> Option<Value> {
    let (status, reason) = if error.is_none() { ("True", "Valid") } else { ("False", "Invalid") };
    let message =
        error.map_or_else(|| "in use where namespaces are opted in".to_owned(), ToString::to_string);
    let conditions = present["conditions"].as_array().cloned().unwrap_or_default();
    let (ours, others): (Vec<_>, Vec<_>) =
        conditions.into_iter().partition(|condition| condition["type"] == "Valid");
    let mut condition = json!({
        "type": "Valid", "status": status, "reason": reason, "message": message, "observedGeneration": generation,
        "lastTransitionTime": now,
    });
    if let Some(before) = ours.first().filter(|before| before["status"] == status) {
        condition["lastTransitionTime"] = before["lastTransitionTime"].clone();
    }
    if ours == [condition.clone()] {
        return None;
    }
    let conditions = [others, vec![condition]].concat();
    Some(json!({ "conditions": conditions }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-redis-7.2.7";

    fn map(name: &str, pattern: &str) -> DynamicObject {
        let object = json!({
            "apiVersion": "nix.lillecarl.com/v1alpha1", "kind": "ImageMap",
            "metadata": {"name": name, "generation": 1},
            "spec": {"images": [{"match": pattern, "packages": [PATH]}]},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn the_index_follows_events() {
        let mut maps = Known::default();
        let find =
            |maps: &Known, image: &str| maps.index().0.find(image).map(|found| found.replacement.map.clone());
        maps.take(Event::Init);
        assert!(!maps.take(Event::InitApply(map("a", "redis"))));
        assert_eq!(find(&maps, "redis"), None);
        assert!(maps.take(Event::InitDone));
        assert_eq!(find(&maps, "redis").as_deref(), Some("a"));
        assert!(maps.take(Event::Apply(map("b", "nginx"))));
        assert_eq!(find(&maps, "nginx").as_deref(), Some("b"));
        assert!(maps.take(Event::Delete(map("a", "redis"))));
        assert_eq!(find(&maps, "redis"), None);
        // A list after an interruption: what it does not name is gone.
        maps.take(Event::Init);
        maps.take(Event::InitApply(map("c", "redis")));
        maps.take(Event::InitDone);
        assert_eq!((find(&maps, "redis").as_deref(), find(&maps, "nginx")), (Some("c"), None));
    }

    #[test]
    fn what_has_another_shape_is_said_and_not_used() {
        let mut maps = Known::default();
        let mut odd = map("odd", "redis");
        odd.data["spec"]["images"] = json!("redis");
        maps.take(Event::Apply(odd));
        maps.take(Event::Apply(map("good", "redis")));
        let (index, errors) = maps.index();
        assert!(index.find("redis").is_some());
        assert!(errors["odd"].to_string().starts_with("spec: invalid type: string"), "{}", errors["odd"]);
    }

    #[test]
    fn a_status_is_written_when_it_changes() {
        let first = status(&Value::Null, Some(1), None, "t1").unwrap();
        assert_eq!(first["conditions"][0]["status"], "True");
        assert_eq!(status(&first, Some(1), None, "t2"), None);
        // Seen again in another generation, without a transition.
        let second = status(&first, Some(2), None, "t2").unwrap();
        assert_eq!(second["conditions"][0]["lastTransitionTime"], "t1");
        let error = ImageMapError::NoPackages { index: 0 };
        let third = status(&second, Some(3), Some(&error), "t3").unwrap();
        let condition = &third["conditions"][0];
        assert_eq!((&condition["status"], &condition["lastTransitionTime"]), (&json!("False"), &json!("t3")));
        assert_eq!(condition["message"], "spec.images[0].packages is empty; name at least one store path");
    }

    #[test]
    fn conditions_of_others_stay() {
        let other = json!({"type": "Other", "status": "True"});
        let after = status(&json!({"conditions": [other]}), Some(1), None, "t").unwrap();
        assert_eq!(after["conditions"][0], other);
        assert_eq!(after["conditions"].as_array().unwrap().len(), 2);
    }
}
