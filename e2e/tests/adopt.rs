//! What is already there and nobody rewrites: annotations on what owns pods, and Namespaces that are opted in.
//!
//! `make cluster-tests` starts the cluster and installs nix-csi. One namespace for each test.

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::Fixtures;
use nix_csi_e2e::cluster::{Namespace, eventually, kubectl, with_namespace};
use serde_json::{Value, json};

const PACKAGES: &str = "nix.lillecarl.com/packages";
const STATUS: &str = "nix.lillecarl.com/status";
const OPT_IN: &str = "nix.lillecarl.com/inject=enabled";
const BUSYBOX: &str = "localhost/busybox:1";

fn packages(names: &[&str]) -> Result<String> {
    let fixtures = Fixtures::find()?;
    let path = |name: &&str| Ok::<_, anyhow::Error>(fixtures.get(name)?.path.to_string());
    Ok(names.iter().map(path).collect::<Result<Vec<_>>>()?.join(" "))
}

/// What people have: an image with programs, and none of our annotations.
fn template(command: &[&str]) -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "web", "image": BUSYBOX, "command": command}],
        },
    })
}

fn workload(kind: &str, spec: &Value) -> Value {
    let mut all =
        json!({"selector": {"matchLabels": {"app": "web"}}, "template": template(&["sleep", "1000"])});
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "web"}, "spec": all})
}

/// Runs `test` in a namespace that is opted in.
fn with_opted_in(name: &str, test: impl FnOnce(&Namespace) -> Result<()>) -> Result<()> {
    with_namespace(name, |namespace| {
        kubectl(&["label", "namespace", name, OPT_IN])?;
        test(namespace)
    })
}

fn rolled_out(namespace: &Namespace, what: &str) -> Result<()> {
    namespace.kubectl(&["rollout", "status", what, "--timeout=90s"]).map(drop)
}

/// The pods that are not about to end, once there are `count`.
fn pods(namespace: &Namespace, count: usize) -> Result<Vec<Value>> {
    eventually(&format!("{count} pods"), || {
        let all = namespace.get(&["pods", "-l", "app=web"])?;
        let all = all["items"].as_array().context("a list")?.iter();
        let staying: Vec<_> =
            all.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().collect();
        Ok((staying.len() == count).then_some(staying))
    })
}

fn status(pod: &Value) -> Option<Value> {
    serde_json::from_str(pod["metadata"]["annotations"][STATUS].as_str()?).ok()
}

fn name(pod: &Value) -> Result<&str> {
    pod["metadata"]["name"].as_str().context("a name")
}

/// The volume of ours, and that hello runs.
fn runs_hello(namespace: &Namespace, pod: &Value, source: &str) -> Result<()> {
    let status = status(pod).with_context(|| format!("{} was not injected", pod["metadata"]))?;
    assert_eq!(status["source"], source);
    namespace.ready(name(pod)?)?;
    assert_eq!(namespace.exec(name(pod)?, &["hello"])?, (0, "Hello, world!\n".to_owned()));
    Ok(())
}

fn is_plain(pod: &Value) {
    assert_eq!(status(pod), None, "{}", pod["metadata"]);
    assert_eq!(pod["spec"]["containers"][0]["image"], BUSYBOX);
    assert!(!pod["spec"]["volumes"].to_string().contains("nix-csi"));
}

#[test]
fn a_deployment_is_annotated_restarted_scaled_undone_and_relieved() -> Result<()> {
    with_opted_in("adopt-deployment", |namespace| {
        let deployment = "deployment/web";
        namespace.apply(&workload("Deployment", &json!({})))?;
        rolled_out(namespace, deployment)?;

        let annotation = format!("{PACKAGES}={}", packages(&["hello", "coreutils"])?);
        let said = namespace.said(&["annotate", deployment, &annotation])?;
        assert!(said.contains("rollout restart deployments/web"), "{said}");
        assert!(!said.contains("inject=enabled"), "{said}");
        // What runs goes on, and it is said that it lacks something.
        is_plain(&pods(namespace, 1)?[0]);
        let said = namespace.event("web", "pods run without the Nix packages of Deployment/web")?;
        assert!(said.contains("rollout restart deployment/web"), "{said}");

        namespace.kubectl(&["rollout", "restart", deployment])?;
        rolled_out(namespace, deployment)?;
        let injected = pods(namespace, 1)?;
        runs_hello(namespace, &injected[0], "Deployment/web")?;
        assert_ne!(injected[0]["spec"]["containers"][0]["image"], BUSYBOX);
        namespace.event("web", "new pods get Nix packages in web")?;

        namespace.kubectl(&["scale", deployment, "--replicas=3"])?;
        rolled_out(namespace, deployment)?;
        for pod in pods(namespace, 3)? {
            runs_hello(namespace, &pod, "Deployment/web")?;
        }

        // The template goes back; the annotation was on the Deployment at that time, too.
        namespace.kubectl(&["scale", deployment, "--replicas=1"])?;
        namespace.kubectl(&["rollout", "undo", deployment])?;
        rolled_out(namespace, deployment)?;
        runs_hello(namespace, &pods(namespace, 1)?[0], "Deployment/web")?;

        // Removed: the ReplicaSet still has its copy, and it counts no more.
        let said = namespace.said(&["annotate", deployment, &format!("{PACKAGES}-")])?;
        assert!(said.contains("rollout restart"), "{said}");
        namespace.kubectl(&["delete", "pods", "--all", "--wait", "--timeout=60s"])?;
        rolled_out(namespace, deployment)?;
        is_plain(&pods(namespace, 1)?[0]);
        Ok(())
    })
}

#[test]
fn a_rollback_brings_back_the_packages_of_its_time() -> Result<()> {
    with_opted_in("adopt-rollback", |namespace| {
        let version = |names: &[&str], version: &str| -> Result<()> {
            let mut deployment = workload("Deployment", &json!({}));
            deployment["metadata"]["annotations"] = json!({PACKAGES: packages(names)?});
            deployment["spec"]["template"]["metadata"]["labels"]["version"] = version.into();
            namespace.apply(&deployment)?;
            rolled_out(namespace, "deployment/web")
        };
        let paths = || -> Result<Value> {
            let pods = pods(namespace, 1)?;
            let volumes = pods[0]["spec"]["volumes"].as_array().context("volumes")?;
            let volume = volumes.iter().find(|volume| !volume["csi"].is_null()).context("a CSI volume")?;
            Ok(volume["csi"]["volumeAttributes"]["paths"].clone())
        };
        version(&["coreutils", "hello"], "1")?;
        let first = paths()?;
        version(&["coreutils", "jq"], "2")?;
        assert_ne!(paths()?, first);
        namespace.kubectl(&["rollout", "undo", "deployment/web"])?;
        rolled_out(namespace, "deployment/web")?;
        assert_eq!(paths()?, first);
        Ok(())
    })
}

#[test]
fn a_stateful_set_and_a_daemon_set() -> Result<()> {
    let spec = |kind: &str| if kind == "StatefulSet" { json!({"serviceName": "web"}) } else { json!({}) };
    for kind in ["StatefulSet", "DaemonSet"] {
        let lower = kind.to_ascii_lowercase();
        with_opted_in(&format!("adopt-{lower}"), |namespace| {
            let what = format!("{lower}/web");
            namespace.apply(&workload(kind, &spec(kind)))?;
            rolled_out(namespace, &what)?;
            let annotation = format!("{PACKAGES}={}", packages(&["hello", "coreutils"])?);
            namespace.kubectl(&["annotate", &what, &annotation])?;
            namespace.kubectl(&["rollout", "restart", &what])?;
            rolled_out(namespace, &what)?;
            runs_hello(namespace, &pods(namespace, 1)?[0], &format!("{kind}/web"))
        })?;
    }
    Ok(())
}

#[test]
fn a_job_and_a_cron_job() -> Result<()> {
    with_opted_in("adopt-jobs", |namespace| {
        let mut template = template(&["hello"]);
        template["spec"]["restartPolicy"] = "Never".into();
        let job = json!({"backoffLimit": 0, "template": template});
        let annotations = json!({PACKAGES: packages(&["hello"])?});
        namespace.apply(&json!({
            "apiVersion": "batch/v1", "kind": "CronJob",
            "metadata": {"name": "often", "annotations": annotations},
            "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": job}},
        }))?;
        namespace.apply(&json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": "once", "annotations": annotations}, "spec": job,
        }))?;
        for source in ["Job/once", "CronJob/often"] {
            let pod = eventually(&format!("a pod of {source} that has succeeded"), || {
                let pods = namespace.get(&["pods"])?;
                let pods = pods["items"].as_array().context("a list")?;
                let is_one = |pod: &&Value| {
                    pod["status"]["phase"] == "Succeeded"
                        && status(pod).is_some_and(|status| status["source"] == source)
                };
                Ok(pods.iter().find(is_one).cloned())
            })?;
            assert_eq!(namespace.kubectl(&["logs", name(&pod)?])?, "Hello, world!\n");
        }
        Ok(())
    })
}

#[test]
fn a_namespace_offers_packages_and_images_stay() -> Result<()> {
    with_opted_in("adopt-namespace", |namespace| {
        namespace.apply(&workload("Deployment", &json!({})))?;
        rolled_out(namespace, "deployment/web")?;
        is_plain(&pods(namespace, 1)?[0]);
        let annotation = format!("{PACKAGES}={}", packages(&["hello"])?);
        kubectl(&["annotate", "namespace", &namespace.name, &annotation])?;
        let source = format!("Namespace/{}", namespace.name);
        eventually("the webhook to know it", || {
            namespace.kubectl(&["rollout", "restart", "deployment/web"])?;
            rolled_out(namespace, "deployment/web")?;
            Ok(status(&pods(namespace, 1)?[0]).map(drop))
        })?;
        let injected = pods(namespace, 1)?;
        runs_hello(namespace, &injected[0], &source)?;
        assert_eq!(injected[0]["spec"]["containers"][0]["image"], BUSYBOX);
        // Its own programs are there, too.
        assert_eq!(namespace.exec(name(&injected[0])?, &["busybox", "true"])?.0, 0);

        // Whoever does not want it says so.
        let mut without = workload("Deployment", &json!({}));
        without["metadata"]["annotations"] = json!({"nix.lillecarl.com/inject": "disabled"});
        without["spec"]["template"]["metadata"]["labels"]["version"] = "2".into();
        namespace.apply(&without)?;
        rolled_out(namespace, "deployment/web")?;
        is_plain(&pods(namespace, 1)?[0]);

        // And the administrator has the last word.
        kubectl(&[
            "label",
            "namespace",
            "--overwrite",
            &namespace.name,
            "nix.lillecarl.com/inject=disabled",
        ])?;
        let mut asks = workload("Deployment", &json!({}));
        asks["spec"]["template"]["metadata"]["annotations"] = json!({PACKAGES: packages(&["hello"])?});
        namespace.apply(&asks)?;
        rolled_out(namespace, "deployment/web")?;
        is_plain(&pods(namespace, 1)?[0]);
        Ok(())
    })
}

#[test]
fn who_annotates_wrongly_is_told_on_the_deployment() -> Result<()> {
    with_opted_in("adopt-wrong", |namespace| {
        let mut deployment = workload("Deployment", &json!({}));
        deployment["metadata"]["annotations"] = json!({PACKAGES: "#\nhello"});
        namespace.apply(&deployment)?;
        let said = namespace.event("web", "annotation nix.lillecarl.com/packages, line 2, column 1")?;
        assert!(
            said.starts_with("nix-csi: ReplicaSet/web-") || said.starts_with("nix-csi: Deployment/web"),
            "{said}"
        );
        let events = namespace.get(&["events", "--field-selector=reason=NixRefused"])?;
        assert_eq!(events["items"][0]["involvedObject"]["kind"], "Deployment");
        // Corrected, it goes on by itself.
        namespace.kubectl(&["annotate", "deployment/web", &format!("{PACKAGES}-")])?;
        eventually("the pod", || Ok(pods(namespace, 1).ok().map(drop)))
    })
}

#[test]
fn a_forged_status_changes_nothing() -> Result<()> {
    with_opted_in("adopt-forged", |namespace| {
        let annotation = format!("{PACKAGES}={}", packages(&["hello", "coreutils"])?);
        kubectl(&["annotate", "namespace", &namespace.name, &annotation])?;
        let mut specs = Vec::new();
        for (name, forged) in [
            ("honest", None),
            ("empty", Some(json!({"v": 1, "source": "pod", "wish": "", "containers": {}}))),
            (
                "served",
                Some(json!({
                    "v": 1, "source": "pod", "wish": "0000000000000000",
                    "containers": {"other": {"volume": "nix-csi-0000000000", "image": "evil"}},
                })),
            ),
        ] {
            let mut pod = template(&["sleep", "1000"]);
            pod["apiVersion"] = "v1".into();
            pod["kind"] = "Pod".into();
            pod["metadata"]["name"] = name.into();
            if let Some(forged) = forged {
                pod["metadata"]["annotations"] = json!({STATUS: forged.to_string()});
            }
            let pod = eventually("the webhook to know what the namespace offers", || {
                namespace.kubectl(&["delete", "pod", name, "--ignore-not-found", "--wait"])?;
                namespace.apply(&pod)?;
                let pod = namespace.get(&["pod", name])?;
                let has_volume = pod["spec"]["volumes"].to_string().contains("nix-csi.lillecarl.com");
                Ok(has_volume.then_some(pod))
            })?;
            let status = status(&pod).context("a status")?;
            assert_eq!(status["source"], format!("Namespace/{}", namespace.name));
            let container = &pod["spec"]["containers"][0];
            let mounts = container["volumeMounts"].as_array().context("mounts")?;
            let of_ours = mounts.iter().find(|mount| mount["mountPath"] == "/nix").cloned();
            specs.push((container["image"].clone(), container["env"].clone(), of_ours));
        }
        ensure!(specs.windows(2).all(|two| two[0] == two[1]), "{specs:?}");
        Ok(())
    })
}

#[test]
fn a_container_to_debug_with_sees_the_packages() -> Result<()> {
    with_namespace("adopt-debug", |namespace| {
        let mut pod = template(&["sleep", "1000"]);
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = "web".into();
        pod["metadata"]["annotations"] = json!({PACKAGES: packages(&["hello", "coreutils"])?});
        namespace.apply(&pod)?;
        namespace.ready("web")?;
        let image = format!("--image={BUSYBOX}");
        let debug = ["debug", "web", &image, "--container=debugger", "--target=web", "--", "sleep", "1000"];
        namespace.kubectl(&debug)?;
        eventually("hello in the container", || {
            let hello = ["-c", "debugger", "--", "/nix/var/result/bin/hello"];
            let said = namespace.said(&[&["exec", "web"], &hello[..]].concat());
            Ok(said.is_ok_and(|said| said == "Hello, world!\n").then_some(()))
        })
    })
}

/// Annotations on owners in a namespace that says nothing: not read, until the administrator wants it so.
#[test]
fn owners_everywhere() -> Result<()> {
    with_namespace("adopt-everywhere", |namespace| {
        let mut deployment = workload("Deployment", &json!({}));
        deployment["metadata"]["annotations"] = json!({PACKAGES: packages(&["hello", "coreutils"])?});
        let said = namespace.said_when_applied(&deployment)?;
        assert!(
            said.contains("only if the namespace has the label nix.lillecarl.com/inject=enabled"),
            "{said}"
        );
        rolled_out(namespace, "deployment/web")?;
        is_plain(&pods(namespace, 1)?[0]);

        let overlay =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/overlays/owner-everywhere/webhook.yaml");
        let configuration = "mutatingwebhookconfiguration/00-nix-csi";
        kubectl(&["patch", configuration, "--type=json", "--patch-file", overlay])?;
        let adopted = eventually("the entry to have its caBundle, and a pod to be injected", || {
            namespace.kubectl(&["rollout", "restart", "deployment/web"])?;
            rolled_out(namespace, "deployment/web")?;
            let pods = pods(namespace, 1)?;
            Ok(status(&pods[0]).is_some().then_some(pods))
        })
        .and_then(|pods| runs_hello(namespace, &pods[0], "Deployment/web"));
        let last = r#"[{"op": "remove", "path": "/webhooks/3"}]"#;
        kubectl(&["patch", configuration, "--type=json", "-p", last])?;
        adopted
    })
}
