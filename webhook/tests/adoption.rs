//! Reviews of pods that say nothing themselves, through the router: by their owner, by their Namespace, and when it is
//! not known what those say.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, Uri};
use axum::response::Json;
use axum::routing::get;
use nix_csi_certs::LiveCertificate;
use nix_csi_webhook::{
    Events, Metrics, Namespace, ObjectRef, Origins, Owner, Policy, Reviewer, Serving, observed, router,
};
use serde_json::{Value, json};
use tower::ServiceExt as _;

const HELLO: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-hello-2.10";
const PACKAGES: &str = "nix.lillecarl.com/packages";
const REVISION: &str = "deployment.kubernetes.io/revision";

fn serving(origins: Origins, metrics: Metrics) -> Serving {
    let reviewer = Reviewer {
        policy: Policy { distroless: "root".into(), distroless_nonroot: "nonroot".into() },
        excluded: vec!["kube-system".into(), "nix-csi".into()],
        origins,
        events: Events::none(),
        metrics,
    };
    let certificate = Arc::new(LiveCertificate::default());
    Serving { reviewer: Arc::new(reviewer), certificate, since: Instant::now() }
}

fn object(kind: &str, name: &str) -> ObjectRef {
    ObjectRef {
        api_version: "apps/v1".into(),
        kind: kind.into(),
        name: name.into(),
        uid: format!("uid-of-{name}"),
    }
}

fn texts(all: &[(&str, &str)]) -> BTreeMap<String, String> {
    all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Deployment `web`, its current ReplicaSet `web-2`, and an older one.
fn owners(of_deployment: &[(&str, &str)]) -> Vec<Owner> {
    let deployment = object("Deployment", "web");
    let set = |name: &str, revision: &str| Owner {
        object: object("ReplicaSet", name),
        annotations: texts(&[(REVISION, revision)]),
        controller: Some(deployment.clone()),
    };
    let mut annotations = texts(of_deployment);
    annotations.insert(REVISION.into(), "2".into());
    vec![
        set("web-1", "1"),
        set("web-2", "2"),
        Owner { object: deployment.clone(), annotations, controller: None },
    ]
}

fn pod(owner: Option<&ObjectRef>, annotations: &Value) -> Value {
    let owner = owner.map(|owner| {
        json!([{"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid, "controller": true}])
    });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "web-", "annotations": annotations, "ownerReferences": owner},
        "spec": {"containers": [{"name": "web", "image": "nginx:1.27"}]},
    })
}

async fn review(serving: &Serving, path: &str, pod: &Value) -> Value {
    let review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": "shop", "operation": "CREATE", "userInfo": {}, "object": pod, "dryRun": false,
        },
    });
    let request = Request::post(path).header("content-type", "application/json");
    let request = request.body(Body::from(review.to_string())).unwrap();
    let answer = router(serving.clone()).oneshot(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    serde_json::from_slice(&to_bytes(answer.into_body(), 1 << 20).await.unwrap()).unwrap()
}

fn decision(answer: &Value) -> &str {
    answer["response"]["auditAnnotations"]["decision"].as_str().unwrap()
}

#[tokio::test]
async fn a_pod_gets_what_its_deployment_says() {
    let serving = serving(Origins::fixed(&owners(&[(PACKAGES, HELLO)]), Vec::new()), Metrics::default());
    let current = pod(Some(&object("ReplicaSet", "web-2")), &json!({}));
    let answer = review(&serving, "/mutate/owner", &current).await;
    assert_eq!(decision(&answer), "injected", "{answer}");
    assert_eq!(answer["response"]["auditAnnotations"]["source"], "Deployment/web");
    // An older ReplicaSet counts by itself, and an object of the same name is not the owner.
    let older = pod(Some(&object("ReplicaSet", "web-1")), &json!({}));
    assert_eq!(decision(&review(&serving, "/mutate/owner", &older).await), "no-packages");
    let mut other = object("ReplicaSet", "web-2");
    other.uid = "another".into();
    let answer = review(&serving, "/mutate/owner", &pod(Some(&other), &json!({}))).await;
    assert_eq!(decision(&answer), "no-packages");
    assert_eq!(answer["response"]["patch"], Value::Null);
}

#[tokio::test]
async fn a_wrong_annotation_of_a_deployment_is_named() {
    let serving = serving(Origins::fixed(&owners(&[(PACKAGES, "hello")]), Vec::new()), Metrics::default());
    let current = pod(Some(&object("ReplicaSet", "web-2")), &json!({}));
    let answer = review(&serving, "/mutate/namespace", &current).await;
    assert_eq!(answer["response"]["allowed"], false);
    assert_eq!(answer["response"]["auditAnnotations"]["reason"], "annotation");
    let message = answer["response"]["status"]["message"].as_str().unwrap();
    let expected =
        "nix-csi: Deployment/web: annotation nix.lillecarl.com/packages, line 1, column 1: \"hello\"";
    assert!(message.starts_with(expected), "{message}");
}

#[tokio::test]
async fn a_namespace_that_is_opted_in_offers_packages() {
    let inject = Some("enabled".to_owned());
    let shop = Namespace { name: "shop".into(), inject, annotations: texts(&[(PACKAGES, HELLO)]) };
    let metrics = Metrics::default();
    let serving = serving(Origins::fixed(&[], vec![shop]), metrics.clone());
    let answer = review(&serving, "/mutate/namespace", &pod(None, &json!({}))).await;
    assert_eq!(decision(&answer), "injected");
    assert!(answer["response"]["warnings"].to_string().contains("sets no PATH"), "{answer}");
    let disabled = pod(None, &json!({"nix.lillecarl.com/inject": "disabled"}));
    assert_eq!(decision(&review(&serving, "/mutate", &disabled).await), "disabled");

    let request = Request::get("/metrics").body(Body::empty()).unwrap();
    let answer = observed(serving).oneshot(request).await.unwrap();
    let text = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    for line in [
        "nix_csi_webhook_reviews_total{entry=\"namespace\",decision=\"injected\"} 1",
        "nix_csi_webhook_reviews_total{entry=\"pod\",decision=\"disabled\"} 1",
        "nix_csi_webhook_known_objects{kind=\"Namespace\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
}

/// An API server on a loopback port that answers `found`, or nothing for a long time.
async fn api_server(found: impl Fn(&Uri) -> Option<Value> + Clone + Send + Sync + 'static) -> kube::Client {
    let answer = move |uri: Uri| {
        let found = found.clone();
        async move {
            if uri.path().ends_with("/never") {
                tokio::time::sleep(Duration::from_mins(1)).await;
            }
            if let Some(object) = found(&uri) {
                (StatusCode::OK, Json(object))
            } else {
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404});
                (StatusCode::NOT_FOUND, Json(status))
            }
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, Router::new().fallback(get(answer))).into_future());
    let _ = rustls::crypto::ring::default_provider().install_default();
    kube::Client::try_from(kube::Config::new(format!("http://{address}").parse().unwrap())).unwrap()
}

#[tokio::test]
async fn an_owner_that_is_not_known_yet_is_asked_for() {
    let client = api_server(|uri| {
        let (name, annotations) = match uri.path() {
            "/api/v1/namespaces/shop" => ("shop", json!({})),
            "/apis/apps/v1/namespaces/shop/replicasets/web-2" => ("web-2", json!({PACKAGES: HELLO})),
            _ => return None,
        };
        let metadata = json!({"name": name, "uid": format!("uid-of-{name}"), "annotations": annotations});
        Some(json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}))
    })
    .await;
    let metrics = Metrics::default();
    let serving = serving(Origins::new(client, [], metrics.clone()), metrics);
    let fresh = pod(Some(&object("ReplicaSet", "web-2")), &json!({}));
    let answer = review(&serving, "/mutate/namespace", &fresh).await;
    assert_eq!(decision(&answer), "injected", "{answer}");
    // One that is gone says nothing.
    let gone = pod(Some(&object("ReplicaSet", "web-3")), &json!({}));
    assert_eq!(decision(&review(&serving, "/mutate/namespace", &gone).await), "no-packages");
}

#[tokio::test]
async fn nobody_waits_long_for_an_owner() {
    let client = api_server(|_| None).await;
    let serving = serving(Origins::new(client, [], Metrics::default()), Metrics::default());
    let never = object("StatefulSet", "never");
    let began = Instant::now();
    let answer = review(&serving, "/mutate/namespace", &pod(Some(&never), &json!({}))).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!((decision(&answer), &answer["response"]["allowed"]), ("owner-unknown", &json!(true)));
    assert_eq!(answer["response"]["patch"], Value::Null);
    // A pod that says it all itself needs nobody.
    let began = Instant::now();
    let annotated = pod(Some(&never), &json!({PACKAGES: HELLO}));
    assert_eq!(decision(&review(&serving, "/mutate", &annotated).await), "injected");
    assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
}

#[tokio::test]
async fn readiness_does_not_wait_for_ever_for_what_cannot_be_listed() {
    let client = api_server(|_| None).await;
    let mut serving = serving(Origins::new(client, [], Metrics::default()), Metrics::default());
    let ready = async |serving: &Serving| {
        let request = Request::get("/readyz").body(Body::empty()).unwrap();
        let answer = router(serving.clone()).oneshot(request).await.unwrap();
        String::from_utf8(to_bytes(answer.into_body(), 1 << 10).await.unwrap().to_vec()).unwrap()
    };
    assert_eq!(ready(&serving).await, "no certificate yet");
    let names = ["a".to_owned()];
    let now = std::time::SystemTime::now().into();
    serving.certificate.set(&nix_csi_certs::Bundle::generate(&names, now).unwrap()).unwrap();
    assert_eq!(ready(&serving).await, "owners and namespaces are not all known yet");
    serving.since = Instant::now().checked_sub(Duration::from_secs(31)).unwrap();
    assert_eq!(ready(&serving).await, "ok");
}
