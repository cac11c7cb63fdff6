//! Whose word counts: pod, owners, Namespace. Tables of cases, and laws over arbitrary combinations.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use nix_csi_webhook::{Decision, Namespace, ObjectRef, Origin, Owner, Plan, Policy, decide, inject};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

const A: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-hello-2.10";
const B: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-jq-1.7";
const REVISION: &str = "deployment.kubernetes.io/revision";

type Texts<'a> = &'a [(&'a str, &'a str)];

fn policy() -> Policy {
    Policy { distroless: "distroless:root".into(), distroless_nonroot: "distroless:nonroot".into() }
}

/// Ours, unless it has a prefix already.
fn annotations(texts: Texts<'_>) -> BTreeMap<String, String> {
    let key = |key: &str| if key.contains('/') { key.to_owned() } else { format!("nix.lillecarl.com/{key}") };
    texts.iter().map(|(name, value)| (key(name), (*value).to_owned())).collect()
}

fn pod(texts: Texts<'_>) -> Value {
    json!({
        "metadata": {"generateName": "web-", "annotations": annotations(texts)},
        "spec": {"containers": [{"name": "web", "image": "nginx:1.27"}, {"name": "log", "image": "log:1"}]},
    })
}

fn owner(api_version: &str, kind: &str, texts: Texts<'_>) -> Arc<Owner> {
    let object = ObjectRef {
        api_version: api_version.into(),
        kind: kind.into(),
        name: "web".into(),
        uid: format!("uid-of-{kind}"),
    };
    Arc::new(Owner { object, annotations: annotations(texts), controller: None })
}

fn deployment(texts: Texts<'_>) -> Arc<Owner> {
    owner("apps/v1", "Deployment", texts)
}

fn set(texts: Texts<'_>) -> Arc<Owner> {
    owner("apps/v1", "ReplicaSet", texts)
}

fn namespace(inject: Option<&str>, texts: Texts<'_>) -> Arc<Namespace> {
    let inject = inject.map(str::to_owned);
    Arc::new(Namespace { name: "shop".into(), inject, annotations: annotations(texts) })
}

fn origin(owners: Vec<Arc<Owner>>, namespace: impl Into<Option<Arc<Namespace>>>) -> Origin {
    Origin { owners, namespace: namespace.into(), ..Origin::default() }
}

fn plan(pod: &Value, origin: &Origin) -> Plan {
    match decide(pod, origin, &policy()) {
        Ok(Decision::Inject(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

fn left(pod: &Value, origin: &Origin) -> &'static str {
    match decide(pod, origin, &policy()) {
        Ok(Decision::Leave { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

fn denied(pod: &Value, origin: &Origin) -> String {
    decide(pod, origin, &policy()).unwrap_err().to_string()
}

fn paths(plan: &Plan) -> Vec<&str> {
    plan.volumes.iter().map(|volume| volume.attributes["paths"].as_str()).collect()
}

#[rstest]
#[case::the_pod(&[("packages", A)], &[("packages", B)], &[("packages", B)], A, "pod")]
#[case::its_owner(&[], &[("packages", A)], &[("packages", B)], A, "StatefulSet/web")]
#[case::the_namespace(&[], &[], &[("packages", A)], A, "Namespace/shop")]
#[case::for_one_container_counts_too(&[("packages.web", A)], &[("packages", B)], &[], A, "pod")]
#[case::enabled_asks_farther_out(&[("inject", "enabled")], &[("packages", A)], &[], A, "StatefulSet/web")]
#[case::enabled_beats_a_farther_disabled(&[("inject", "enabled")], &[("inject", "disabled"), ("packages", B)], &[("packages", A)], A, "Namespace/shop")]
#[case::other_annotations_do_not_decide(&[("image", "keep")], &[("packages", A)], &[], A, "StatefulSet/web")]
#[case::what_is_farther_is_not_even_read(&[("packages", A)], &[("packages", "broken")], &[("packages", "broken")], A, "pod")]
fn the_nearest_counts(
    #[case] of_pod: Texts<'_>,
    #[case] of_owner: Texts<'_>,
    #[case] of_namespace: Texts<'_>,
    #[case] path: &str,
    #[case] source: &str,
) {
    let owners = vec![owner("apps/v1", "StatefulSet", of_owner)];
    let plan = plan(&pod(of_pod), &origin(owners, namespace(Some("enabled"), of_namespace)));
    assert_eq!(paths(&plan), [path]);
    assert_eq!(plan.source.to_string(), source);
    let status: Value = serde_json::from_str(&plan.status).unwrap();
    assert_eq!(status["source"], source);
}

#[rstest]
#[case::the_pod(&[("inject", "disabled"), ("packages", A)], &[("packages", B)], "disabled")]
#[case::its_owner(&[], &[("inject", "disabled"), ("packages", A)], "disabled")]
#[case::nobody_has_any(&[("inject", "enabled")], &[], "no-packages")]
fn nothing_is_injected(#[case] of_pod: Texts<'_>, #[case] of_owner: Texts<'_>, #[case] reason: &str) {
    let owners = vec![owner("apps/v1", "DaemonSet", of_owner)];
    let namespaces = if reason == "no-packages" { &[][..] } else { &[("packages", B)] };
    let origin = origin(owners, namespace(Some("enabled"), namespaces));
    assert_eq!(left(&pod(of_pod), &origin), reason);
}

#[rstest]
#[case::excluded(Some("disabled"), &[("packages", A)], "excluded-namespace")]
#[case::excluded_for_those_who_ask(Some("disabled"), &[("packages", A), ("inject", "enabled")], "excluded-namespace")]
#[case::not_opted_in(None, &[], "no-packages")]
#[case::another_value_is_no_opt_in(Some("true"), &[], "no-packages")]
fn the_label_of_the_namespace(#[case] label: Option<&str>, #[case] of_pod: Texts<'_>, #[case] reason: &str) {
    let origin = origin(Vec::new(), namespace(label, &[("packages", B)]));
    assert_eq!(left(&pod(of_pod), &origin), reason);
}

#[test]
fn who_asks_gets_what_the_namespace_offers_without_the_label() {
    let origin = origin(Vec::new(), namespace(None, &[("packages", B)]));
    assert_eq!(paths(&plan(&pod(&[("inject", "enabled")]), &origin)), [B]);
}

/// Annotating, restarting, undoing, removing: what the ReplicaSets of a Deployment look like in between.
#[rstest]
#[case::annotated(&[(REVISION, "1")], &[(REVISION, "1"), ("packages", A)], Some(A))]
#[case::restarted_and_the_deployment_lags(&[(REVISION, "2"), ("packages", A)], &[(REVISION, "1"), ("packages", A)], Some(A))]
#[case::removed_and_the_copy_is_still_there(&[(REVISION, "2"), ("packages", A)], &[(REVISION, "2")], None)]
#[case::an_older_revision_scales(&[(REVISION, "1"), ("packages", A)], &[(REVISION, "2"), ("packages", B)], Some(A))]
#[case::an_older_revision_without(&[(REVISION, "1")], &[(REVISION, "2"), ("packages", B)], None)]
fn a_deployment(#[case] of_set: Texts<'_>, #[case] of_deployment: Texts<'_>, #[case] path: Option<&str>) {
    let origin = origin(vec![set(of_set), deployment(of_deployment)], None);
    match path {
        Some(path) => assert_eq!(paths(&plan(&pod(&[]), &origin)), [path]),
        None => assert_eq!(left(&pod(&[]), &origin), "no-packages"),
    }
}

#[test]
fn a_limit_farther_out_is_for_whoever_writes() {
    let owners = |texts| origin(vec![owner("apps/v1", "StatefulSet", texts)], None);
    let limited = owners(&[("packages", A), ("mode", "rw"), ("size-limit", "1Gi")]);
    let found = plan(&pod(&[]), &limited);
    assert_eq!(found.volumes[0].attributes["sizeLimit"], "1Gi");
    let found = plan(&pod(&[("mode", "ro")]), &limited);
    assert_eq!(found.volumes[0].attributes.get("sizeLimit"), None);
    let message = denied(&pod(&[]), &owners(&[("packages", A), ("size-limit", "1Gi")]));
    assert!(message.contains("it needs nix.lillecarl.com/mode: rw"), "{message}");
}

#[test]
fn a_job_counts_before_its_cron_job() {
    let job = |texts| owner("batch/v1", "Job", texts);
    let cron = owner("batch/v1", "CronJob", &[("packages", B)]);
    let found = plan(&pod(&[]), &origin(vec![job(&[]), Arc::clone(&cron)], None));
    assert_eq!((paths(&found), found.source.to_string()), (vec![B], "CronJob/web".to_owned()));
    assert_eq!(paths(&plan(&pod(&[]), &origin(vec![job(&[("packages", A)]), cron], None))), [A]);
}

#[rstest]
#[case::from_the_pod(&[("packages", A)], &[], &[], "distroless:root")]
#[case::from_its_owner(&[], &[("packages", A)], &[], "distroless:root")]
#[case::from_the_namespace(&[], &[], &[("packages", A)], "nginx:1.27")]
#[case::the_namespace_says_so(&[], &[], &[("packages", A), ("image", "distroless")], "distroless:root")]
#[case::the_pod_says_so(&[("image", "own:1")], &[], &[("packages", A)], "own:1")]
#[case::nearer_counts(&[("image", "keep")], &[("packages", A), ("image", "own:1")], &[], "nginx:1.27")]
fn the_image(
    #[case] of_pod: Texts<'_>,
    #[case] of_owner: Texts<'_>,
    #[case] of_namespace: Texts<'_>,
    #[case] image: &str,
) {
    let owners = vec![owner("apps/v1", "StatefulSet", of_owner)];
    let origin = origin(owners, namespace(Some("enabled"), of_namespace));
    let pod = pod(of_pod);
    assert_eq!(inject(&pod, &plan(&pod, &origin))["spec"]["containers"][0]["image"], image);
}

#[rstest]
#[case::empty(&[("packages", "")], "Deployment/web: annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled")]
#[case::line_and_column(&[("packages", "#\nhello")], "Deployment/web: annotation nix.lillecarl.com/packages, line 2, column 1: \"hello\" is not a store path; expected /nix/store/<hash>-<name>")]
#[case::unknown(&[("package", A)], "Deployment/web: annotation nix.lillecarl.com/package is not known; check its spelling")]
#[case::no_container(&[("packages.app", A)], "Deployment/web: annotation nix.lillecarl.com/packages.app names container \"app\", which the pod does not have (it has web, log)")]
fn a_wrong_annotation_of_an_owner_is_refused(#[case] texts: Texts<'_>, #[case] message: &str) {
    let current = set(&[(REVISION, "1")]);
    let mut of_deployment = texts.to_vec();
    of_deployment.push((REVISION, "1"));
    let origin = origin(vec![current, deployment(&of_deployment)], None);
    assert_eq!(denied(&pod(&[]), &origin), message);
}

#[rstest]
#[case::empty(&[("packages", "")], "Namespace/shop: annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled")]
#[case::contradiction(&[("packages", A), ("inject", "disabled")], "Namespace/shop: label nix.lillecarl.com/inject says enabled and annotation nix.lillecarl.com/inject says disabled; remove one of them")]
#[case::twice(&[("packages.web", A), ("packages", "{\"web\": [\"/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-jq-1.7\"]}")], "Namespace/shop: container web has packages in nix.lillecarl.com/packages and again in nix.lillecarl.com/packages.web; keep one")]
fn a_wrong_annotation_of_a_namespace_is_refused(#[case] texts: Texts<'_>, #[case] message: &str) {
    assert_eq!(denied(&pod(&[]), &origin(Vec::new(), namespace(Some("enabled"), texts))), message);
}

#[test]
fn containers_that_a_namespace_names_need_not_be_there() {
    let of = |texts| origin(Vec::new(), namespace(Some("enabled"), texts));
    let found = plan(&pod(&[]), &of(&[("packages.web", A), ("packages.db", B), ("command.db", "x")]));
    assert_eq!(found.containers.iter().map(|container| container.name.as_str()).collect::<Vec<_>>(), ["web"]);
    assert_eq!(left(&pod(&[]), &of(&[("packages.db", B)])), "no-packages");
    assert_eq!(left(&pod(&[]), &of(&[("packages", B), ("containers", "db")])), "no-container");
}

#[test]
fn what_a_namespace_offers_is_left_out_where_it_does_not_fit() {
    let offered = origin(Vec::new(), namespace(Some("enabled"), &[("packages", A), ("mode", "rw")]));
    let mut occupied = pod(&[]);
    occupied["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "own", "mountPath": "/nix"}]);
    let found = plan(&occupied, &offered);
    assert_eq!(found.containers.len(), 1);
    assert_eq!(found.containers[0].name, "log");
    assert_eq!(found.volumes.len(), 1);
    let with = |field: &str, value: Value| {
        let mut pod = pod(&[]);
        pod["spec"][field] = value;
        pod
    };
    assert_eq!(left(&with("os", json!({"name": "windows"})), &offered), "not-linux");
    assert_eq!(left(&with("hostUsers", json!(false)), &offered), "host-users");
    assert_eq!(left(&with("priorityClassName", json!("system-node-critical")), &offered), "critical");
    // Who asks gets it.
    let mut asks = with("priorityClassName", json!("system-node-critical"));
    asks["metadata"]["annotations"] = json!(annotations(&[("inject", "enabled")]));
    assert_eq!(paths(&plan(&asks, &offered)), [A]);
}

fn texts() -> impl Strategy<Value = BTreeMap<String, String>> {
    let entry = prop_oneof![
        Just(("packages", A)),
        Just(("packages", "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-jq-1.7/bin/jq")),
        Just(("packages.web", B)),
        Just(("packages.db", B)),
        Just(("containers", "web")),
        Just(("containers", "*")),
        Just(("image", "keep")),
        Just(("image", "distroless")),
        Just(("image", "own:1")),
        Just(("mode", "rw")),
        Just(("command", "hello")),
        Just(("command.log", "[\"x\", \"y\"]")),
        Just(("inject", "enabled")),
        Just(("inject", "disabled")),
        Just(("farm", "enabled")),
        Just((REVISION, "1")),
    ];
    proptest::collection::vec(entry, 0..4).prop_map(|entries| annotations(&entries))
}

fn arbitrary() -> impl Strategy<Value = (Value, Origin)> {
    let label = prop_oneof![Just(None), Just(Some("enabled".to_owned())), Just(Some("disabled".to_owned()))];
    (texts(), texts(), texts(), texts(), label, any::<bool>()).prop_map(
        |(of_pod, of_set, of_deployment, of_namespace, inject, has_command)| {
            let mut pod = pod(&[]);
            pod["metadata"]["annotations"] = json!(of_pod);
            if has_command {
                pod["spec"]["containers"][0]["command"] = json!(["hello"]);
            }
            let with = |owner: Arc<Owner>, annotations| Arc::new(Owner { annotations, ..(*owner).clone() });
            let owners = vec![with(set(&[]), of_set), with(deployment(&[]), of_deployment)];
            let namespace = Namespace { name: "shop".into(), inject, annotations: of_namespace };
            (pod, origin(owners, Arc::new(namespace)))
        },
    )
}

/// What a pod looks like to somebody who means no good: right keys, any values.
fn arbitrary_json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        Just("metadata"),
        Just("annotations"),
        Just("spec"),
        Just("containers"),
        Just("initContainers"),
        Just("name"),
        Just("env"),
        Just("command"),
        Just("volumeMounts"),
        Just("mountPath"),
        Just("volumes"),
        Just("securityContext"),
        Just("nix.lillecarl.com/packages"),
        Just("nix.lillecarl.com/status"),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        Just(json!(true)),
        Just(json!(-1)),
        Just(json!(A)),
        Just(json!("PATH")),
        Just(json!("/nix")),
        Just(json!("{\"v\":1,\"source\":\"\",\"containers\":{}}")),
    ];
    leaf.prop_recursive(6, 48, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key.clone(), inner, 0..6)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn deciding_twice_changes_nothing((pod, origin) in arbitrary()) {
        if let Ok(Decision::Inject(first)) = decide(&pod, &origin, &policy()) {
            let once = inject(&pod, &first);
            match decide(&once, &origin, &policy()) {
                Ok(Decision::Inject(again)) => {
                    prop_assert_eq!(&again.source, &first.source);
                    prop_assert_eq!(inject(&once, &again), once);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn any_json_gets_a_decision(pod in arbitrary_json(), (_, origin) in arbitrary()) {
        if let Ok(Decision::Inject(plan)) = decide(&pod, &origin, &policy()) {
            let meant = inject(&pod, &plan);
            let mut patched = pod.clone();
            json_patch::patch(&mut patched, &json_patch::diff(&pod, &meant)).unwrap();
            prop_assert_eq!(patched, meant);
        }
    }

    #[test]
    fn the_administrators_word_is_the_last((pod, mut origin) in arbitrary()) {
        let mut namespace = (*origin.namespace.unwrap()).clone();
        namespace.inject = Some("disabled".into());
        origin.namespace = Some(Arc::new(namespace));
        let decision = decide(&pod, &origin, &policy());
        let is_left = matches!(decision, Ok(Decision::Leave { reason: "excluded-namespace", .. }));
        prop_assert!(is_left, "{:?}", decision);
    }

    #[test]
    fn a_status_is_no_wish((mut pod, origin) in arbitrary(), forged in "[ -~]{0,40}") {
        let before = decide(&pod, &origin, &policy());
        let status = json!({"v": 1, "source": "pod", "wish": forged, "containers": {"web": {"volume": forged}}});
        pod["metadata"]["annotations"]["nix.lillecarl.com/status"] = json!(status.to_string());
        let after = decide(&pod, &origin, &policy());
        match (before, after) {
            (Ok(Decision::Inject(before)), Ok(Decision::Inject(after))) => prop_assert_eq!(before, after),
            (Ok(Decision::Leave { reason: before, .. }), Ok(Decision::Leave { reason: after, .. })) => {
                prop_assert_eq!(before, after);
            }
            (before, after) => prop_assert_eq!(before, after),
        }
    }
}
