//! What becomes of pods that ask for nothing, in namespaces that are opted in: images that are packages, store paths in
//! texts, and what programs of Nix need besides.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use nix_csi_webhook::{Decision, ImageMapSpec, ImageMaps, Namespace, Origin, Plan, Policy, decide, inject};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

const REDIS: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-redis-7.2.7";
const BASH: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-bash-5.2.37";
const HELLO: &str = "/nix/store/1b9p07z77phvv2hf6gm9f28syp39f1ag-hello-2.10";
const DISTROLESS: &str = "gcr.io/distroless/static-debian12:latest";
const NONROOT: &str = "gcr.io/distroless/static-debian12:nonroot";

fn policy() -> Policy {
    Policy { distroless: DISTROLESS.into(), distroless_nonroot: NONROOT.into() }
}

fn image_maps() -> Arc<ImageMaps> {
    let spec: ImageMapSpec = serde_json::from_value(json!({"images": [
        {"match": "redis:7*", "packages": [REDIS, BASH], "command": ["redis-server"], "args": ["--save", ""]},
        {"match": "bash", "packages": [format!("{BASH}/bin/bash")]},
    ]}))
    .unwrap();
    let (maps, errors) = ImageMaps::new([("ours", &spec)]);
    assert!(errors.is_empty());
    Arc::new(maps)
}

fn origin(inject: Option<&str>, annotations: &[(&str, &str)]) -> Origin {
    let annotations =
        annotations.iter().map(|(key, value)| (format!("nix.lillecarl.com/{key}"), (*value).to_owned()));
    let namespace = Namespace {
        name: "shop".into(),
        inject: inject.map(str::to_owned),
        annotations: annotations.collect::<BTreeMap<_, _>>(),
    };
    Origin { namespace: Some(Arc::new(namespace)), image_maps: image_maps(), ..Origin::default() }
}

fn opted_in() -> Origin {
    origin(Some("enabled"), &[])
}

fn pod(annotations: &Value, container: &Value) -> Value {
    let mut main = json!({"name": "main", "image": "redis:7.2"});
    for (key, value) in container.as_object().into_iter().flatten() {
        main[key] = value.clone();
    }
    json!({"metadata": {"annotations": annotations}, "spec": {"containers": [main]}})
}

fn plan(pod: &Value, origin: &Origin) -> Plan {
    match decide(pod, origin, &policy()) {
        Ok(Decision::Inject(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

/// The pod as it will be; a second time changes nothing.
fn after(pod: &Value, origin: &Origin) -> Value {
    let once = inject(pod, &plan(pod, origin));
    assert_eq!(inject(&once, &plan(&once, origin)), once);
    once
}

fn is_left(pod: &Value, origin: &Origin) -> bool {
    matches!(decide(pod, origin, &policy()), Ok(Decision::Leave { .. }))
}

fn main_of(pod: &Value) -> &Value {
    &pod["spec"]["containers"][0]
}

fn attributes(pod: &Value) -> &Value {
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    &volumes.iter().find(|volume| volume["csi"].is_object()).unwrap()["csi"]["volumeAttributes"]
}

#[test]
fn an_unmodified_pod_runs_what_its_image_is() {
    let pod = after(&pod(&json!({}), &json!({})), &opted_in());
    let main = main_of(&pod);
    assert_eq!((&main["image"], &main["imagePullPolicy"]), (&json!(DISTROLESS), &json!("IfNotPresent")));
    assert_eq!((&main["command"], &main["args"]), (&json!(["redis-server"]), &json!(["--save", ""])));
    assert_eq!(attributes(&pod), &json!({"paths": format!("{REDIS}\n{BASH}")}));
    let status = pod["metadata"]["annotations"]["nix.lillecarl.com/status"].as_str().unwrap();
    let status: Value = serde_json::from_str(status).unwrap();
    assert_eq!(status["source"], "Namespace/shop");
    assert_eq!(status["containers"]["main"]["image"], "redis:7.2");
    assert_eq!(status["containers"]["main"]["imageMap"], "ours");
    assert_eq!(plan(&pod, &opted_in()).containers[0].image_map.as_deref(), Some("ours"));
}

#[rstest]
#[case::own_arguments(json!({"args": ["/etc/redis.conf"]}), json!(["redis-server"]), json!(["/etc/redis.conf"]))]
#[case::own_command(json!({"command": ["redis-cli"]}), json!(["redis-cli"]), Value::Null)]
#[case::entry_point_of_the_reference(json!({"image": "bash"}), json!(["/nix/var/entry/main"]), Value::Null)]
fn what_the_author_runs_stays(#[case] container: Value, #[case] command: Value, #[case] args: Value) {
    let pod = after(&pod(&json!({}), &container), &opted_in());
    assert_eq!((&main_of(&pod)["command"], &main_of(&pod)["args"]), (&command, &args));
}

#[rstest]
#[case::not_opted_in(origin(None, &[]), json!({}), json!({}))]
#[case::other_image(opted_in(), json!({}), json!({"image": "redis:6"}))]
#[case::disabled(opted_in(), json!({"nix.lillecarl.com/inject": "disabled"}), json!({}))]
#[case::containers_of_the_namespace(origin(Some("enabled"), &[("containers", "other")]), json!({}), json!({}))]
fn images_that_stay(#[case] origin: Origin, #[case] annotations: Value, #[case] container: Value) {
    assert!(is_left(&pod(&annotations, &container), &origin));
}

#[test]
fn packages_of_the_pod_come_before_what_its_image_is() {
    let pod = after(&pod(&json!({"nix.lillecarl.com/packages": HELLO}), &json!({})), &opted_in());
    assert_eq!(attributes(&pod)["paths"], HELLO);
}

#[test]
fn packages_of_the_namespace_come_behind_them() {
    let origin = origin(Some("enabled"), &[("packages", HELLO)]);
    let mut pod = pod(&json!({}), &json!({}));
    pod["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "other", "image": "other"}));
    let pod = after(&pod, &origin);
    assert_eq!(attributes(&pod)["paths"], format!("{REDIS}\n{BASH}\n{HELLO}"));
    assert_eq!(pod["spec"]["containers"][1]["image"], "other");
    assert_eq!(pod["spec"]["volumes"].as_array().unwrap().len(), 2);
}

#[test]
fn init_containers_and_users_are_served_and_sidecars_of_others_are_not() {
    let mut pod =
        pod(&json!({"linkerd.io/proxy-version": "1"}), &json!({"securityContext": {"runAsNonRoot": true}}));
    pod["spec"]["initContainers"] =
        json!([{"name": "wait", "image": "bash", "command": ["bash", "-c", "x"]}]);
    pod["spec"]["containers"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "linkerd-proxy", "image": "redis:7"}));
    let pod = after(&pod, &opted_in());
    assert_eq!(main_of(&pod)["image"], NONROOT);
    assert_eq!(pod["spec"]["initContainers"][0]["image"], DISTROLESS);
    assert_eq!(pod["spec"]["containers"][1]["image"], "redis:7");
}

#[test]
fn programs_find_what_they_need() {
    let container = json!({
        "securityContext": {"readOnlyRootFilesystem": true, "runAsUser": 12345},
        "readinessProbe": {"exec": {"command": ["/bin/sh", "-c", "redis-cli ping"]}},
    });
    let before = pod(&json!({}), &container);
    let pod = after(&before, &opted_in());
    let main = main_of(&pod);
    let mounts: Vec<_> = main["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["mountPath"].as_str().unwrap())
        .collect();
    assert_eq!(mounts, ["/nix", "/etc/passwd", "/tmp", "/bin/sh"]);
    let names: Vec<_> =
        main["env"].as_array().unwrap().iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["PATH", "TZDIR", "LANG", "HOME", "USER"]);
    let passwd = pod["metadata"]["annotations"]["nix-csi.lillecarl.com/passwd"].as_str().unwrap();
    assert!(passwd.contains("uid12345:x:12345:0:"), "{passwd}");
    assert_eq!(main["securityContext"], container["securityContext"]);
    // Other packages the second time: the shell is that of the new ones.
    let mut changed = pod.clone();
    changed["metadata"]["annotations"]["nix.lillecarl.com/packages"] = json!(BASH);
    let changed = after(&changed, &opted_in());
    let shell = main_of(&changed)["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|mount| mount["mountPath"] == "/bin/sh")
        .unwrap()
        .clone();
    assert_eq!(
        shell["name"],
        changed["spec"]["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .find(|volume| volume["csi"].is_object())
            .unwrap()["name"]
    );
}

fn names_hello() -> Value {
    json!({"command": [format!("{BASH}/bin/bash"), "-c", format!("{HELLO}/bin/hello")]})
}

#[test]
fn a_marker_image_stays_and_gets_what_the_pod_names() {
    let mut container = names_hello();
    container["image"] = json!("registry.k8s.io/pause:3.10");
    let pod = after(&pod(&json!({}), &container), &opted_in());
    assert_eq!(main_of(&pod)["image"], "registry.k8s.io/pause:3.10");
    assert_eq!(attributes(&pod), &json!({"paths": BASH, "optionalPaths": HELLO}));
    // Whole paths need no PATH.
    assert_eq!(main_of(&pod)["env"], Value::Null);
    let status = pod["metadata"]["annotations"]["nix.lillecarl.com/status"].to_string();
    assert!(!status.contains("pause"), "{status}");
}

#[rstest]
#[case::with_an_image_of_its_own(opted_in(), json!({}), "nginx")]
#[case::not_opted_in(origin(None, &[]), json!({}), DISTROLESS)]
#[case::not_wished(opted_in(), json!({"nix.lillecarl.com/farm": "disabled"}), DISTROLESS)]
#[case::not_wished_in_the_namespace(origin(Some("enabled"), &[("farm", "disabled")]), json!({}), DISTROLESS)]
fn nobody_looks_into_a_pod(#[case] origin: Origin, #[case] annotations: Value, #[case] image: &str) {
    let mut container = names_hello();
    container["image"] = json!(image);
    assert!(is_left(&pod(&annotations, &container), &origin));
}

#[rstest]
#[case::anywhere(origin(None, &[]), "pod")]
#[case::opted_in(opted_in(), "pod")]
fn who_asks_is_farmed_with_any_image(#[case] origin: Origin, #[case] source: &str) {
    let mut container = names_hello();
    container["image"] = json!("nginx");
    let before = pod(&json!({"nix.lillecarl.com/farm": "enabled"}), &container);
    let pod = after(&before, &origin);
    assert_eq!(main_of(&pod)["image"], "nginx");
    assert_eq!(attributes(&pod)["optionalPaths"], HELLO);
    assert!(
        plan(&before, &origin)
            .warnings
            .contains(&"container main: /nix of its own image, if any, is hidden".to_owned())
    );
    assert_eq!(plan(&before, &origin).source.to_string(), source);
}

#[test]
fn packages_come_with_what_the_pod_names_besides() {
    let mut container = names_hello();
    container["args"] = json!([REDIS]);
    let annotations = json!({"nix.lillecarl.com/packages": REDIS});
    let pod_in = |origin: &Origin| after(&pod(&annotations, &container), origin);
    assert_eq!(
        attributes(&pod_in(&opted_in())),
        &json!({"paths": format!("{REDIS}\n{BASH}"), "optionalPaths": HELLO})
    );
    assert_eq!(attributes(&pod_in(&origin(None, &[]))), &json!({"paths": REDIS}));
}

#[test]
fn what_could_end_up_empty_is_no_volume() {
    let container = json!({"image": DISTROLESS, "env": [{"name": "HELLO", "value": HELLO}]});
    let Ok(Decision::Leave { warnings, .. }) = decide(&pod(&json!({}), &container), &opted_in(), &policy())
    else {
        panic!()
    };
    let said = "container main: it names store paths, but none is its program; list them in nix.lillecarl.com/packages";
    assert_eq!(warnings, [said]);
}

#[test]
fn a_container_with_a_nix_of_its_own_goes_without() {
    let mut container = names_hello();
    container["image"] = json!(DISTROLESS);
    container["volumeMounts"] = json!([{"name": "own", "mountPath": "/nix"}]);
    let pod = pod(&json!({"nix.lillecarl.com/farm": "enabled"}), &container);
    let Ok(Decision::Leave { warnings, .. }) = decide(&pod, &opted_in(), &policy()) else { panic!() };
    assert!(
        warnings[0].starts_with("left out: container main already mounts volume \"own\" at /nix"),
        "{warnings:?}"
    );
}

fn container() -> impl Strategy<Value = Value> {
    let image = proptest::sample::select(vec!["redis:7", "bash", "nginx", DISTROLESS, "nix:0/nix/store/x"]);
    let command = proptest::sample::select(vec![
        json!(null),
        json!(["/bin/sh", "-c", format!("{HELLO}/bin/hello")]),
        json!([format!("{BASH}/bin/bash")]),
        json!(["sh"]),
    ]);
    let context = proptest::sample::select(vec![
        json!(null),
        json!({"runAsUser": 12345, "readOnlyRootFilesystem": true}),
        json!({"runAsNonRoot": true}),
    ]);
    let env = proptest::sample::select(vec![
        json!(null),
        json!([{"name": "PATH", "value": format!("{REDIS}/bin")}, {"name": "LANG", "value": "x"}]),
        json!([{"name": "HOME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]),
    ]);
    let from = proptest::sample::select(vec![json!(null), json!([{"configMapRef": {"name": "c"}}])]);
    (image, command, context, env, from).prop_map(|(image, command, context, env, from)| {
        json!({"image": image, "command": command, "securityContext": context, "env": env, "envFrom": from})
    })
}

proptest! {
    #[test]
    fn a_second_time_changes_nothing_and_nothing_of_the_author_is_lost(
        of_main in container(),
        of_init in container(),
        farm in proptest::sample::select(vec![json!({}), json!({"nix.lillecarl.com/farm": "enabled"}), json!({"nix.lillecarl.com/packages": BASH})]),
        packages in any::<bool>(),
    ) {
        let origin = origin(Some("enabled"), if packages { &[("packages", HELLO)] } else { &[] });
        let mut pod = pod(&farm, &of_main);
        let mut init = of_init;
        init["name"] = json!("init");
        pod["spec"]["initContainers"] = json!([init]);
        let Ok(Decision::Inject(plan)) = decide(&pod, &origin, &policy()) else { return Ok(()) };
        let once = inject(&pod, &plan);
        let Ok(Decision::Inject(plan)) = decide(&once, &origin, &policy()) else { panic!("{once}") };
        prop_assert_eq!(inject(&once, &plan), once.clone());
        for field in ["containers", "initContainers"] {
            let (before, after) = (&pod["spec"][field][0], &once["spec"][field][0]);
            prop_assert_eq!(&before["securityContext"], &after["securityContext"]);
            if !before["command"].is_null() {
                prop_assert_eq!(&before["command"], &after["command"]);
            }
            for variable in before["env"].as_array().into_iter().flatten().filter(|variable| variable["name"] != "PATH") {
                prop_assert!(after["env"].as_array().unwrap().contains(variable));
            }
        }
    }
}
