//! nix-csi on a real Kubernetes: what users do, and what they must not be able to do.
//!
//! `make cluster-tests` starts the cluster and installs nix-csi. One namespace for each test.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use nix_csi_e2e::cluster::{Namespace, eventually, kubectl, on_node, with_namespace};
use nix_csi_e2e::{Fixtures, nix};
use serde_json::{Value, json};

const PACKAGES: &str = "nix.lillecarl.com/packages";

fn path(name: &str) -> Result<String> {
    Ok(Fixtures::find()?.get(name)?.path.to_string())
}

fn packages(names: &[&str]) -> Result<String> {
    Ok(names.iter().map(|name| path(name)).collect::<Result<Vec<_>>>()?.join("\n"))
}

/// A pod as people write it; the image is of no importance, and is not there.
fn pod(name: &str, annotations: &Value, container: &Value) -> Value {
    let mut main = json!({"name": "main", "image": "registry.invalid/any:1"});
    for (key, value) in container.as_object().into_iter().flatten() {
        main[key] = value.clone();
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "containers": [main]},
    })
}

fn shell(name: &str, more: &Value) -> Result<Value> {
    let mut annotations = json!({PACKAGES: packages(&["bash", "coreutils", "hello"])?});
    for (key, value) in more.as_object().into_iter().flatten() {
        annotations[key] = value.clone();
    }
    Ok(pod(name, &annotations, &json!({"command": ["bash", "-c", "sleep 1000"]})))
}

#[test]
fn a_deployment_of_three_runs_a_package() -> Result<()> {
    with_namespace("deployment", |namespace| {
        let loop_of_hello = "while hello; do sleep 1; done";
        namespace.apply(&json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {
                    "metadata": {
                        "labels": {"app": "web"},
                        "annotations": {PACKAGES: packages(&["hello", "bash", "coreutils"])?},
                    },
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{
                            "name": "web", "image": "registry.invalid/web:1",
                            "command": ["bash", "-c", loop_of_hello],
                        }],
                    },
                },
            },
        }))?;
        namespace.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
        let pods = namespace.get(&["pods", "-l", "app=web"])?;
        let pods = pods["items"].as_array().context("a list")?;
        assert_eq!(pods.len(), 3);
        for pod in pods {
            let name = pod["metadata"]["name"].as_str().context("a name")?;
            eventually("hello in the log", || {
                Ok(namespace.kubectl(&["logs", name])?.contains("Hello, world!").then_some(()))
            })?;
            let status = pod["metadata"]["annotations"]["nix.lillecarl.com/status"].as_str();
            assert!(status.context("a status")?.contains("registry.invalid/web:1"));
        }
        Ok(())
    })
}

#[test]
fn python_imports_from_its_library() -> Result<()> {
    with_namespace("python", |namespace| {
        let program = "import hashlib, json, sqlite3, ssl; print(json.dumps({'ok': sqlite3.sqlite_version}))";
        // No command and no image of its own: the entry point is a link in the volume.
        let annotations = json!({PACKAGES: format!("{}/bin/python3", path("python3")?)});
        namespace.apply(&pod("python", &annotations, &json!({"args": ["-c", program]})))?;
        namespace.kubectl(&[
            "wait",
            "--for=jsonpath={.status.phase}=Succeeded",
            "pod/python",
            "--timeout=90s",
        ])?;
        let log = namespace.kubectl(&["logs", "python"])?;
        assert!(log.contains("{\"ok\": \"3."), "{log}");
        Ok(())
    })
}

#[test]
fn what_a_pod_writes_is_seen_by_no_other() -> Result<()> {
    with_namespace("read-write", |namespace| {
        let read_write = json!({"nix.lillecarl.com/mode": "rw"});
        namespace.apply(&shell("writer", &read_write)?)?;
        namespace.apply(&shell("other", &read_write)?)?;
        namespace.apply(&shell("reader", &json!({}))?)?;
        for pod in ["writer", "other", "reader"] {
            namespace.ready(pod)?;
        }
        let note = "/nix/store/note";
        assert_eq!(namespace.exec("writer", &["bash", "-c", &format!("echo mine > {note}")])?.0, 0);
        assert_eq!(namespace.exec("writer", &["cat", note])?, (0, "mine\n".to_owned()));
        for pod in ["other", "reader"] {
            assert_ne!(namespace.exec(pod, &["cat", note])?.0, 0);
        }
        // What is in a package can be changed too, for the pod itself.
        let hello = format!("{}/bin/hello", path("hello")?);
        assert_eq!(namespace.exec("writer", &["rm", "-f", &hello])?.0, 0);
        assert_eq!(namespace.exec("other", &["hello"])?, (0, "Hello, world!\n".to_owned()));
        Ok(())
    })
}

#[test]
fn root_in_a_read_only_pod_can_change_nothing() -> Result<()> {
    with_namespace("read-only", |namespace| {
        let mut pod = shell("reader", &json!({}))?;
        pod["metadata"]["annotations"][PACKAGES] =
            packages(&["bash", "coreutils", "hello", "busybox"])?.into();
        pod["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": 0});
        namespace.apply(&pod)?;
        namespace.ready("reader")?;
        assert_eq!(namespace.exec("reader", &["id", "-u"])?, (0, "0\n".to_owned()));
        let hello = format!("{}/bin/hello", path("hello")?);
        for command in [
            "echo x > /nix/x".to_owned(),
            "echo x > /nix/store/x".to_owned(),
            "mkdir /nix/var/x".to_owned(),
            format!("echo x > {hello}"),
            format!("rm -f {hello}"),
            format!("chmod 777 {hello}"),
            format!("chown 1 {hello}"),
            format!("touch {hello}"),
            format!("ln {hello} /nix/x"),
            format!("ln {hello} /tmp/x"),
            "busybox mount -o remount,rw /nix".to_owned(),
            "busybox mount -o remount,bind,rw /nix".to_owned(),
            "busybox umount /nix".to_owned(),
            "mkdir -p /tmp/m && busybox mount --bind /nix /tmp/m".to_owned(),
        ] {
            let (code, text) = namespace.exec("reader", &["bash", "-c", &command])?;
            assert_ne!(code, 0, "{command}: {text}");
        }
        assert_eq!(namespace.exec("reader", &["hello"])?.0, 0);
        Ok(())
    })
}

#[test]
fn two_pods_have_one_inode() -> Result<()> {
    with_namespace("inodes", |namespace| {
        namespace.apply(&shell("a", &json!({}))?)?;
        let mut other = shell("b", &json!({}))?;
        other["metadata"]["annotations"][PACKAGES] = packages(&["coreutils", "hello", "bash", "jq"])?.into();
        namespace.apply(&other)?;
        let mut inodes = BTreeSet::new();
        for pod in ["a", "b"] {
            namespace.ready(pod)?;
            let hello = format!("{}/bin/hello", path("hello")?);
            inodes.insert(namespace.exec(pod, &["stat", "--format=%d %i", &hello])?.1);
        }
        assert_eq!(inodes.len(), 1, "{inodes:?}");
        Ok(())
    })
}

#[test]
fn a_volume_by_hand_with_and_without_sub_path() -> Result<()> {
    with_namespace("by-hand", |namespace| {
        let with_volume = |name: &str, sub_path: Value| -> Result<Value> {
            let mut pod = pod(
                name,
                &json!({}),
                &json!({
                    "image": "gcr.io/distroless/static-debian12:latest",
                // Kubernetes would take `Always` from the tag, and here is nothing to pull from.
                "imagePullPolicy": "IfNotPresent",
                    "command": ["/nix/var/result/bin/hello"],
                    "volumeMounts": [{"name": "nix", "mountPath": "/nix", "subPath": sub_path}],
                }),
            );
            pod["spec"]["volumes"] = json!([{"name": "nix", "csi": {
                "driver": "nix-csi.lillecarl.com", "readOnly": true,
                "volumeAttributes": {"x86_64-linux": json!([path("hello")?]).to_string()},
            }}]);
            Ok(pod)
        };
        namespace.apply(&with_volume("plain", Value::Null)?)?;
        namespace.apply(&with_volume("sub-path", json!("nix"))?)?;
        for name in ["plain", "sub-path"] {
            let pod = format!("pod/{name}");
            namespace.kubectl(&[
                "wait",
                "--for=jsonpath={.status.phase}=Succeeded",
                &pod,
                "--timeout=90s",
            ])?;
            assert_eq!(namespace.kubectl(&["logs", name])?, "Hello, world!\n");
        }
        Ok(())
    })
}

/// A pod with a volume by hand, and the secret that it names.
fn by_hand(name: &str, package: &str, secret: Option<&str>) -> Result<Value> {
    let container = json!({
        "image": "gcr.io/distroless/static-debian12:latest",
        // Kubernetes would take `Always` from the tag, and here is nothing to pull from.
        "imagePullPolicy": "IfNotPresent",
        "command": [format!("{}/bin/{package}-server", path(package)?), "--version"],
        "volumeMounts": [{"name": "nix", "mountPath": "/nix"}],
    });
    let mut pod = pod(name, &json!({}), &container);
    pod["spec"]["volumes"] = json!([{"name": "nix", "csi": {
        "driver": "nix-csi.lillecarl.com", "readOnly": true,
        "volumeAttributes": {"paths": path(package)?},
    }}]);
    if let Some(secret) = secret {
        pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": secret});
    }
    Ok(pod)
}

#[test]
fn what_the_secret_of_a_namespace_fetches_is_not_for_another() -> Result<()> {
    let succeeded = |namespace: &Namespace, pod: &str| {
        let pod = format!("pod/{pod}");
        namespace.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", &pod, "--timeout=90s"])
    };
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "our-cache"},
        "stringData": {"bearer-tokens": "10.90.0.1:8080 token-of-the-cluster-tests\n"},
    });
    with_namespace("tenant-a", |ours| {
        ours.apply(&secret)?;
        ours.apply(&by_hand("with", "redis", Some("our-cache"))?)?;
        succeeded(ours, "with")?;
        assert!(ours.kubectl(&["logs", "with"])?.contains("Redis server"));
        ours.event("with", "store paths are ready")?;
        with_namespace("tenant-b", |theirs| {
            theirs.apply(&by_hand("without", "redis", None)?)?;
            let said = theirs.event("without", "no cache has")?;
            assert!(said.contains(&path("redis")?), "{said}");
            // With credentials of its own nothing has to be fetched.
            theirs.apply(&secret)?;
            theirs.apply(&by_hand("with", "redis", Some("our-cache"))?)?;
            succeeded(theirs, "with")?;
            theirs.event("with", "0 of them were fetched").map(drop)
        })?;
        // By annotation, as most will.
        let program = format!("{}/bin/redis-server", path("redis")?);
        let annotations = json!({PACKAGES: path("redis")?, "nix.lillecarl.com/cache-secret": "our-cache"});
        ours.apply(&pod("annotated", &annotations, &json!({"command": [program, "--version"]})))?;
        succeeded(ours, "annotated")?;
        // Once given, it is the namespace's.
        ours.apply(&by_hand("again", "redis", None)?)?;
        succeeded(ours, "again").map(drop)
    })
}

#[test]
fn a_pod_that_is_deleted_while_it_waits_is_gone_at_once() -> Result<()> {
    with_namespace("impatient", |namespace| {
        // 300 MB at 100 kB a second.
        namespace.apply(&by_hand("waits", "large", None)?)?;
        namespace.event("waits", "fetching")?;
        // Long before the call's two minutes, or the fetch's hour, are over.
        namespace.kubectl(&["delete", "pod", "waits", "--timeout=60s"])?;
        eventually("the end of the fetch", || {
            let log = kubectl(&["-n", "nix-csi", "logs", "daemonset/nix-csi-node", "-c", "node"])?;
            Ok(log.contains("nobody wants this fetch any more").then_some(()))
        })
    })
}

#[test]
fn a_restricted_namespace_takes_the_pod() -> Result<()> {
    with_namespace("restricted", |namespace| {
        let label = "pod-security.kubernetes.io/enforce=restricted";
        kubectl(&["label", "namespace", &namespace.name, label])?;
        let mut pod = shell("a", &json!({}))?;
        pod["spec"]["containers"][0]["securityContext"] = json!({
            "runAsNonRoot": true, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
        });
        namespace.apply(&pod)?;
        namespace.ready("a")?;
        assert_eq!(namespace.exec("a", &["id", "-u"])?, (0, "65532\n".to_owned()));
        Ok(())
    })
}

#[test]
fn who_writes_something_wrong_is_told() -> Result<()> {
    with_namespace("wrong", |namespace| {
        let annotated = |value: &str| pod("a", &json!({PACKAGES: value}), &json!({}));
        let text = namespace.refused(&annotated("hello"))?;
        let expected =
            "annotation nix.lillecarl.com/packages, line 1, column 1: \"hello\" is not a store path";
        assert!(text.contains(expected), "{text}");
        let text = namespace.refused(&pod("a", &json!({"nix.lillecarl.com/package": "x"}), &json!({})))?;
        assert!(text.contains("annotation nix.lillecarl.com/package is not known"), "{text}");

        let unknown = "/nix/store/00000000000000000000000000000000-unknown";
        for (name, paths, reason) in [
            (
                "unknown",
                unknown.to_owned(),
                "no cache has /nix/store/00000000000000000000000000000000-unknown",
            ),
            ("unsigned", path("unsigned")?, "is not trusted: it has no signature"),
            ("wrong-key", path("wrong-key")?, "signed by nix-csi-other-1"),
            ("tampered", path("tampered")?, "has hash sha256:"),
        ] {
            namespace.apply(&pod(name, &json!({PACKAGES: paths}), &json!({})))?;
            let message = namespace.event(name, reason)?;
            assert!(message.contains(&paths), "{message}");
            if name != "unknown" {
                assert!(message.contains("http://10.90.0.1:8080/zstd/"), "{message}");
            }
            // Nothing of it is on the node.
            let base = paths.trim_start_matches("/nix/store/");
            assert!(!on_node(&["ls", "/var/lib/nix-csi/nix/store"])?.contains(base));
            namespace.kubectl(&["delete", "pod", name, "--wait", "--timeout=60s"])?;
        }
        Ok(())
    })
}

#[test]
fn pods_without_the_annotation_are_what_they_were() -> Result<()> {
    with_namespace("plain", |namespace| {
        let plain = pod(
            "a",
            &json!({"example.com/note": "x"}),
            &json!({
                "image": "localhost/busybox:1", "command": ["sleep", "1000"],
            }),
        );
        namespace.apply(&plain)?;
        namespace.ready("a")?;
        let pod = namespace.get(&["pod", "a"])?;
        assert_eq!(pod["spec"]["containers"][0]["image"], "localhost/busybox:1");
        assert_eq!(pod["metadata"]["annotations"]["nix.lillecarl.com/status"], Value::Null);
        assert!(!pod["spec"]["volumes"].to_string().contains("nix-csi"));
        Ok(())
    })
}

#[test]
fn a_dry_run_is_answered_and_leaves_nothing() -> Result<()> {
    with_namespace("dry-run", |namespace| {
        let annotated = pod("a", &json!({PACKAGES: path("hello")?}), &json!({}));
        let file = tempfile(&annotated)?;
        let file = file.path().to_str().context("a path of this test")?;
        let text = namespace.kubectl(&["create", "--dry-run=server", "-o", "json", "-f", file])?;
        let pod: Value = serde_json::from_str(&text)?;
        assert_eq!(pod["spec"]["containers"][0]["command"], json!(["/nix/var/entry/main"]));
        assert_eq!(namespace.get(&["pods"])?["items"], json!([]));
        Ok(())
    })
}

fn tempfile(object: &Value) -> Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new()?;
    std::io::Write::write_all(&mut file, object.to_string().as_bytes())?;
    Ok(file)
}

/// The static binary finds names by `/etc/hosts` and by DNS, from inside its own image.
#[test]
fn the_image_resolves_names() -> Result<()> {
    with_namespace("names", |namespace| {
        let fixtures = Fixtures::find()?;
        let conf = format!(
            "substituters = http://cache.test:8080/zstd\ntrusted-public-keys = {}\n",
            fixtures.public_key()?
        );
        namespace.apply(&json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf"}, "data": {"nix.conf": conf},
        }))?;
        let mut pod = pod(
            "fetch",
            &json!({}),
            &json!({
                "image": "localhost/nix-csi-node:dev",
                "args": ["--root=/tmp/root", "--config=/conf/nix.conf", "fetch", path("hello")?],
                "volumeMounts": [{"name": "conf", "mountPath": "/conf"}, {"name": "tmp", "mountPath": "/tmp"}],
            }),
        );
        pod["spec"]["hostAliases"] = json!([{"ip": "10.90.0.1", "hostnames": ["cache.test"]}]);
        pod["spec"]["volumes"] =
            json!([{"name": "conf", "configMap": {"name": "conf"}}, {"name": "tmp", "emptyDir": {}}]);
        namespace.apply(&pod)?;
        namespace.kubectl(&[
            "wait",
            "--for=jsonpath={.status.phase}=Succeeded",
            "pod/fetch",
            "--timeout=60s",
        ])?;
        let log = namespace.kubectl(&["logs", "fetch"])?;
        assert!(log.contains(r#""event":"valid","paths":2,"fetched":2"#), "{log}");
        Ok(())
    })
}

/// Deleting everything leaves no mount and no record, and real Nix finds the store in order.
#[test]
fn what_is_deleted_leaves_nothing_on_the_node() -> Result<()> {
    with_namespace("deleted", |namespace| {
        for (name, mode) in [("a", "ro"), ("b", "rw"), ("c", "rw")] {
            namespace.apply(&shell(name, &json!({"nix.lillecarl.com/mode": mode}))?)?;
        }
        let mut uids = Vec::new();
        for pod in ["a", "b", "c"] {
            namespace.ready(pod)?;
            uids.push(uid_of(namespace, pod)?);
        }
        let mounts = || on_node(&["cat", "/proc/self/mountinfo"]);
        let records =
            || on_node(&["sh", "-c", "cat /var/lib/nix-csi/volumes/*/record.json 2>/dev/null || true"]);
        for uid in &uids {
            ensure!(mounts()?.contains(uid) && records()?.contains(uid), "{uid} is not mounted");
        }
        namespace.kubectl(&["delete", "pods", "--all", "--wait", "--timeout=60s"])?;
        for uid in &uids {
            eventually("the volume to be gone", || {
                Ok((!mounts()?.contains(uid) && !records()?.contains(uid)).then_some(()))
            })?;
        }
        // Nobody writes here: the tests beside this one may, so Nix is asked for what cannot change.
        let root = on_node(&[
            "sh",
            "-c",
            "grep ' /var/lib/nix-csi ' /proc/self/mountinfo | head -1 | cut -d' ' -f4",
        ])?;
        nix::verify(std::path::Path::new(root.trim()))
    })
}

fn uid_of(namespace: &Namespace, pod: &str) -> Result<String> {
    let pod = namespace.get(&["pod", pod])?;
    Ok(pod["metadata"]["uid"].as_str().context("a uid")?.to_owned())
}
