//! Manifests as people write them, unmodified, in a namespace that is opted in: an ImageMap says which packages their
//! images are. Then farming, and the guard, on the same API server.
//!
//! The manifests are `e2e/manifests/*.yaml`. None of their images is on the node.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::Fixtures;
use nix_csi_e2e::cluster::{Namespace, apply, eventually, kubectl, with_namespace};
use serde_json::{Value, json};

const OPTED_IN: &str = "nix.lillecarl.com/inject=enabled";

fn path(name: &str) -> Result<String> {
    Ok(Fixtures::find()?.get(name)?.path.to_string())
}

/// The images of the manifests, as an administrator would say it once for a cluster.
fn image_map() -> Result<Value> {
    let (nginx, python, redis) = (path("nginx")?, path("python3")?, path("redis")?);
    let (busybox, bash) = (path("busybox")?, path("bash")?);
    let site = "daemon off; user root; pid /tmp/nginx.pid; events {} http { access_log off; \
                client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi; \
                uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi; server { listen 80; return 200; } }";
    // The image has a configuration of its own, which is not in the package.
    let serve = format!("echo '{site}' > /tmp/nginx.conf && exec nginx -e stderr -c /tmp/nginx.conf");
    Ok(json!({
        "apiVersion": "nix.lillecarl.com/v1alpha1", "kind": "ImageMap", "metadata": {"name": "real-world"},
        "spec": {"images": [
            {
                "match": "nginxinc/nginx-unprivileged", "packages": [nginx],
                "command": ["nginx", "-e", "stderr", "-c", "/etc/nginx/nginx.conf", "-g", "daemon off; user root;"],
            },
            {
                "match": "nginx:1*", "packages": [nginx, busybox], "command": ["sh", "-c", serve],
            },
            {"match": "docker.io/library/redis:7*", "packages": [redis, bash, path("coreutils")?], "command": ["redis-server"]},
            {"match": "python", "packages": [format!("{python}/bin/python")]},
            {"match": "busybox", "packages": [format!("{busybox}/bin/sh")]},
        ]},
    }))
}

/// The text of a manifest.
fn manifest(name: &str) -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests").join(format!("{name}.yaml"));
    std::fs::read_to_string(&file).with_context(|| file.display().to_string())
}

/// A namespace that is opted in, once the webhook knows that, and the images.
fn with_opted_in(name: &str, test: impl FnOnce(&Namespace) -> Result<()>) -> Result<()> {
    {
        // One for all tests, which run at the same time.
        static APPLIED: Mutex<()> = Mutex::new(());
        let _one_by_one = APPLIED.lock();
        apply(&image_map()?.to_string())?;
    }
    with_namespace(name, |namespace| {
        kubectl(&["label", "namespace", name, OPTED_IN])?;
        namespace.apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "our-cache"},
            "stringData": {"bearer-tokens": "10.90.0.1:8080 token-of-the-cluster-tests\n"},
        }))?;
        eventually("the webhook to know the namespace and the images", || {
            let args = ["run", "probe", "--dry-run=server", "--image=busybox", "-o", "json"];
            Ok(namespace.kubectl(&args)?.contains("nix-csi-").then_some(()))
        })?;
        test(namespace)
    })
}

fn succeeded(namespace: &Namespace, pod: &str) -> Result<()> {
    let phase = "--for=jsonpath={.status.phase}=Succeeded";
    namespace.kubectl(&["wait", phase, &format!("pod/{pod}"), "--timeout=90s"]).map(drop)
}

fn complete(namespace: &Namespace, job: &str) -> Result<String> {
    let job = format!("job/{job}");
    namespace.kubectl(&["wait", "--for=condition=Complete", &job, "--timeout=90s"])?;
    namespace.kubectl(&["logs", &job])
}

fn rolled_out(namespace: &Namespace, what: &str) -> Result<()> {
    namespace.kubectl(&["rollout", "status", what, "--timeout=90s"]).map(drop)
}

/// Every container of every pod with that label runs packages, and its own image is on record.
fn all_injected(namespace: &Namespace, selector: &str, image: &str) -> Result<()> {
    let pods = namespace.get(&["pods", "-l", selector])?;
    for pod in pods["items"].as_array().context("a list")? {
        let status =
            pod["metadata"]["annotations"]["nix.lillecarl.com/status"].as_str().context("a status")?;
        ensure!(status.contains(image), "{status}");
        for container in pod["spec"]["containers"].as_array().context("containers")? {
            ensure!(
                container["image"].as_str().is_some_and(|image| image.contains("distroless")),
                "{container}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_web_server_with_probes_and_a_config_map() -> Result<()> {
    with_opted_in("real-web", |namespace| {
        namespace.apply_text(&manifest("web")?)?;
        rolled_out(namespace, "deployment/web")?;
        all_injected(namespace, "app=web", "nginxinc/nginx-unprivileged:1.27-alpine")?;
        let page = namespace.kubectl(&[
            "get",
            "--raw",
            &format!("/api/v1/namespaces/{}/services/web/proxy/", namespace.name),
        ])?;
        ensure!(page.contains("It works"), "{page}");
        Ok(())
    })
}

#[test]
fn redis_with_its_data_on_a_persistent_volume() -> Result<()> {
    with_opted_in("real-redis", |namespace| {
        // Redis is in a cache for those who have its token.
        kubectl(&["annotate", "namespace", &namespace.name, "nix.lillecarl.com/cache-secret=our-cache"])?;
        apply(
            &json!({
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "real-redis"},
                "spec": {
                    "capacity": {"storage": "64Mi"}, "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"namespace": namespace.name, "name": "data-redis-0"},
                    "hostPath": {"path": "/var/lib/kubelet/real-redis", "type": "DirectoryOrCreate"},
                },
            })
            .to_string(),
        )?;
        namespace.apply_text(&manifest("redis")?)?;
        rolled_out(namespace, "statefulset/redis")?;
        all_injected(namespace, "app=redis", "redis:7.2")?;
        ensure!(namespace.exec("redis-0", &["redis-cli", "set", "key", "kept"])?.1.contains("OK"));
        namespace.kubectl(&["delete", "pod", "redis-0", "--wait"])?;
        rolled_out(namespace, "statefulset/redis")?;
        namespace.ready("redis-0")?;
        ensure!(namespace.exec("redis-0", &["redis-cli", "get", "key"])?.1.contains("kept"));
        kubectl(&["delete", "persistentvolume", "real-redis", "--wait=false"]).map(drop)
    })
}

#[test]
fn a_cron_job_in_a_time_zone() -> Result<()> {
    with_opted_in("real-cron-job", |namespace| {
        namespace.apply_text(&manifest("cronjob")?)?;
        namespace.kubectl(&["create", "job", "--from=cronjob/report", "now"])?;
        assert_eq!(complete(namespace, "now")?, "zone CET\nencoding utf-8\n");
        Ok(())
    })
}

#[test]
fn a_job_with_an_init_container() -> Result<()> {
    with_opted_in("real-job", |namespace| {
        namespace.apply_text(&manifest("job")?)?;
        assert_eq!(complete(namespace, "sum")?, "sum 5050\n");
        Ok(())
    })
}

#[test]
fn a_daemon_set_that_reads_the_host() -> Result<()> {
    with_opted_in("real-daemon-set", |namespace| {
        namespace.apply_text(&manifest("daemonset")?)?;
        rolled_out(namespace, "daemonset/agent")?;
        all_injected(namespace, "app=agent", "busybox:1.36")?;
        eventually("a line of the agent", || {
            Ok(namespace.kubectl(&["logs", "daemonset/agent"])?.contains("node-1: ").then_some(()))
        })
    })
}

#[test]
fn sidecars_of_both_kinds() -> Result<()> {
    with_opted_in("real-sidecars", |namespace| {
        namespace.apply_text(&manifest("sidecars")?)?;
        namespace.ready("sidecars")
    })
}

#[test]
fn what_helm_rendered() -> Result<()> {
    with_opted_in("real-helm", |namespace| {
        namespace.apply_text(&manifest("helm")?)?;
        rolled_out(namespace, "deployment/release-web")?;
        all_injected(namespace, "app.kubernetes.io/instance=release", "nginx:1.16.0")
    })
}

#[test]
fn a_restricted_namespace_with_read_only_roots() -> Result<()> {
    with_opted_in("real-restricted", |namespace| {
        kubectl(&["label", "namespace", &namespace.name, "pod-security.kubernetes.io/enforce=restricted"])?;
        namespace.apply_text(&manifest("restricted")?)?;
        rolled_out(namespace, "deployment/hardened")?;
        all_injected(namespace, "app=hardened", "python:3.12-slim")
    })
}

#[test]
fn root_with_a_read_only_root() -> Result<()> {
    with_opted_in("real-read-only", |namespace| {
        namespace.apply_text(&manifest("read-only")?)?;
        succeeded(namespace, "read-only")?;
        assert_eq!(namespace.kubectl(&["logs", "read-only"])?, "root is read-only: 30\n");
        Ok(())
    })
}

#[test]
fn a_user_that_no_image_knows() -> Result<()> {
    with_opted_in("real-user", |namespace| {
        namespace.apply_text(&manifest("user")?)?;
        let log = complete(namespace, "user")?;
        assert_eq!(log, "uid 12345 gid 3000 groups True\nname uid12345 user uid12345\n");
        Ok(())
    })
}

/// Without an ImageMap: the annotation on the Deployment that is there already, and its restart.
#[test]
fn a_deployment_is_annotated_and_restarted() -> Result<()> {
    with_namespace("real-annotated", |namespace| {
        kubectl(&["label", "namespace", &namespace.name, OPTED_IN])?;
        namespace.apply_text(&manifest("web")?)?;
        let packages = format!("nix.lillecarl.com/packages={}", path("nginx")?);
        let command = r#"nix.lillecarl.com/command=["nginx","-e","stderr","-c","/etc/nginx/nginx.conf","-g","daemon off; user root;"]"#;
        namespace.kubectl(&["annotate", "deployment/web", &packages, command])?;
        namespace.kubectl(&["rollout", "restart", "deployment/web"])?;
        rolled_out(namespace, "deployment/web")?;
        all_injected(namespace, "app=web", "nginxinc/nginx-unprivileged:1.27-alpine")
    })
}

/// A pod that names store paths, and no annotation with packages.
fn farmed(name: &str, image: &str, annotations: &Value, missing: &str) -> Result<Value> {
    let script = format!("{}/bin/hello; echo {missing}; sleep 1000", path("hello")?);
    Ok(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": annotations},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
            "name": "main", "image": image, "imagePullPolicy": "IfNotPresent",
            "command": [format!("{}/bin/bash", path("bash")?), "-c", script],
            "env": [{"name": "PATH", "value": format!("{}/bin", path("coreutils")?)}],
        }]},
    }))
}

#[test]
fn store_paths_in_a_pod_are_found() -> Result<()> {
    let missing = "/nix/store/00000000000000000000000000000000-missing";
    with_opted_in("farming", |namespace| {
        namespace.apply(&farmed(
            "marker",
            "gcr.io/distroless/static-debian12:latest",
            &json!({}),
            missing,
        )?)?;
        namespace.ready("marker")?;
        ensure!(namespace.kubectl(&["logs", "marker"])?.contains("Hello, world!"));
        namespace.event("marker", missing)?;
        // An image of its own keeps its own /nix.
        let mut own = farmed("own", "localhost/busybox:1", &json!({}), "x")?;
        own["spec"]["containers"][0]["command"] = json!(["sleep", "1000"]);
        own["spec"]["containers"][0]["env"] = json!([{"name": "HELLO", "value": path("hello")?}]);
        namespace.apply(&own)?;
        namespace.ready("own")?;
        ensure!(!namespace.get(&["pod", "own"])?["spec"].to_string().contains("nix-csi"));
        Ok(())
    })?;
    with_namespace("not-farming", |namespace| {
        let asked = json!({"nix.lillecarl.com/farm": "enabled"});
        namespace.apply(&farmed("asked", "localhost/busybox:1", &asked, "x")?)?;
        namespace.ready("asked")?;
        let pod = namespace.get(&["pod", "asked"])?;
        assert_eq!(pod["spec"]["containers"][0]["image"], "localhost/busybox:1");
        let plain = farmed("plain", "localhost/busybox:1", &json!({}), "x")?;
        let file = format!("{}/bin/bash", path("bash")?);
        namespace.apply(&plain)?;
        // Nobody looked into it, so its program is not there.
        namespace.event("plain", &file).map(drop)
    })
}

fn deployment(annotations: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}, "annotations": annotations},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
                    "name": "web", "image": "localhost/busybox:1", "command": ["sleep", "1000"],
                }]},
            },
        },
    })
}

/// Each way in which somebody could come by packages: a Deployment and a Pod with a volume by hand first.
fn ways_to_ask(packages: &Value) -> Result<Vec<Value>> {
    let mut by_hand = named(deployment(&json!({})), "by-hand");
    by_hand["spec"]["template"]["spec"]["volumes"] = json!([{"name": "nix", "csi": {
        "driver": "nix-csi.lillecarl.com", "readOnly": true, "volumeAttributes": {"paths": path("busybox")?},
    }}]);
    let spec = by_hand["spec"]["template"]["spec"].clone();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "by-hand"}, "spec": spec});
    let mut on_metadata = named(deployment(&json!({})), "plain");
    on_metadata["metadata"]["annotations"] = packages.clone();
    let mut job = json!({"template": deployment(packages)["spec"]["template"]});
    job["template"]["spec"]["restartPolicy"] = json!("Never");
    let cron_job = json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "by-hand"},
        "spec": {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": job}},
    });
    let mut on_job = cron_job.clone();
    on_job["spec"]["jobTemplate"]["spec"]["template"]["metadata"] = json!({});
    on_job["spec"]["jobTemplate"]["metadata"] = json!({"annotations": packages});
    let mut pretends = pod.clone();
    pretends["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": "x", "controller": true,
    }]);
    Ok(vec![by_hand, pod, on_metadata, cron_job, on_job, pretends])
}

#[test]
fn the_guard_asks_who_may() -> Result<()> {
    let overlay = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/overlays/guard");
    let overlay = overlay.to_str().context("a path of this checkout")?;
    let result = with_namespace("guarded", |namespace| {
        kubectl(&[
            "-n",
            &namespace.name,
            "create",
            "rolebinding",
            "jane",
            "--clusterrole=edit",
            "--user=jane",
        ])?;
        let packages = json!({"nix.lillecarl.com/packages": path("busybox")?});
        // Before there is a guard.
        namespace.apply(&deployment(&packages))?;
        rolled_out(namespace, "deployment/web")?;
        kubectl(&["apply", "-k", overlay])?;
        eventually("the guard", || {
            let (code, said) = namespace.apply_as("jane", &named(deployment(&packages), "probe"), true)?;
            Ok((code != 0 && said.contains("may not use Nix packages")).then_some(()))
        })?;
        for policy in ["nix-csi-guard-pods", "nix-csi-guard-namespaces"] {
            let policy = cluster_object(&["validatingadmissionpolicy", policy])?;
            assert_eq!(policy["status"]["typeChecking"]["expressionWarnings"], Value::Null, "{policy}");
        }
        let jane = |object: &Value| namespace.apply_as("jane", object, false);
        // What has nothing to do with us, and what was there.
        let plain = named(deployment(&json!({})), "plain");
        assert_eq!(jane(&plain)?.0, 0);
        let mut scaled = deployment(&packages);
        scaled["spec"]["replicas"] = json!(2);
        let (code, said) = jane(&scaled)?;
        assert_eq!(code, 0, "{said}");
        rolled_out(namespace, "deployment/web")?;
        let ways = ways_to_ask(&packages)?;
        let [by_hand, pod, ..] = &ways[..] else { anyhow::bail!("a Deployment and a Pod") };
        for object in &ways {
            let (code, said) = jane(object)?;
            let expected = "jane may not use Nix packages in namespace guarded: ask for the label";
            ensure!(code != 0 && said.contains(expected), "{object}: {said}");
        }
        // The right, given to a person.
        kubectl(&[
            "-n",
            &namespace.name,
            "create",
            "rolebinding",
            "may",
            "--clusterrole=nix-csi-user",
            "--user=jane",
        ])?;
        eventually("the right", || Ok((jane(by_hand)?.0 == 0).then_some(())))?;
        kubectl(&["-n", &namespace.name, "delete", "rolebinding", "may"])?;
        eventually("the right to be gone", || Ok((jane(pod)?.0 != 0).then_some(())))?;
        // Or to all in a namespace; but not by whoever may write there.
        kubectl(&[
            "create",
            "clusterrole",
            "labels-namespaces",
            "--verb=get,patch,update",
            "--resource=namespaces",
        ])?;
        kubectl(&[
            "create",
            "clusterrolebinding",
            "jane-labels",
            "--clusterrole=labels-namespaces",
            "--user=jane",
        ])?;
        let label =
            |label: &str| namespace.kubectl_as("jane", &["label", "namespace", &namespace.name, label]);
        eventually("the right to label", || Ok((label("a=b")?.0 == 0).then_some(())))?;
        let (code, said) = label("nix.lillecarl.com/allow=true")?;
        ensure!(code != 0 && said.contains("verb allow on packages.nix.lillecarl.com"), "{said}");
        kubectl(&["label", "namespace", &namespace.name, "nix.lillecarl.com/allow=true"])?;
        eventually("the label", || Ok((jane(pod)?.0 == 0).then_some(())))?;
        let (code, said) = label("another=one")?;
        assert_eq!(code, 0, "{said}");
        Ok(())
    });
    for what in [
        &["delete", "-k", overlay, "--ignore-not-found"][..],
        &["delete", "clusterrolebinding", "jane-labels", "--ignore-not-found"],
        &["delete", "clusterrole", "labels-namespaces", "--ignore-not-found"],
    ] {
        kubectl(what)?;
    }
    result
}

fn named(mut object: Value, name: &str) -> Value {
    object["metadata"]["name"] = json!(name);
    object
}

fn cluster_object(args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&kubectl(&[&["get", "-o", "json"], args].concat())?)?)
}

#[test]
fn an_image_map_says_whether_it_is_valid() -> Result<()> {
    let map = |name: &str, rule: Value| {
        json!({
            "apiVersion": "nix.lillecarl.com/v1alpha1", "kind": "ImageMap", "metadata": {"name": name},
            "spec": {"images": [rule]},
        })
    };
    let good = json!({"match": "registry.invalid/a:1*", "packages": [path("hello")?]});
    apply(&map("is-valid", good.clone()).to_string())?;
    let valid = |name: &str, expected: &str| {
        eventually("a status", || {
            let map = cluster_object(&["imagemap", name])?;
            let condition = &map["status"]["conditions"][0];
            Ok((condition["status"] == expected)
                .then(|| condition["message"].as_str().unwrap_or_default().to_owned()))
        })
    };
    valid("is-valid", "True")?;
    // Past what the schema can say.
    apply(
        &map("is-not", json!({"match": "registry.invalid/Upper:1", "packages": [path("hello")?]}))
            .to_string(),
    )?;
    let said = valid("is-not", "False")?;
    ensure!(said.contains("spec.images[0].match"), "{said}");
    let table = kubectl(&["get", "imagemaps"])?;
    ensure!(table.contains("VALID") && table.contains("registry.invalid/a:1*"), "{table}");
    // Refused by the schema, with a word to the person.
    for (rule, expected) in [
        (json!({"match": "a:*b", "packages": [path("hello")?]}), "one * at the end"),
        (json!({"match": "a/*", "packages": [path("hello")?]}), "there must be a colon before it"),
        (json!({"match": "a@sha256:1", "packages": [path("hello")?]}), "must be a digest"),
        (json!({"match": "a", "packages": ["hello"]}), "expected /nix/store/<hash>-<name>"),
        (json!({"match": "a", "packages": [format!("{}.drv", path("hello")?)]}), "a derivation is not built"),
        (json!({"match": "a", "packages": []}), "spec.images[0].packages"),
        (json!({"match": "a", "packages": [path("hello")?], "args": ["x"]}), "args need a command"),
    ] {
        let said =
            apply(&map("refused", rule.clone()).to_string()).err().context("it was taken")?.to_string();
        ensure!(said.contains(expected), "{rule}: {said}");
    }
    kubectl(&["delete", "imagemaps", "is-valid", "is-not"]).map(drop)
}
