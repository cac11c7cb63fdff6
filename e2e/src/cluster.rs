//! The one-node cluster of `e2e/cluster`, and namespaces in it that go with their test.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster")
}

fn run(args: &[&str], input: Option<&str>) -> Result<Output> {
    let mut child = Command::new(script())
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("e2e/cluster")?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes())?;
    }
    Ok(child.wait_with_output()?)
}

fn checked(args: &[&str], input: Option<&str>) -> Result<String> {
    Ok(text(&succeeded(args, input)?.stdout))
}

fn said(args: &[&str], input: Option<&str>) -> Result<String> {
    let output = succeeded(args, input)?;
    Ok(text(&[output.stdout, output.stderr].concat()))
}

fn succeeded(args: &[&str], input: Option<&str>) -> Result<Output> {
    let output = run(args, input)?;
    ensure!(
        output.status.success(),
        "e2e/cluster {}: {}\n{}{}",
        args.join(" "),
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit code and all output.
fn outcome(output: Output) -> (i32, String) {
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// kubectl as the administrator.
pub fn kubectl(args: &[&str]) -> Result<String> {
    checked(&[&["kubectl"], args].concat(), None)
}

/// Applies what is in no namespace, or names its own.
pub fn apply(text: &str) -> Result<String> {
    checked(&["kubectl", "apply", "-f", "-"], Some(text))
}

/// A command on the node: its mounts, network and processes.
pub fn on_node(args: &[&str]) -> Result<String> {
    checked(&[&["exec"], args].concat(), None)
}

/// A namespace for one test.
pub struct Namespace {
    /// Its name.
    pub name: String,
}

/// Runs `test` in a namespace of its own, and shows what was going on there if it fails.
pub fn with_namespace(name: &str, test: impl FnOnce(&Namespace) -> Result<()>) -> Result<()> {
    let namespace = Namespace { name: name.to_owned() };
    kubectl(&["create", "namespace", name]).context("is a cluster up? `make cluster-tests` starts one")?;
    let result = test(&namespace);
    if result.is_err() {
        for what in [&["get", "pods", "-o", "wide"][..], &["get", "events", "--sort-by=.lastTimestamp"]] {
            let shown = namespace.kubectl(what).unwrap_or_else(|error| error.to_string());
            let _ = writeln!(std::io::stderr(), "--- {name}: {}\n{shown}", what.join(" "));
        }
    }
    kubectl(&["delete", "namespace", name, "--wait", "--timeout=90s"])?;
    result
}

impl Namespace {
    /// kubectl in this namespace.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        kubectl(&[&["-n", &self.name], args].concat())
    }

    /// All that kubectl says in this namespace, warnings of the API server too.
    pub fn said(&self, args: &[&str]) -> Result<String> {
        said(&[&["kubectl", "-n", &self.name], args].concat(), None)
    }

    /// Applies an object; gives back all that was said.
    pub fn said_when_applied(&self, object: &Value) -> Result<String> {
        said(&["kubectl", "-n", &self.name, "apply", "-f", "-"], Some(&object.to_string()))
    }

    /// Applies an object.
    pub fn apply(&self, object: &Value) -> Result<String> {
        checked(&["kubectl", "-n", &self.name, "apply", "-f", "-"], Some(&object.to_string()))
    }

    /// Applies what stands in a manifest.
    pub fn apply_text(&self, text: &str) -> Result<String> {
        checked(&["kubectl", "-n", &self.name, "apply", "-f", "-"], Some(text))
    }

    /// Applies an object as another user, whether it succeeds or not, or only asks whether it would.
    pub fn apply_as(&self, user: &str, object: &Value, dry_run: bool) -> Result<(i32, String)> {
        let dry_run = if dry_run { "--dry-run=server" } else { "--dry-run=none" };
        let user = format!("--as={user}");
        let args = ["kubectl", &user, "-n", &self.name, "apply", dry_run, "-f", "-"];
        Ok(outcome(run(&args, Some(&object.to_string()))?))
    }

    /// kubectl in this namespace as another user, whether it succeeds or not: exit code and all output.
    pub fn kubectl_as(&self, user: &str, args: &[&str]) -> Result<(i32, String)> {
        let user = format!("--as={user}");
        Ok(outcome(run(&[&["kubectl", &user, "-n", &self.name], args].concat(), None)?))
    }

    /// Applies an object that must be refused; gives back what was said.
    pub fn refused(&self, object: &Value) -> Result<String> {
        let output = run(&["kubectl", "-n", &self.name, "apply", "-f", "-"], Some(&object.to_string()))?;
        ensure!(!output.status.success(), "this should have been refused: {object}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// An object as JSON.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], args].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Runs a command in a pod, whether it succeeds or not: exit code and all output.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<(i32, String)> {
        let output = run(&[&["kubectl", "-n", &self.name, "exec", pod, "--"], command].concat(), None)?;
        Ok(outcome(output))
    }

    /// Waits until `pod` is ready.
    pub fn ready(&self, pod: &str) -> Result<()> {
        let pod = format!("pod/{pod}");
        self.kubectl(&["wait", "--for=condition=Ready", &pod, "--timeout=90s"]).map(drop)
    }

    /// Waits for an event of `object` that contains `text`, and gives it back.
    pub fn event(&self, object: &str, text: &str) -> Result<String> {
        eventually(&format!("an event of {object} with {text:?}"), || {
            let selector = format!("--field-selector=involvedObject.name={object}");
            let events = self.get(&["events", &selector])?;
            let messages = events["items"].as_array().into_iter().flatten();
            let mut messages = messages.filter_map(|event| event["message"].as_str());
            Ok(messages.find(|message| message.contains(text)).map(str::to_owned))
        })
    }
}

/// Asks until there is an answer, for as long as anything here may take.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > end {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}
