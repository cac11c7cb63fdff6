//! `nix-csi-webhook explain`: what would become of the pods of a manifest, without a cluster.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use nix_csi_proto::annotations::{INJECT, PREFIX};
use serde::Serialize;
use serde_json::{Value, json};

use crate::decide::{Decision, Policy, decide, is_annotated};
use crate::entry::Entry;
use crate::image_map::{ImageMapError, ImageMaps};
use crate::inject::inject;
use crate::origin::{Namespace, ObjectRef, Origin, Owner};
use crate::source::Source;

/// What would become of the pods of a manifest. Exits with 1 if one of them would be refused.
#[derive(Debug, clap::Args)]
pub struct Explain {
    /// The manifest, YAML or JSON, with one or more objects, ImageMaps too; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    filename: PathBuf,
    /// A manifest of the Namespace, if the other one has none: `kubectl get namespace shop -o yaml`.
    #[arg(long, value_name = "FILE")]
    namespace_file: Option<PathBuf>,
    /// As if overlays/owner-everywhere were installed.
    #[arg(long)]
    owner_everywhere: bool,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "yaml")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A document for each object.
    Yaml,
    /// A line for each object.
    Json,
}

/// What becomes of the pods of one object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The object.
    pub object: String,
    /// The namespace it is in.
    pub namespace: String,
    /// `injected`, `denied`, or why nothing happens.
    pub decision: &'static str,
    /// Whose packages they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What the pod's author would be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What else is to be said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The JSONPatch of a pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<Value>,
    /// The pod afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Value>,
}

/// What a cluster knows besides the objects.
pub(crate) struct Setting<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) excluded: &'a [String],
    pub(crate) owner_everywhere: bool,
}

/// Prints it.
pub(crate) fn run(explain: &Explain, policy: &Policy, excluded: &[String]) -> anyhow::Result<ExitCode> {
    let mut objects = read(&explain.filename)?;
    if let Some(file) = &explain.namespace_file {
        objects.extend(read(file)?);
    }
    let setting = Setting { policy, excluded, owner_everywhere: explain.owner_everywhere };
    let explanations = explain_all(&objects, &setting);
    anyhow::ensure!(
        !explanations.is_empty(),
        "{}: no object with pods; expected a Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, Job or CronJob",
        explain.filename.display()
    );
    let mut out = std::io::stdout().lock();
    for explanation in &explanations {
        match explain.output {
            Output::Yaml => write!(out, "---\n{}", serde_saphyr::to_string(explanation)?)?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(explanation)?)?,
        }
    }
    let is_denied = explanations.iter().any(|explanation| explanation.decision == "denied");
    Ok(if is_denied { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn read(file: &Path) -> anyhow::Result<Vec<Value>> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
        .with_context(|| format!("{} is not a manifest in YAML or JSON", file.display()))?;
    let lists = documents.into_iter().flat_map(|document| match document.get("items") {
        Some(Value::Array(items)) => items.clone(),
        _ => vec![document],
    });
    Ok(lists.collect())
}

/// What becomes of the pods of each of `objects` that has some.
pub(crate) fn explain_all(objects: &[Value], setting: &Setting<'_>) -> Vec<Explanation> {
    let is_namespace = |object: &&Value| text(object, "/kind") == "Namespace";
    let namespaces: Vec<_> = objects.iter().filter(is_namespace).map(namespace).collect();
    let (maps, errors) = image_maps(objects);
    let maps = Arc::new(maps);
    let unused = |(name, error)| format!("ImageMap {name} is not used: {error}");
    let warnings: Vec<_> = errors.iter().map(unused).collect();
    let explain = |object| explain_one(object, &namespaces, &maps, warnings.clone(), setting);
    objects.iter().filter_map(explain).collect()
}

/// Those that are among `objects`, as the cluster would have them.
fn image_maps(objects: &[Value]) -> (ImageMaps, BTreeMap<String, ImageMapError>) {
    let maps = objects.iter().filter(|object| text(object, "/kind") == "ImageMap");
    ImageMaps::read(maps.map(|map| (text(map, "/metadata/name"), &map["spec"])))
}

fn explain_one(
    object: &Value,
    namespaces: &[Arc<Namespace>],
    maps: &Arc<ImageMaps>,
    mut warnings: Vec<String>,
    setting: &Setting<'_>,
) -> Option<Explanation> {
    let (pod, owners) = pod_of(object)?;
    let name = match (text(object, "/metadata/namespace"), namespaces) {
        ("", [only]) => only.name.clone(),
        ("", _) => "default".to_owned(),
        (name, _) => name.to_owned(),
    };
    let namespace = namespaces.iter().find(|known| known.name == name).cloned().unwrap_or_else(|| {
        warnings.push(format!("namespace {name} is not given; it is taken for one without our label"));
        Arc::new(Namespace { name: name.clone(), ..Namespace::default() })
    });
    let origin = Origin { owners, namespace: Some(Arc::clone(&namespace)), image_maps: Arc::clone(maps) };
    let mut explanation = Explanation {
        object: format!("{}/{}", text(object, "/kind"), text(object, "/metadata/name")),
        namespace: name.clone(),
        decision: "injected",
        source: None,
        message: None,
        warnings,
        patch: None,
        pod: None,
    };
    if setting.excluded.contains(&name) {
        explanation.decision = "excluded-namespace";
        return Some(explanation);
    }
    if entry_of(&pod, &origin, setting).is_none() {
        explanation.decision = "not-asked";
        if origin.owners.iter().any(|owner| owner.annotations.keys().any(|key| key.starts_with(PREFIX))) {
            explanation.warnings.push(format!(
                "annotations on owners count only if the namespace has the label {INJECT}=enabled: \
                 label {name}, or put them into the pod template"
            ));
        }
        return Some(explanation);
    }
    match decide(&pod, &origin, setting.policy) {
        Ok(Decision::Leave { reason, warnings }) => {
            explanation.decision = reason;
            explanation.warnings.extend(warnings);
        }
        Ok(Decision::Inject(plan)) => {
            let injected = inject(&pod, &plan);
            explanation.source = Some(plan.source.to_string());
            explanation.warnings.extend(plan.warnings.iter().cloned());
            explanation.warnings.extend(when_it_counts(&plan.source, &name));
            explanation.patch = serde_json::to_value(json_patch::diff(&pod, &injected)).ok();
            explanation.pod = Some(injected);
        }
        Err(denial) => {
            explanation.decision = "denied";
            explanation.message = Some(format!("nix-csi: {denial}"));
        }
    }
    Some(explanation)
}

/// By which entry the API server would ask about the pod.
fn entry_of(pod: &Value, origin: &Origin, setting: &Setting<'_>) -> Option<Entry> {
    let namespace = origin.namespace.as_ref()?;
    if namespace.is_excluded() {
        None
    } else if is_annotated(pod) {
        Some(Entry::Pod)
    } else if namespace.is_opted_in() {
        Some(Entry::Namespace)
    } else if setting.owner_everywhere && namespace.inject.is_none() && !origin.owners.is_empty() {
        Some(Entry::Owner)
    } else {
        None
    }
}

/// A template that changes replaces pods. Other objects that change do not.
fn when_it_counts(source: &Source, namespace: &str) -> Option<String> {
    match source {
        Source::Pod => None,
        Source::Owner { kind, name } => Some(match kind.as_str() {
            "Deployment" | "StatefulSet" | "DaemonSet" => format!(
                "counts for pods that are created from now on; for all of them: \
                 kubectl -n {namespace} rollout restart {}/{name}",
                kind.to_ascii_lowercase()
            ),
            "CronJob" => "counts from its next Job on".to_owned(),
            _ => "counts for pods that are created from now on".to_owned(),
        }),
        Source::Namespace { .. } => Some(
            "counts for pods that are created from now on; for others use kubectl rollout restart".to_owned(),
        ),
    }
}

/// A pod as a controller would make it of `object`, and what would own it.
fn pod_of(object: &Value) -> Option<(Value, Vec<Arc<Owner>>)> {
    let kind = text(object, "/kind");
    let (template, owners) = match kind {
        "Pod" => (object, Vec::new()),
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job" => {
            (object.pointer("/spec/template")?, vec![owner(object, kind)])
        }
        "CronJob" => {
            let job = object.pointer("/spec/jobTemplate")?;
            (job.pointer("/spec/template")?, vec![owner(job, "Job"), owner(object, kind)])
        }
        _ => return None,
    };
    let metadata = template.get("metadata").filter(|metadata| metadata.is_object());
    let metadata = metadata.cloned().unwrap_or_else(|| json!({}));
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template.get("spec")?});
    Some((pod, owners))
}

fn owner(object: &Value, kind: &str) -> Arc<Owner> {
    let api_version = match kind {
        "Job" | "CronJob" => "batch/v1",
        _ => "apps/v1",
    };
    let object_ref = ObjectRef {
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        name: text(object, "/metadata/name").to_owned(),
        uid: String::new(),
    };
    Arc::new(Owner { object: object_ref, annotations: annotations(object), controller: None })
}

fn namespace(object: &Value) -> Arc<Namespace> {
    let labels = object.pointer("/metadata/labels");
    let inject = labels.and_then(|labels| labels.get(INJECT)).and_then(Value::as_str).map(str::to_owned);
    let name = text(object, "/metadata/name").to_owned();
    Arc::new(Namespace { name, inject, annotations: annotations(object) })
}

fn annotations(object: &Value) -> BTreeMap<String, String> {
    let all = object.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten();
    all.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const HELLO: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-hello-2.10";

    fn explained(text: &str, owner_everywhere: bool) -> Vec<Explanation> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
        let policy = Policy { distroless: "root".into(), distroless_nonroot: "nonroot".into() };
        let excluded = ["kube-system".to_owned()];
        let setting = Setting { policy: &policy, excluded: &excluded, owner_everywhere };
        explain_all(&objects, &setting)
    }

    fn workload(kind: &str, metadata: &str, of_template: &str) -> String {
        let template = format!(
            "template: {{metadata: {{annotations: {{{of_template}}}}}, spec: {{containers: [{{name: web, image: n}}]}}}}"
        );
        let spec = match kind {
            "CronJob" => format!("{{jobTemplate: {{spec: {{{template}}}}}}}"),
            _ => format!("{{{template}}}"),
        };
        format!("---\nkind: {kind}\nmetadata: {{name: web, {metadata}}}\nspec: {spec}\n")
    }

    const OPTED_IN: &str =
        "kind: Namespace\nmetadata: {name: shop, labels: {nix.lillecarl.com/inject: enabled}}\n";

    #[rstest]
    fn annotations_on_what_owns_pods(
        #[values("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob")] kind: &str,
    ) {
        let annotated = format!("annotations: {{nix.lillecarl.com/packages: {HELLO}}}");
        let text = format!("{OPTED_IN}{}", workload(kind, &annotated, ""));
        let [found] = &explained(&text, false)[..] else { panic!("one object has pods") };
        assert_eq!((found.decision, found.namespace.as_str()), ("injected", "shop"));
        assert_eq!(found.source.as_deref(), Some(format!("{kind}/web").as_str()));
        assert!(found.warnings.iter().any(|warning| warning.starts_with("counts f")), "{found:?}");
        assert_eq!(found.pod.as_ref().unwrap()["spec"]["containers"][0]["image"], "root");
        // Nobody asks about it elsewhere, unless everywhere is meant.
        let elsewhere = workload(kind, &annotated, "");
        assert_eq!(explained(&elsewhere, false)[0].decision, "not-asked");
        assert_eq!(explained(&elsewhere, true)[0].decision, "injected");
    }

    #[test]
    fn image_maps_count_where_the_namespace_is_opted_in() {
        let map = |packages: &str| {
            format!(
                "---\nkind: ImageMap\nmetadata: {{name: ours}}\nspec: {{images: [{{match: web, packages: [{packages}]}}]}}\n"
            )
        };
        let deployment = workload("Deployment", "", "").replace("image: n", "image: web:1");
        let found = explained(&format!("{OPTED_IN}{}{deployment}", map(HELLO)), false);
        assert_eq!((found.len(), found[0].decision), (1, "injected"));
        assert_eq!(explained(&format!("{}{deployment}", map(HELLO)), false)[0].decision, "not-asked");
        let found = explained(&format!("{OPTED_IN}{}{deployment}", map("hello")), false);
        assert!(
            found[0].warnings[0].starts_with("ImageMap ours is not used: spec.images[0].packages"),
            "{found:?}"
        );
    }

    #[test]
    fn a_template_counts_everywhere() {
        let of_template = format!("nix.lillecarl.com/packages: {HELLO}");
        let found = explained(&workload("Deployment", "namespace: shop", &of_template), false);
        assert_eq!(found[0].decision, "injected");
        assert_eq!(found[0].warnings, ["namespace shop is not given; it is taken for one without our label"]);
        let excluded = explained(&workload("Deployment", "namespace: kube-system", &of_template), false);
        assert_eq!(excluded[0].decision, "excluded-namespace");
    }

    #[test]
    fn what_is_denied_says_why() {
        let found = explained(&workload("Deployment", "", "nix.lillecarl.com/packages: hello"), false);
        assert_eq!(found[0].decision, "denied");
        assert!(found[0].message.as_ref().unwrap().contains("line 1, column 1"), "{found:?}");
    }

    #[test]
    fn it_can_be_read_again() {
        let of_template = format!("nix.lillecarl.com/packages: {HELLO}");
        let found = explained(&workload("Deployment", "", &of_template), false);
        let text = serde_saphyr::to_string(&found[0]).unwrap();
        let read: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(read, serde_json::to_value(&found[0]).unwrap());
    }
}
