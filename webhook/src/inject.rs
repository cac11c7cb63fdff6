//! A pod and its plan to the pod that will run. Pure, and the same the second time.

use nix_csi_proto::DRIVER_NAME;
use nix_csi_proto::annotations::STATUS;
use nix_csi_proto::volume::RESULT;
use serde_json::{Map, Value, json};

use crate::environment::{Environment, PASSWD, is_program};
use crate::plan::{ContainerPlan, Plan, VolumePlan};
use crate::status::{is_at_nix, is_ours};

/// What a container finds when it sets no `PATH` of its own: ours, then what images commonly have.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Keeps a `PATH` that comes from elsewhere.
const KEPT_PATH: &str = "NIX_CSI_PATH";

/// The pod with everything that `plan` says.
pub fn inject(pod: &Value, plan: &Plan) -> Value {
    let mut pod = pod.clone();
    if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) {
        let volumes = array(spec, "volumes");
        for volume in &plan.volumes {
            set_named(volumes, volume_value(volume));
        }
        for volume in plan.containers.iter().flat_map(|container| &container.environment.volumes) {
            set_named(volumes, volume.clone());
        }
        for field in ["initContainers", "containers"] {
            for container in spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
                let name = container.get("name").and_then(Value::as_str);
                let plan_of = plan.containers.iter().find(|plan| Some(plan.name.as_str()) == name);
                if let (Some(plan_of), Some(container)) = (plan_of, container.as_object_mut()) {
                    inject_container(container, plan_of, plan);
                }
            }
        }
    }
    remove_obsolete(&mut pod, plan);
    if let Some(metadata) = object(&mut pod, "metadata")
        && let Some(annotations) = entry_object(metadata, "annotations")
    {
        annotations.insert(STATUS.to_owned(), Value::String(plan.status.clone()));
        if let Some(passwd) = &plan.passwd {
            annotations.insert(PASSWD.to_owned(), Value::String(passwd.clone()));
        }
    }
    pod
}

/// Takes away volumes of an earlier call that no container mounts any more.
fn remove_obsolete(pod: &mut Value, plan: &Plan) {
    let of =
        |pod: &Value, field: &str| pod.pointer(&format!("/spec/{field}")).and_then(Value::as_array).cloned();
    let containers =
        ["initContainers", "containers"].into_iter().filter_map(|field| of(pod, field)).flatten();
    let mounts =
        containers.filter_map(|container| container.get("volumeMounts")?.as_array().cloned()).flatten();
    let mounted: Vec<_> = mounts.filter_map(|mount| Some(mount.get("name")?.as_str()?.to_owned())).collect();
    let unused: Vec<_> =
        plan.obsolete.iter().filter(|name| !mounted.contains(name) && is_ours(pod, name)).cloned().collect();
    if let Some(volumes) = pod.pointer_mut("/spec/volumes").and_then(Value::as_array_mut) {
        volumes.retain(|volume| {
            !unused.iter().any(|name| volume.get("name").and_then(Value::as_str) == Some(name))
        });
    }
}

fn volume_value(volume: &VolumePlan) -> Value {
    let mut value = json!({
        "name": volume.name,
        "csi": {
            "driver": DRIVER_NAME,
            "readOnly": volume.read_only,
            "volumeAttributes": volume.attributes,
        },
    });
    if let Some(secret) = &volume.secret {
        value["csi"]["nodePublishSecretRef"] = json!({ "name": secret });
    }
    value
}

fn inject_container(container: &mut Map<String, Value>, of: &ContainerPlan, plan: &Plan) {
    let mounts = array(container, "volumeMounts");
    mounts.retain(|mount| !plan.obsolete.iter().any(|obsolete| is_of(mount, obsolete)));
    set_named(mounts, json!({ "name": of.volume, "mountPath": "/nix", "readOnly": of.read_only }));
    if let Some(image) = &of.image {
        container.insert("image".to_owned(), image.clone().into());
        // The image is there to be empty: a node that has it need not ask a registry at each start.
        container.insert("imagePullPolicy".to_owned(), "IfNotPresent".into());
    }
    if let Some(command) = &of.command {
        container.insert("command".to_owned(), json!(command));
    }
    if !of.args.is_empty() {
        container.insert("args".to_owned(), json!(of.args));
    }
    if of.path {
        inject_path(array(container, "env"));
    }
    inject_environment(container, &of.environment);
}

/// Whether `mount` is one that an earlier call made of that volume.
fn is_of(mount: &Value, volume: &str) -> bool {
    let field = |name: &str| mount.get(name).and_then(Value::as_str);
    is_at_nix(mount, volume) || (field("name") == Some(volume) && field("mountPath").is_some_and(is_program))
}

/// Adds what is not there. It was planned by what is.
fn inject_environment(container: &mut Map<String, Value>, environment: &Environment) {
    let at = |mount: &Value| mount.get("mountPath").cloned();
    let mounts = array(container, "volumeMounts");
    for mount in &environment.mounts {
        if !mounts.iter().any(|present| at(present) == at(mount)) {
            mounts.push(mount.clone());
        }
    }
    if environment.env.is_empty() {
        return;
    }
    let env = array(container, "env");
    for (name, value) in &environment.env {
        env.push(json!({ "name": name, "value": value }));
    }
}

/// Puts the packages first in `PATH`, once.
fn inject_path(env: &mut Vec<Value>) {
    let bin = format!("{RESULT}/bin");
    let Some(at) =
        env.iter().position(|variable| variable.get("name").and_then(Value::as_str) == Some("PATH"))
    else {
        env.push(json!({ "name": "PATH", "value": format!("{bin}:{DEFAULT_PATH}") }));
        return;
    };
    if env[at].get("valueFrom").is_some_and(|source| !source.is_null()) {
        // A variable can only refer to what stands before it.
        env[at]["name"] = KEPT_PATH.into();
        env.insert(at + 1, json!({ "name": "PATH", "value": format!("{bin}:$({KEPT_PATH})") }));
        return;
    }
    let value = env[at].get("value").and_then(Value::as_str).unwrap_or_default();
    if value.split(':').any(|part| part == bin) {
        return;
    }
    env[at]["value"] = if value.is_empty() { bin } else { format!("{bin}:{value}") }.into();
}

/// Replaces the entry of the same name where it is, or adds it at the end.
fn set_named(list: &mut Vec<Value>, value: Value) {
    match list.iter_mut().find(|entry| entry.get("name") == value.get("name")) {
        Some(entry) => *entry = value,
        None => list.push(value),
    }
}

/// The list at `key`, which is made if it is absent or null.
fn array<'a>(object: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let value = object.entry(key).or_insert(Value::Null);
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    match value {
        Value::Array(list) => list,
        _ => unreachable!("it was made an array above"),
    }
}

fn object<'a>(value: &'a mut Value, key: &str) -> Option<&'a mut Map<String, Value>> {
    value.as_object_mut().and_then(|object| entry_object(object, key))
}

fn entry_object<'a>(object: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    let value = object.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut()
}
