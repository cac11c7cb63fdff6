//! Objects of one kind as the API server last said, in memory, and the watch that keeps them so.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures::{Stream, StreamExt as _};
use kube::Api;
use kube::core::{DynamicObject, ObjectMeta, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};

/// An object without its spec and status.
pub(crate) type Meta = PartialObjectMeta<DynamicObject>;

/// Objects of one kind by a key of theirs.
pub(crate) struct Index<T> {
    objects: RwLock<HashMap<String, Arc<T>>>,
    synced: AtomicBool,
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { objects: RwLock::default(), synced: AtomicBool::new(false) }
    }
}

impl<T> Index<T> {
    pub(crate) fn get(&self, key: &str) -> Option<Arc<T>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether all objects were here at some time.
    pub(crate) fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// Exactly these, from now on.
    pub(crate) fn replace(&self, objects: HashMap<String, Arc<T>>) {
        *self.objects.write().unwrap_or_else(PoisonError::into_inner) = objects;
        self.synced.store(true, Ordering::Release);
    }

    fn insert(&self, (key, object): (String, Arc<T>)) {
        self.objects.write().unwrap_or_else(PoisonError::into_inner).insert(key, object);
    }

    fn remove(&self, key: &str) {
        self.objects.write().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// Keeps `index` as the API server says, for ever. `keep` makes key and content of an object.
pub(crate) async fn follow<T>(
    api: Api<Meta>,
    index: Arc<Index<T>>,
    keep: impl Fn(ObjectMeta) -> Option<(String, T)>,
) {
    let kind = api.resource_url().to_owned();
    let events = watcher(api, watcher::Config::default()).default_backoff();
    take_all(&kind, events, &index, keep).await;
}

async fn take_all<T>(
    kind: &str,
    events: impl Stream<Item = watcher::Result<Event<Meta>>>,
    index: &Index<T>,
    keep: impl Fn(ObjectMeta) -> Option<(String, T)>,
) {
    let keep = |object: Meta| keep(object.metadata).map(|(key, object)| (key, Arc::new(object)));
    // A list arrives in pages. What is known stays known until it is complete.
    let mut listed = HashMap::new();
    let mut events = pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(object)) => listed.extend(keep(object)),
            Ok(Event::InitDone) => {
                let objects = std::mem::take(&mut listed);
                tracing::debug!(kind, objects = objects.len(), "listed");
                index.replace(objects);
            }
            Ok(Event::Apply(object)) => {
                if let Some(entry) = keep(object) {
                    index.insert(entry);
                }
            }
            Ok(Event::Delete(object)) => {
                if let Some((key, _)) = keep(object) {
                    index.remove(&key);
                }
            }
            Err(error) => tracing::warn!(kind, error = &error as &dyn std::error::Error, "cannot watch"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::PartialObjectMetaExt as _;

    fn named(name: &str, version: &str) -> Meta {
        let (name, resource_version) = (Some(name.to_owned()), Some(version.to_owned()));
        ObjectMeta { name, resource_version, ..ObjectMeta::default() }.into_response_partial()
    }

    #[tokio::test]
    async fn what_is_known_follows_the_events() {
        let index = Index::default();
        let keep = |meta: ObjectMeta| Some((meta.name?, meta.resource_version?));
        let feed = async |events: Vec<Event<Meta>>| {
            take_all("tests", futures::stream::iter(events.into_iter().map(Ok)), &index, keep).await;
        };
        feed(vec![Event::Init, Event::InitApply(named("a", "1"))]).await;
        // Half a list is none.
        assert!(!index.is_synced() && index.get("a").is_none());
        feed(vec![
            Event::Init,
            Event::InitApply(named("a", "1")),
            Event::InitApply(named("b", "1")),
            Event::InitDone,
            Event::Apply(named("c", "2")),
            Event::Apply(named("a", "3")),
            Event::Delete(named("b", "1")),
        ])
        .await;
        assert!(index.is_synced());
        assert_eq!(index.get("a").as_deref().map(String::as_str), Some("3"));
        assert!(index.get("b").is_none() && index.get("c").is_some());
        // Listed anew, what is gone is forgotten.
        feed(vec![Event::Init, Event::InitApply(named("c", "2")), Event::InitDone]).await;
        assert_eq!(index.len(), 1);
    }
}
