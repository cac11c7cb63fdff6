//! Taking nix-csi off a cluster. The last test: afterwards there is nothing to test.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use nix_csi_e2e::cluster::{Namespace, eventually, kubectl, on_node, with_namespace};
use nix_csi_e2e::{Fixtures, nix};
use serde_json::json;

/// `make uninstall`, with a kubectl in `PATH` as people have it: one that is already told which cluster.
fn uninstall(args: &str) -> Result<Output> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bin = tempfile::tempdir()?;
    let kubectl = bin.path().join("kubectl");
    fs::write(&kubectl, format!("#!/bin/sh\nexec {} kubectl \"$@\"\n", here.join("cluster").display()))?;
    fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH")?);
    let mut make = Command::new("make");
    make.args(["--silent", "-C"]).arg(here.join("..")).arg("uninstall").arg(format!("ARGS={args}"));
    Ok(make.env("PATH", path).output()?)
}

fn plain(name: &str) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "localhost/busybox:1", "command": ["sleep", "1000"]}],
        },
    })
}

fn annotated(name: &str) -> Result<serde_json::Value> {
    let mut pod = plain(name);
    let path = |name: &str| Ok::<_, anyhow::Error>(Fixtures::find()?.get(name)?.path.to_string());
    let packages = [path("coreutils")?, path("bash")?].join(" ");
    pod["metadata"]["annotations"] = json!({"nix.lillecarl.com/packages": packages});
    pod["spec"]["containers"][0]["command"] = json!(["sleep", "1000"]);
    Ok(pod)
}

/// A webhook that is dead keeps out only those who asked for it themselves, also where a whole namespace is opted in.
fn with_a_dead_webhook(namespace: &Namespace) -> Result<()> {
    kubectl(&["-n", "nix-csi", "scale", "deployment/nix-csi-webhook", "--replicas=0"])?;
    kubectl(&[
        "-n",
        "nix-csi",
        "wait",
        "--for=delete",
        "pod",
        "-l",
        "app.kubernetes.io/component=webhook",
        "--timeout=60s",
    ])?;
    namespace.apply(&plain("plain"))?;
    namespace.ready("plain")?;
    kubectl(&["label", "namespace", &namespace.name, "nix.lillecarl.com/inject=enabled"])?;
    namespace.apply(&plain("opted-in"))?;
    namespace.ready("opted-in")?;
    let text = namespace.refused(&annotated("asks")?)?;
    ensure!(text.contains("pods.nix.lillecarl.com"), "{text}");
    Ok(())
}

#[test]
fn nothing_is_left() -> Result<()> {
    with_namespace("last", |namespace| {
        namespace.apply(&annotated("user")?)?;
        namespace.ready("user")?;
        with_a_dead_webhook(namespace)?;

        let refused = uninstall("")?;
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success() && text.contains("last/user"), "{text}");
        // And nothing was changed: the driver still ends the pod.
        kubectl(&["get", "mutatingwebhookconfiguration", "00-nix-csi"])?;
        namespace.kubectl(&["delete", "pod", "user", "--wait", "--timeout=60s"])?;

        let root = on_node(&[
            "sh",
            "-c",
            "grep ' /var/lib/nix-csi ' /proc/self/mountinfo | head -1 | cut -d' ' -f4",
        ])?;
        let root = Path::new(root.trim());
        nix::verify(root)?;
        let done = uninstall("")?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let left = kubectl(&[
            "get",
            "csidrivers,mutatingwebhookconfigurations,validatingadmissionpolicies,\
             validatingadmissionpolicybindings,clusterroles,clusterrolebindings,namespaces",
            "-o",
            "name",
        ])?;
        ensure!(!left.contains("nix-csi"), "{left}");
        let sockets = on_node(&[
            "find",
            "/var/lib/kubelet/plugins",
            "/var/lib/kubelet/plugins_registry",
            "-type",
            "s",
        ])?;
        ensure!(sockets.is_empty(), "{sockets}");
        eventually("mounts to be gone", || {
            let mounts = on_node(&["cat", "/proc/self/mountinfo"])?;
            Ok((!mounts.contains("/nix-csi/views") && !mounts.contains(" - overlay nix-csi ")).then_some(()))
        })?;
        // Kept, since nobody said otherwise.
        nix::verify(root)?;
        Ok(())
    })?;
    // Installed again, it finds what it had; and now it takes it along.
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("install.sh");
    ensure!(Command::new(install).status()?.success(), "e2e/install.sh");
    let done = uninstall("--delete-node-data")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(on_node(&["ls", "-A", "/var/lib/nix-csi"])?, "");
    Ok(())
}
