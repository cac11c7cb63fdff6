//! Ephemeral containers (`kubectl debug`): they get what their pod has at `/nix`. Pure.

use serde_json::{Value, json};

use crate::decide::{list, name_of};
use crate::status::{is_at_nix, is_ours};

/// The pod, whose new ephemeral containers have its packages; `before` is the pod without them.
///
/// Only the mount: the image that somebody debugs with keeps its `PATH`, and `/nix/var/result/bin` is where it always is.
pub fn debug(before: &Value, pod: &Value) -> Value {
    let mut after = pod.clone();
    let known: Vec<_> = list(before, "ephemeralContainers").iter().map(name_of).collect();
    let debuggers = after.pointer_mut("/spec/ephemeralContainers").and_then(Value::as_array_mut);
    for container in debuggers.into_iter().flatten() {
        if known.contains(&name_of(container)) {
            continue;
        }
        let target = container.get("targetContainerName").and_then(Value::as_str).unwrap_or_default();
        let Some(mount) = mount_for(pod, target) else { continue };
        let Some(container) = container.as_object_mut() else { continue };
        let mounts = container.entry("volumeMounts").or_insert(Value::Null);
        if mounts.is_null() {
            *mounts = json!([]);
        }
        let Some(mounts) = mounts.as_array_mut() else { continue };
        let is_below = |at: &str| std::path::Path::new(at).starts_with("/nix");
        if !mounts.iter().any(|other| other.get("mountPath").and_then(Value::as_str).is_some_and(is_below)) {
            mounts.push(mount);
        }
    }
    after
}

/// What the target has at `/nix`, or if it has nothing, what all that have something have.
fn mount_for(pod: &Value, target: &str) -> Option<Value> {
    let of = |container: &Value| {
        let mounts = container.get("volumeMounts")?.as_array()?;
        mounts.iter().find_map(|mount| {
            let volume = mount.get("name")?.as_str()?;
            (is_at_nix(mount, volume) && is_ours(pod, volume)).then(|| {
                let read_only = mount.get("readOnly").and_then(Value::as_bool).unwrap_or_default();
                json!({"name": volume, "mountPath": "/nix", "readOnly": read_only})
            })
        })
    };
    let all = || list(pod, "containers").iter().chain(list(pod, "initContainers"));
    if let Some(mount) = all().find(|container| name_of(container) == target).and_then(of) {
        return Some(mount);
    }
    let mut mounts: Vec<_> = all().filter_map(of).collect();
    mounts.dedup();
    match <[Value; 1]>::try_from(mounts) {
        Ok([mount]) => Some(mount),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(debuggers: &Value) -> Value {
        let volume = |name: &str| json!({"name": name, "csi": {"driver": "nix-csi.lillecarl.com"}});
        let container = |name: &str, volume: &str| json!({"name": name, "volumeMounts": [{"name": volume, "mountPath": "/nix", "readOnly": true}]});
        json!({"spec": {
            "volumes": [volume("nix-csi-1"), volume("nix-csi-2")],
            "containers": [container("web", "nix-csi-1"), container("log", "nix-csi-2")],
            "ephemeralContainers": debuggers,
        }})
    }

    #[test]
    fn a_new_one_gets_what_its_target_has() {
        let before = pod(&json!([{"name": "old"}]));
        let now = pod(&json!([{"name": "old"}, {"name": "new", "targetContainerName": "log"}]));
        let after = debug(&before, &now);
        let [old, new] = [0, 1].map(|at| after["spec"]["ephemeralContainers"][at]["volumeMounts"].clone());
        assert_eq!(old, Value::Null);
        assert_eq!(new, json!([{"name": "nix-csi-2", "mountPath": "/nix", "readOnly": true}]));
        assert_eq!(debug(&before, &after), after);
    }

    #[test]
    fn without_a_target_it_is_given_what_is_not_ambiguous() {
        let now = pod(&json!([{"name": "new"}]));
        assert_eq!(debug(&json!({}), &now), now);
        let mut one = now.clone();
        one["spec"]["containers"].as_array_mut().unwrap().pop();
        let after = debug(&json!({}), &one);
        assert_eq!(after["spec"]["ephemeralContainers"][0]["volumeMounts"][0]["name"], "nix-csi-1");
    }

    #[test]
    fn what_it_mounts_itself_stays() {
        let own = json!([{"name": "new", "targetContainerName": "web", "volumeMounts": [{"name": "x", "mountPath": "/nix/store"}]}]);
        let now = pod(&own);
        assert_eq!(debug(&json!({}), &now), now);
    }
}
