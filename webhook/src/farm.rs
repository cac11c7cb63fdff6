//! *Farming*: the store paths that a container names anyway, in commands, arguments, variables, probes, hooks and
//! mounts. Pure; who may be farmed is [`decide`](crate::decide)'s to say.
//!
//! Text is read as Kubernetes will: `$(VAR)` is expanded where it expands it, from what can be known at admission
//! (literals, annotations and labels). A path that is the program itself is *required*. All others are *optional*: a
//! text may name what nobody needs.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use nix_csi_store::{StorePath, StorePathHash, find_store_paths};
use serde_json::Value;

use crate::image::ImageReference;

/// Paths of one pod.
const MAX_PATHS: usize = 256;
/// What `$(VAR)` may become in one pod. A variable can hold others that hold others: without a limit, a pod of some KiB
/// could fill any memory.
const MAX_EXPANDED: usize = 1 << 20;
/// Images that Nix did not build, and that have no programs: nothing is lost when `/nix` is put over theirs. What ends
/// with a slash stands for all below it.
const MARKERS: [&str; 2] = ["gcr.io/distroless/", "registry.k8s.io/pause"];
/// How images of nix-snapshotter are called.
const SNAPSHOTTER: &str = "nix:0/nix/store/";

const PROBES: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];
const HOOKS: [&str; 2] = ["postStart", "preStop"];

/// What was found in one container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Farmed {
    /// The path that its `command` begins with.
    pub required: Option<StorePath>,
    /// The others, in the order in which they stand there, each hash once.
    pub optional: Vec<StorePath>,
}

impl Farmed {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.required.is_none() && self.optional.is_empty()
    }
}

/// Looks into the containers of one pod.
#[derive(Debug)]
pub struct Farm<'a> {
    pod: &'a Value,
    hashes: BTreeSet<StorePathHash>,
    expansion: Expansion,
    /// What somebody should know.
    pub warnings: Vec<String>,
}

impl<'a> Farm<'a> {
    /// For the containers of `pod`.
    pub fn new(pod: &'a Value) -> Self {
        Self { pod, hashes: BTreeSet::new(), expansion: Expansion::default(), warnings: Vec::new() }
    }

    /// The paths of `container`.
    pub fn look_into(&mut self, container: &Value) -> Farmed {
        let texts = self.texts(container);
        let mut farmed = Farmed::default();
        for (place, text) in &texts {
            for found in find_store_paths(text) {
                if found.path.is_derivation() {
                    let name = name_of(container);
                    self.warn(format!(
                        "container {name}, {place}: {} is a derivation, which is not built; left out",
                        found.path
                    ));
                } else if self.has_room(&found.path) {
                    let is_program = place == "command[0]" && found.range.start == 0;
                    farmed.add(found.path, is_program);
                }
            }
        }
        farmed
    }

    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    fn has_room(&mut self, path: &StorePath) -> bool {
        let hash = path.hash();
        let fits = self.hashes.contains(&hash) || self.hashes.len() < MAX_PATHS;
        if fits {
            self.hashes.insert(hash);
        } else {
            self.warn(format!("the pod names more than {MAX_PATHS} store paths; the rest is left out"));
        }
        fits
    }

    /// Every text of `container` that is looked at, with its place.
    fn texts(&mut self, container: &Value) -> Vec<(String, String)> {
        let mut texts = Vec::new();
        let variables = self.variables(container, &mut texts);
        for field in ["command", "args"] {
            for (n, text) in strings(container.get(field)).enumerate() {
                let text = self.expansion.expand(text, &variables);
                // The program first, so that it is not optional.
                texts.insert(
                    if field == "command" { n } else { texts.len() },
                    (format!("{field}[{n}]"), text.into_owned()),
                );
            }
        }
        // kubelet knows only the literals there, and does not expand those.
        let literals = literals(container);
        for probe in PROBES {
            for (n, text) in strings(container.pointer(&format!("/{probe}/exec/command"))).enumerate() {
                let text = self.expansion.expand(text, &literals);
                texts.push((format!("{probe}.exec.command[{n}]"), text.into_owned()));
            }
        }
        for hook in HOOKS {
            for (n, text) in
                strings(container.pointer(&format!("/lifecycle/{hook}/exec/command"))).enumerate()
            {
                texts.push((format!("lifecycle.{hook}.exec.command[{n}]"), text.to_owned()));
            }
        }
        texts.extend(text_of(container, "workingDir").map(|text| ("workingDir".to_owned(), text.to_owned())));
        texts.extend(
            text_of(container, "image")
                .filter(|image| image.starts_with(SNAPSHOTTER))
                .map(|image| ("image".to_owned(), image.to_owned())),
        );
        for (n, mount) in list(container, "volumeMounts").enumerate() {
            let at = |field: &str| format!("volumeMounts[{n}].{field}");
            texts.extend(text_of(mount, "mountPath").map(|text| (at("mountPath"), text.to_owned())));
            // Relative to a volume, which may be one of ours.
            texts.extend(text_of(mount, "subPath").map(|text| (at("subPath"), format!("/{text}"))));
            if let Some(text) = text_of(mount, "subPathExpr") {
                let text = format!("/{}", self.expansion.expand(text, &variables));
                texts.push((at("subPathExpr"), text));
            }
        }
        if self.expansion.left == 0 {
            self.warn(format!("the pod's $(VAR) are more than {MAX_EXPANDED} bytes; some are not expanded"));
        }
        texts
    }

    /// The variables that are known at admission; the texts of those that are written out go to `texts`.
    fn variables(
        &mut self,
        container: &Value,
        texts: &mut Vec<(String, String)>,
    ) -> BTreeMap<String, String> {
        let mut variables = BTreeMap::new();
        for variable in list(container, "env") {
            let Some(name) = text_of(variable, "name") else { continue };
            let literal = text_of(variable, "value").unwrap_or_default();
            let from = variable.get("valueFrom").filter(|from| !from.is_null());
            let value = match from {
                Some(from) => self.field(from).map(str::to_owned),
                None => Some(self.expansion.expand(literal, &variables).into_owned()),
            };
            match value {
                Some(value) => {
                    if from.is_none() {
                        texts.push((format!("env {name}"), value.clone()));
                    }
                    variables.insert(name.to_owned(), value);
                }
                // Whatever it was before, it is something else now.
                None => drop(variables.remove(name)),
            }
        }
        variables
    }

    /// A field of the pod that is there already.
    fn field(&self, from: &Value) -> Option<&'a str> {
        let path = from.pointer("/fieldRef/fieldPath")?.as_str()?;
        let (map, key) = path.strip_prefix("metadata.")?.split_once("['")?;
        let key = key.strip_suffix("']")?;
        matches!(map, "annotations" | "labels").then(|| self.pod["metadata"][map].get(key)?.as_str())?
    }
}

impl Farmed {
    fn add(&mut self, path: StorePath, is_program: bool) {
        if is_program {
            self.optional.retain(|other| other.hash() != path.hash());
            self.required = Some(path);
        } else if self.required.as_ref().is_none_or(|required| required.hash() != path.hash()) {
            match self.optional.iter_mut().find(|other| other.hash() == path.hash()) {
                // One of them has a tail that belongs to the text.
                Some(other) if path.name().len() < other.name().len() => *other = path,
                Some(_) => {}
                None => self.optional.push(path),
            }
        }
    }
}

/// Whether an image is only there to be replaced or to be empty: one of ours, or one that is known.
pub(crate) fn is_marker(image: &str, ours: &[&str]) -> bool {
    let Ok(image) = ImageReference::parse(image) else { return false };
    let repository = |image: &str| ImageReference::parse(image).ok().map(|image| image.repository);
    let is_known = |marker: &str| {
        image.repository == marker || (marker.ends_with('/') && image.repository.starts_with(marker))
    };
    MARKERS.into_iter().any(is_known)
        || ours.iter().any(|ours| repository(ours).as_ref() == Some(&image.repository))
}

/// How Kubernetes fills in variables, with an end.
#[derive(Debug)]
struct Expansion {
    left: usize,
}

impl Default for Expansion {
    fn default() -> Self {
        Self { left: MAX_EXPANDED }
    }
}

impl Expansion {
    /// `text` with `$(NAME)` filled in where `NAME` is known; `$$` is a dollar sign.
    fn expand<'t>(&mut self, text: &'t str, variables: &BTreeMap<String, String>) -> Cow<'t, str> {
        if !text.contains('$') {
            return text.into();
        }
        let mut expanded = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            expanded.push_str(&rest[..at]);
            let behind = &rest[at + 1..];
            if let Some(next) = behind.strip_prefix('$') {
                expanded.push('$');
                rest = next;
            } else if let Some((name, next)) = behind.strip_prefix('(').and_then(|name| name.split_once(')'))
            {
                match variables.get(name) {
                    Some(value) => expanded.push_str(value),
                    None => expanded.push_str(&rest[at..rest.len() - next.len()]),
                }
                rest = next;
            } else {
                expanded.push('$');
                rest = behind;
            }
            if expanded.len() > self.left {
                self.left = 0;
                return text.into();
            }
        }
        expanded.push_str(rest);
        self.left -= expanded.len().min(self.left);
        expanded.into()
    }
}

/// What an exec probe can refer to.
fn literals(container: &Value) -> BTreeMap<String, String> {
    let variables = list(container, "env");
    let of = |variable: &Value, field: &str| text_of(variable, field).map(str::to_owned);
    variables.filter_map(|variable| Some((of(variable, "name")?, of(variable, "value")?))).collect()
}

fn name_of(container: &Value) -> &str {
    text_of(container, "name").unwrap_or_default()
}

fn text_of<'v>(value: &'v Value, field: &str) -> Option<&'v str> {
    value.get(field).and_then(Value::as_str)
}

fn list<'v>(value: &'v Value, field: &str) -> impl Iterator<Item = &'v Value> + use<'v> {
    value.get(field).and_then(Value::as_array).into_iter().flatten()
}

fn strings(list: Option<&Value>) -> impl Iterator<Item = &str> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    const FOO: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-foo";
    const BAR: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-bar";

    fn look_into(container: &Value) -> (Farmed, Vec<String>) {
        let pod = json!({"metadata": {"annotations": {"a": BAR}, "labels": {"l": "x"}}});
        let mut farm = Farm::new(&pod);
        let farmed = farm.look_into(container);
        (farmed, farm.warnings)
    }

    fn optional(container: &Value) -> Vec<String> {
        let (farmed, warnings) = look_into(container);
        assert_eq!((farmed.required, warnings), (None, vec![]));
        farmed.optional.iter().map(ToString::to_string).collect()
    }

    #[rstest]
    #[case::argument(json!({"args": ["--config", format!("{FOO}/etc/foo.conf")]}))]
    #[case::script(json!({"command": ["sh", "-c", format!("exec {FOO}/bin/foo")]}))]
    #[case::variable(json!({"env": [{"name": "CONF", "value": FOO}]}))]
    #[case::variable_of_variables(json!({"env": [{"name": "DIR", "value": "/nix/store"}, {"name": "CONF", "value": "$(DIR)/00bgd045z0d4icpbc2yyz4gx48ak44la-foo/x"}]}))]
    #[case::argument_of_variables(json!({"env": [{"name": "FOO", "value": "00bgd045z0d4icpbc2yyz4gx48ak44la-foo"}], "args": ["/nix/store/$(FOO)/etc"]}))]
    #[case::working_directory(json!({"workingDir": FOO}))]
    #[case::probe(json!({"livenessProbe": {"exec": {"command": [format!("{FOO}/bin/check")]}}}))]
    #[case::probe_of_literals(json!({"env": [{"name": "FOO", "value": "00bgd045z0d4icpbc2yyz4gx48ak44la-foo"}], "startupProbe": {"exec": {"command": ["/nix/store/$(FOO)/bin/check"]}}}))]
    #[case::hook(json!({"lifecycle": {"preStop": {"exec": {"command": [format!("{FOO}/bin/stop")]}}}}))]
    #[case::mount_path(json!({"volumeMounts": [{"name": "x", "mountPath": format!("{FOO}/etc")}]}))]
    #[case::sub_path(json!({"volumeMounts": [{"name": "x", "mountPath": "/etc/foo", "subPath": format!("{}/etc", &FOO[1..])}]}))]
    #[case::sub_path_of_variables(json!({"env": [{"name": "FOO", "value": "foo"}], "volumeMounts": [{"name": "x", "mountPath": "/etc/foo", "subPathExpr": "nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-$(FOO)/etc"}]}))]
    #[case::image_of_nix_snapshotter(json!({"image": format!("nix:0{FOO}:latest")}))]
    #[case::twice(json!({"args": [format!("{FOO}/a {FOO}/b")], "env": [{"name": "A", "value": FOO}]}))]
    #[case::with_and_without_a_tail(json!({"args": [format!("{FOO}=x"), FOO]}))]
    fn is_found(#[case] container: Value) {
        let mut found = optional(&container);
        found.retain(|path| path != BAR);
        assert_eq!(found, [FOO]);
    }

    #[rstest]
    #[case::other_image(json!({"image": format!("registry.example.com{FOO}:1")}))]
    #[case::other_fields(json!({"terminationMessagePath": format!("{FOO}/x"), "name": FOO}))]
    #[case::unknown_variable(json!({"args": [format!("{FOO}-$(VERSION)")]}))]
    #[case::variable_from_elsewhere(json!({"env": [{"name": "V", "value": "1"}, {"name": "V", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}], "args": [format!("{FOO}-$(V)")]}))]
    #[case::escaped_variable(json!({"env": [{"name": "FOO", "value": "foo"}], "args": ["/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-$$(FOO)"]}))]
    #[case::variable_that_comes_later(json!({"env": [{"name": "A", "value": "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-$(B)"}, {"name": "B", "value": "foo"}]}))]
    #[case::hooks_expand_nothing(json!({"env": [{"name": "B", "value": "foo"}], "lifecycle": {"preStop": {"exec": {"command": ["/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-$(B)"]}}}}))]
    #[case::probes_expand_only_once(json!({"env": [{"name": "A", "value": "foo"}, {"name": "B", "value": "$(A)"}], "livenessProbe": {"exec": {"command": ["/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-$(B)"]}}}))]
    #[case::another_root(json!({"args": [format!("/host{FOO}")]}))]
    #[case::no_texts(json!({"command": [1, null], "env": "x", "args": {}}))]
    fn is_not_found(#[case] container: Value) {
        assert!(optional(&container).is_empty());
    }

    #[test]
    fn an_annotation_of_the_pod_is_known() {
        let from = |path: &str| json!({"env": [{"name": "V", "valueFrom": {"fieldRef": {"fieldPath": path}}}], "args": ["$(V)/x"]});
        assert_eq!(optional(&from("metadata.annotations['a']")), [BAR]);
        assert!(optional(&from("metadata.labels['l']")).is_empty());
        assert!(optional(&from("metadata.name")).is_empty());
    }

    #[test]
    fn the_program_is_required_and_the_rest_is_not() {
        let container = json!({
            "env": [{"name": "FOO", "value": FOO}],
            "command": ["$(FOO)/bin/foo", "--bar", format!("{BAR}/etc")],
        });
        let (farmed, _) = look_into(&container);
        assert_eq!(farmed.required.unwrap().to_string(), FOO);
        assert_eq!(farmed.optional.iter().map(ToString::to_string).collect::<Vec<_>>(), [BAR]);
        // Not the program, but in its arguments.
        assert_eq!(optional(&json!({"command": [format!("x={FOO}")]})), [FOO]);
    }

    #[test]
    fn derivations_are_left_out_and_named() {
        let (farmed, warnings) =
            look_into(&json!({"name": "web", "args": ["x", format!("{FOO}.drv!out {BAR}")]}));
        assert_eq!(farmed.optional.len(), 1);
        assert_eq!(
            warnings,
            [format!("container web, args[1]: {FOO}.drv is a derivation, which is not built; left out")]
        );
    }

    #[test]
    fn there_is_an_end_to_paths() {
        let path = |n: usize| format!("/nix/store/{n:032}-x");
        let args: Vec<_> = (0..400).map(path).collect();
        let (farmed, warnings) = look_into(&json!({"args": args}));
        assert_eq!(farmed.optional.len(), 256);
        assert_eq!(warnings, ["the pod names more than 256 store paths; the rest is left out"]);
    }

    #[test]
    fn there_is_an_end_to_what_variables_hold() {
        let mut env = vec![json!({"name": "V0", "value": "x".repeat(1000)})];
        env.extend(
            (1..60).map(|n| json!({"name": format!("V{n}"), "value": format!("$(V{})", n - 1).repeat(100)})),
        );
        let (farmed, warnings) = look_into(&json!({"env": env, "args": [FOO]}));
        assert_eq!(farmed.optional.len(), 1);
        assert_eq!(warnings, ["the pod's $(VAR) are more than 1048576 bytes; some are not expanded"]);
    }

    #[rstest]
    #[case("gcr.io/distroless/static-debian12:nonroot", true)]
    #[case("registry.k8s.io/pause:3.10", true)]
    #[case("registry.example.com/empty:2", true)]
    #[case("registry.k8s.io/pause-but-not/it", false)]
    #[case("distroless/static", false)]
    #[case("nginx", false)]
    #[case("nix:0/nix/store/x", false)]
    fn markers(#[case] image: &str, #[case] expected: bool) {
        assert_eq!(is_marker(image, &["registry.example.com/empty:1", "nginx:"]), expected);
    }

    #[rstest]
    #[case("$(A)", "1")]
    #[case("$(A)$(A)x", "11x")]
    #[case("$$(A)", "$(A)")]
    #[case("$$$(A)", "$1")]
    #[case("$(B)", "$(B)")]
    #[case("$(A", "$(A")]
    #[case("$", "$")]
    #[case("$A ${A}", "$A ${A}")]
    #[case("ä$(A)ö", "ä1ö")]
    fn as_kubernetes_expands(#[case] text: &str, #[case] expanded: &str) {
        let variables = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        assert_eq!(Expansion::default().expand(text, &variables), expanded);
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "([$()A]|/nix/store/|.){0,60}", value in "([$()A]|.){0,20}") {
            let container = json!({"env": [{"name": "A", "value": value}, {"name": "A", "value": text}], "args": [text]});
            let _ = look_into(&container);
        }
    }
}
