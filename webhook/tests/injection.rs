//! Whole reviews through the router, as an API server sends them, and laws over arbitrary pods.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, to_bytes};
use axum::http::Request;
use nix_csi_certs::LiveCertificate;
use nix_csi_webhook::{
    Decision, Events, Metrics, Origin, Origins, Policy, Reviewer, Serving, decide, inject, router,
};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};
use tower::ServiceExt as _;

const HELLO: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-hello-2.10";
const JQ: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-jq-1.7";

fn policy() -> Policy {
    Policy { distroless: "distroless:root".into(), distroless_nonroot: "distroless:nonroot".into() }
}

async fn call(body: String) -> Value {
    let reviewer = Reviewer {
        policy: policy(),
        excluded: vec!["kube-system".into(), "nix-csi".into()],
        origins: Origins::fixed(&[], Vec::new()),
        events: Events::none(),
        metrics: Metrics::default(),
    };
    let certificate = Arc::new(LiveCertificate::default());
    let serving = Serving { reviewer: Arc::new(reviewer), certificate, since: Instant::now() };
    let request = Request::post("/mutate").header("content-type", "application/json");
    let answer = router(serving).oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer: Value =
        serde_json::from_slice(&to_bytes(answer.into_body(), 1 << 20).await.unwrap()).unwrap();
    // An API server takes no answer without them.
    assert_eq!(answer["apiVersion"], "admission.k8s.io/v1", "{answer}");
    assert_eq!(answer["kind"], "AdmissionReview");
    answer
}

fn review(namespace: &str, pod: &Value) -> String {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": namespace,
            "operation": "CREATE",
            "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller"},
            "object": pod,
            "oldObject": null,
            "dryRun": false,
            "options": {"apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions"}
        }
    })
    .to_string()
}

fn pod(annotations: &Value, containers: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "web-", "annotations": annotations},
        "spec": {"containers": containers, "aFieldOfTheFuture": {"kept": true}}
    })
}

fn nginx() -> Value {
    json!([{"name": "web", "image": "nginx:1.27"}])
}

fn packages(value: &str) -> Value {
    json!({"nix.lillecarl.com/packages": value})
}

/// The pod after the patch of the answer, applied as an API server would.
async fn injected(pod: &Value) -> Value {
    let answer = call(review("shop", pod)).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    if answer["response"]["patch"].is_null() {
        return pod.clone();
    }
    assert_eq!(answer["response"]["patchType"], "JSONPatch");
    // kube writes the bytes as a list of numbers, which Go reads as well as base 64.
    let patch: Vec<u8> = serde_json::from_value(answer["response"]["patch"].clone()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, &patch).unwrap();
    pod
}

async fn denied(pod: &Value) -> String {
    let answer = call(review("shop", pod)).await;
    assert_eq!(answer["response"]["allowed"], false, "{answer}");
    assert_eq!(answer["response"]["patch"], Value::Null);
    answer["response"]["status"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_ordinary_pod_gets_image_volume_path_and_entry_point() {
    let pod = injected(&pod(&packages(HELLO), &nginx())).await;
    let container = &pod["spec"]["containers"][0];
    let volume = &pod["spec"]["volumes"][0];
    assert_eq!(container["image"], "distroless:root");
    assert_eq!(container["imagePullPolicy"], "IfNotPresent");
    assert_eq!(container["command"], json!(["/nix/var/entry/web"]));
    assert_eq!(
        container["volumeMounts"],
        json!([{"name": volume["name"], "mountPath": "/nix", "readOnly": true}])
    );
    assert_eq!(
        container["env"],
        json!([
            {"name": "PATH", "value": "/nix/var/result/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            {"name": "TZDIR", "value": "/usr/share/zoneinfo"},
            {"name": "LANG", "value": "C.UTF-8"},
        ])
    );
    assert_eq!(
        volume["csi"],
        json!({"driver": "nix-csi.lillecarl.com", "readOnly": true,
               "volumeAttributes": {"paths": HELLO, "entrypoint.web": "auto"}})
    );
    let status: Value =
        serde_json::from_str(pod["metadata"]["annotations"]["nix.lillecarl.com/status"].as_str().unwrap())
            .unwrap();
    assert_eq!(status["containers"]["web"]["image"], "nginx:1.27");
    assert_eq!(pod["spec"]["aFieldOfTheFuture"], json!({"kept": true}));
}

#[tokio::test]
async fn a_secret_for_caches_is_named_in_the_volume() {
    let mut annotations = packages(HELLO);
    annotations["nix.lillecarl.com/cache-secret"] = "our-cache".into();
    let named = injected(&pod(&annotations, &nginx())).await;
    let volume = &named["spec"]["volumes"][0];
    assert_eq!(volume["csi"]["nodePublishSecretRef"], json!({"name": "our-cache"}));
    assert_eq!(injected(&named).await, named);
    // Another secret is another volume.
    let plain = injected(&pod(&packages(HELLO), &nginx())).await;
    assert_ne!(plain["spec"]["volumes"][0]["name"], volume["name"]);
}

#[tokio::test]
async fn a_command_is_never_overridden() {
    let containers = json!([{"name": "web", "image": "nginx", "command": ["hello"], "args": ["-t"]}]);
    let pod = injected(&pod(&packages(HELLO), &containers)).await;
    assert_eq!(pod["spec"]["containers"][0]["command"], json!(["hello"]));
    assert_eq!(pod["spec"]["volumes"][0]["csi"]["volumeAttributes"], json!({"paths": HELLO}));
}

#[rstest]
#[case::absent(json!([]), json!([{"name": "PATH", "value": "/nix/var/result/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}]))]
#[case::literal(json!([{"name": "PATH", "value": "/bin"}]), json!([{"name": "PATH", "value": "/nix/var/result/bin:/bin"}]))]
#[case::there_already(json!([{"name": "PATH", "value": "/x:/nix/var/result/bin"}]), json!([{"name": "PATH", "value": "/x:/nix/var/result/bin"}]))]
#[case::from_elsewhere(
    json!([{"name": "PATH", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}]),
    json!([{"name": "NIX_CSI_PATH", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
           {"name": "PATH", "value": "/nix/var/result/bin:$(NIX_CSI_PATH)"}])
)]
#[tokio::test]
async fn the_path(#[case] before: Value, #[case] mut after: Value) {
    let containers = json!([{"name": "web", "image": "nginx", "env": before}]);
    let others =
        json!([{"name": "TZDIR", "value": "/usr/share/zoneinfo"}, {"name": "LANG", "value": "C.UTF-8"}]);
    after.as_array_mut().unwrap().extend(others.as_array().unwrap().clone());
    assert_eq!(injected(&pod(&packages(HELLO), &containers)).await["spec"]["containers"][0]["env"], after);
}

#[rstest]
#[case::root(json!({}), json!({}), "distroless:root")]
#[case::pod_says_so(json!({"runAsNonRoot": true}), json!({}), "distroless:nonroot")]
#[case::container_says_so(json!({}), json!({"runAsNonRoot": true}), "distroless:nonroot")]
#[case::container_says_otherwise(json!({"runAsNonRoot": true}), json!({"runAsNonRoot": false}), "distroless:root")]
#[case::a_user_is_set(json!({"runAsNonRoot": true, "runAsUser": 12345}), json!({}), "distroless:root")]
#[tokio::test]
async fn the_image_follows_the_security_context(
    #[case] of_pod: Value,
    #[case] of_container: Value,
    #[case] image: &str,
) {
    let mut pod =
        pod(&packages(HELLO), &json!([{"name": "web", "image": "n", "securityContext": of_container}]));
    pod["spec"]["securityContext"] = of_pod.clone();
    let after = injected(&pod).await;
    assert_eq!(after["spec"]["containers"][0]["image"], image);
    assert_eq!(after["spec"]["securityContext"], of_pod);
    assert_eq!(after["spec"]["containers"][0]["securityContext"], of_container);
}

#[tokio::test]
async fn containers_by_name_and_sets_by_container() {
    let containers =
        json!([{"name": "a", "image": "a"}, {"name": "b", "image": "b"}, {"name": "c", "image": "c"}]);
    let annotations = json!({
        "nix.lillecarl.com/packages": HELLO,
        "nix.lillecarl.com/packages.b": format!("{JQ} aarch64-linux={HELLO}"),
        "nix.lillecarl.com/containers": "a",
        "nix.lillecarl.com/mode": "rw",
        "nix.lillecarl.com/size-limit": "500Mi",
    });
    let mut before = pod(&annotations, &containers);
    before["spec"]["initContainers"] = json!([{"name": "setup", "image": "s"}]);
    let pod = injected(&before).await;
    let images: Vec<_> = pod["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["image"]).collect();
    assert_eq!(images, ["distroless:root", "distroless:root", "c"]);
    assert_eq!(pod["spec"]["initContainers"], before["spec"]["initContainers"]);
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 2);
    assert!(volumes.iter().all(|volume| volume["csi"]["readOnly"] == false));
    assert_eq!(
        volumes[1]["csi"]["volumeAttributes"],
        json!({
            "paths": JQ, "aarch64-linux": format!("{JQ}\n{HELLO}"), "entrypoint.b": "auto", "sizeLimit": "500Mi",
        })
    );
}

#[tokio::test]
async fn a_kept_image_keeps_its_entry_point() {
    let annotations = json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/image": "keep"});
    let pod = injected(&pod(&annotations, &nginx())).await;
    assert_eq!(pod["spec"]["containers"][0]["image"], "nginx:1.27");
    assert_eq!(pod["spec"]["containers"][0]["command"], Value::Null);
}

#[tokio::test]
async fn the_program_of_a_reference_is_run() {
    let pod = injected(&pod(&packages(&format!("{HELLO}/bin/hello")), &nginx())).await;
    assert_eq!(pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["entrypoint.web"], "bin/hello");
}

#[rstest]
#[case::none(json!({}))]
#[case::of_somebody_else(json!({"example.com/packages": "x"}))]
#[case::disabled(json!({"nix.lillecarl.com/inject": "disabled", "nix.lillecarl.com/packages": HELLO}))]
#[case::only_a_status(json!({"nix.lillecarl.com/status": "{\"v\":1}"}))]
#[case::a_mirror_pod(json!({"kubernetes.io/config.mirror": "x", "nix.lillecarl.com/packages": HELLO}))]
#[tokio::test]
async fn pods_that_are_left_alone(#[case] annotations: Value) {
    let pod = pod(&annotations, &nginx());
    let answer = call(review("shop", &pod)).await;
    assert_eq!(answer["response"]["allowed"], true);
    assert_eq!(
        (&answer["response"]["patch"], &answer["response"]["patchType"]),
        (&Value::Null, &Value::Null)
    );
}

#[tokio::test]
async fn excluded_namespaces_and_other_operations_are_left_alone() {
    let pod = pod(&packages("broken"), &nginx());
    for namespace in ["kube-system", "nix-csi"] {
        assert_eq!(call(review(namespace, &pod)).await["response"]["allowed"], true);
    }
    let update = review("shop", &pod).replace("CREATE", "UPDATE");
    assert_eq!(call(update).await["response"]["allowed"], true);
}

#[rstest]
#[case::not_a_path(
    "hello",
    "nix-csi: annotation nix.lillecarl.com/packages, line 1, column 1: \"hello\" is not a store path; expected /nix/store/<hash>-<name>"
)]
#[case::empty(
    "",
    "nix-csi: annotation nix.lillecarl.com/packages is empty; to keep nix-csi away from a pod, set nix.lillecarl.com/inject: disabled"
)]
#[tokio::test]
async fn references_that_are_none(#[case] value: &str, #[case] message: &str) {
    assert_eq!(denied(&pod(&packages(value), &nginx())).await, message);
}

#[rstest]
#[case::unknown_container(json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/containers": "app"}), "nix-csi: annotation nix.lillecarl.com/containers names container \"app\", which the pod does not have (it has web)")]
#[case::unknown_container_of_packages(json!({"nix.lillecarl.com/packages.app": HELLO}), "nix-csi: annotation nix.lillecarl.com/packages.app names container \"app\", which the pod does not have (it has web)")]
#[case::misspelt(json!({"nix.lillecarl.com/package": HELLO}), "nix-csi: annotation nix.lillecarl.com/package is not known; check its spelling")]
#[case::nothing_for_it(json!({"nix.lillecarl.com/packages.web": HELLO, "nix.lillecarl.com/containers": "web,log"}), "nix-csi: annotation nix.lillecarl.com/containers names container \"log\", which the pod does not have (it has web)")]
#[tokio::test]
async fn denials_name_key_and_container(#[case] annotations: Value, #[case] message: &str) {
    assert_eq!(denied(&pod(&annotations, &nginx())).await, message);
}

#[tokio::test]
async fn what_cannot_work_is_denied() {
    let mounted =
        json!([{"name": "web", "image": "n", "volumeMounts": [{"name": "data", "mountPath": "/nix/"}]}]);
    assert!(
        denied(&pod(&packages(HELLO), &mounted)).await.contains("already mounts volume \"data\" at /nix/;")
    );
    let below =
        json!([{"name": "web", "image": "n", "volumeMounts": [{"name": "data", "mountPath": "/nix/store"}]}]);
    assert!(denied(&pod(&packages(HELLO), &below)).await.contains("volume \"data\" at /nix/store;"));
    let mut windows = pod(&packages(HELLO), &nginx());
    windows["spec"]["os"] = json!({"name": "windows"});
    assert!(denied(&windows).await.contains("run on Linux"));
    let annotations = json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/mode": "rw"});
    let limited = json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/size-limit": "1Gi"});
    assert!(denied(&pod(&limited, &nginx())).await.contains("it needs nix.lillecarl.com/mode: rw"));
    let mut mapped = pod(&annotations, &nginx());
    mapped["spec"]["hostUsers"] = json!(false);
    assert!(denied(&mapped).await.contains("hostUsers: false"));
}

#[rstest]
#[case("")]
#[case("{}")]
#[case("[]")]
#[case("{\"apiVersion\":\"admission.k8s.io/v1\",\"kind\":\"AdmissionReview\"}")]
#[case("\u{0}")]
#[tokio::test]
async fn what_is_no_review_gets_an_answer(#[case] body: &str) {
    let answer = call(body.to_owned()).await;
    assert_eq!(answer["kind"], "AdmissionReview");
    assert_eq!(answer["response"]["allowed"], false);
}

#[tokio::test]
async fn a_container_that_comes_later_is_not_taken() {
    let mut pod = injected(&pod(&packages(HELLO), &nginx())).await;
    let sidecar = json!({"name": "proxy", "image": "proxy:1"});
    pod["spec"]["containers"].as_array_mut().unwrap().push(sidecar.clone());
    let again = injected(&pod).await;
    assert_eq!(again["spec"]["containers"][1], sidecar);
    assert_eq!(again, pod);
}

#[tokio::test]
async fn what_others_changed_since_the_first_call_stays() {
    let mut pod = injected(&pod(&packages(HELLO), &nginx())).await;
    // A registry mirror, AlwaysPullImages, and an injector that wraps commands.
    let container = &mut pod["spec"]["containers"][0];
    container["image"] = json!("mirror/distroless:root");
    container["imagePullPolicy"] = json!("Always");
    container["command"] = json!(["/vault/env"]);
    container["args"] = json!(["/nix/var/entry/web"]);
    assert_eq!(injected(&pod).await, pod);
}

#[tokio::test]
async fn a_forged_record_takes_nothing_away() {
    let containers =
        json!([{"name": "web", "image": "n", "volumeMounts": [{"name": "data", "mountPath": "/srv"}]}]);
    let forged = json!({"v": 1, "source": "pod", "containers": {"web": {"volume": "data"}}});
    let mut pod = pod(&packages(HELLO), &containers);
    pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
    pod["metadata"]["annotations"]["nix.lillecarl.com/status"] = json!(forged.to_string());
    let after = injected(&pod).await;
    assert_eq!(
        after["spec"]["containers"][0]["volumeMounts"][0],
        json!({"name": "data", "mountPath": "/srv"})
    );
    assert_eq!(after["spec"]["volumes"][0], json!({"name": "data", "emptyDir": {}}));
}

#[rstest]
#[case::istio(json!({"sidecar.istio.io/status": "{\"containers\": [\"proxy\"]}"}), "proxy")]
#[case::linkerd(json!({"linkerd.io/proxy-version": "2.18"}), "linkerd-proxy")]
#[tokio::test]
async fn sidecars_of_others_are_not_taken(#[case] mut annotations: Value, #[case] name: &str) {
    annotations["nix.lillecarl.com/packages"] = json!(HELLO);
    let sidecar = json!({"name": name, "image": "proxy:1"});
    let after = injected(&pod(&annotations, &json!([{"name": "web", "image": "n"}, sidecar]))).await;
    assert_eq!(after["spec"]["containers"][0]["image"], "distroless:root");
    assert_eq!(after["spec"]["containers"][1], sidecar);
}

#[tokio::test]
async fn whoever_wants_nothing_need_not_get_the_rest_right() {
    let annotations = json!({"nix.lillecarl.com/packages": "", "nix.lillecarl.com/inject": "disabled", "nix.lillecarl.com/x": ""});
    let before = pod(&annotations, &nginx());
    assert_eq!(injected(&before).await, before);
}

#[tokio::test]
async fn a_forged_record_changes_nothing() {
    let forged = json!({"v": 1, "source": "pod", "containers": {"other": {"volume": "x", "image": "evil"}}});
    let mut forged_pod = pod(&packages(HELLO), &nginx());
    forged_pod["metadata"]["annotations"]["nix.lillecarl.com/status"] = json!(forged.to_string());
    assert_eq!(injected(&forged_pod).await, injected(&pod(&packages(HELLO), &nginx())).await);
}

#[tokio::test]
async fn other_packages_the_second_time_replace_the_first() {
    let mut pod = injected(&pod(&packages(HELLO), &nginx())).await;
    pod["metadata"]["annotations"]["nix.lillecarl.com/packages"] = json!(JQ);
    let again = injected(&pod).await;
    assert_eq!(again["spec"]["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(again["spec"]["volumes"][0]["csi"]["volumeAttributes"]["paths"], JQ);
    assert_eq!(again["spec"]["containers"][0]["volumeMounts"].as_array().unwrap().len(), 1);
}

fn container(name: String) -> impl Strategy<Value = Value> {
    let env = prop_oneof![
        Just(json!(null)),
        Just(json!([{"name": "A", "value": "1"}])),
        Just(json!([{"name": "PATH", "value": ""}])),
        Just(json!([{"name": "PATH", "value": "/bin"}, {"name": "B"}])),
        Just(json!([{"name": "PATH", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}])),
    ];
    let command = prop_oneof![Just(json!(null)), Just(json!([])), Just(json!(["sh", "-c"]))];
    (env, command, any::<bool>()).prop_map(move |(env, command, nonroot)| {
        json!({"name": name, "image": "i", "env": env, "command": command, "securityContext": {"runAsNonRoot": nonroot}})
    })
}

fn arbitrary_pod() -> impl Strategy<Value = Value> {
    let wish = prop_oneof![
        Just(packages(HELLO)),
        Just(packages(&format!("{HELLO}/bin/hello, {JQ}"))),
        Just(json!({"nix.lillecarl.com/packages.c0": JQ, "nix.lillecarl.com/mode": "rw"})),
        Just(
            json!({"nix.lillecarl.com/packages": JQ, "nix.lillecarl.com/mode": "rw", "nix.lillecarl.com/size-limit": "1Gi"})
        ),
        Just(json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/packages.c0": JQ})),
        Just(
            json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/image": "keep", "nix.lillecarl.com/command": "x"})
        ),
        Just(json!({"nix.lillecarl.com/packages": HELLO, "nix.lillecarl.com/command": "[\"x\"]"})),
    ];
    (wish, container("c0".into()), container("c1".into()), container("i".into()), any::<bool>()).prop_map(
        |(wish, a, b, init, two)| {
            let mut pod = pod(&wish, &if two { json!([a, b]) } else { json!([a]) });
            pod["spec"]["initContainers"] = json!([init]);
            pod
        },
    )
}

fn apply(pod: &Value) -> Value {
    match decide(pod, &Origin::default(), &policy()) {
        Ok(Decision::Inject(plan)) => inject(pod, &plan),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn injecting_twice_changes_nothing(pod in arbitrary_pod()) {
        let once = apply(&pod);
        prop_assert_eq!(apply(&once), once);
    }

    #[test]
    fn the_patch_gives_the_pod_we_meant(pod in arbitrary_pod()) {
        let meant = apply(&pod);
        let mut patched = pod.clone();
        json_patch::patch(&mut patched, &json_patch::diff(&pod, &meant)).unwrap();
        prop_assert_eq!(patched, meant);
    }

    #[test]
    fn any_annotation_is_an_answer(key in "[a-z.-]{0,20}", value in ".{0,60}") {
        let pod = pod(&json!({format!("nix.lillecarl.com/{key}"): value, "nix.lillecarl.com/packages": HELLO}), &nginx());
        let _ = decide(&pod, &Origin::default(), &policy());
    }
}
