//! Pod and policy to a plan: which containers, which volumes, and what each container gets. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use data_encoding::HEXLOWER;
use nix_csi_proto::annotations;
use nix_csi_proto::volume::{self, ENTRY_DIR, ENTRYPOINT, ENTRYPOINT_AUTO};
use nix_csi_proto::{References, System};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::sidecars;
use crate::status::{Injected, Status};
use crate::wish::{Command, Image, Selection, Wish, WishError};

/// What the administrator decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The image without programs, for containers that may run as root.
    pub distroless: String,
    /// The same with a user that is not root.
    pub distroless_nonroot: String,
}

/// Why a pod is refused. The message is all that its author sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The annotations cannot be understood.
    #[error(transparent)]
    Wish(#[from] WishError),
    /// A container that is not there.
    #[error("annotation {key} names container {container:?}, which the pod does not have (it has {})", .present.join(", "))]
    NoContainer {
        /// The annotation.
        key: String,
        /// The container.
        container: String,
        /// The containers there are.
        present: Vec<String>,
    },
    /// A container that was chosen, but for which there is nothing.
    #[error(
        "container {container} is chosen by {} but has no packages; set {} or {}.{container}",
        annotations::CONTAINERS,
        annotations::PACKAGES,
        annotations::PACKAGES
    )]
    NoPackages {
        /// The container.
        container: String,
    },
    /// Something else is where the packages must be.
    #[error(
        "container {container} already mounts volume {volume:?} at {at}; remove that mount or the annotation"
    )]
    Occupied {
        /// The container.
        container: String,
        /// What it mounts there.
        volume: String,
        /// Where.
        at: String,
    },
    /// An overlay cannot be mapped to a user namespace.
    #[error(
        "{}: rw does not work with hostUsers: false, since the kernel cannot id-map an overlay; use ro",
        annotations::MODE
    )]
    HostUsers,
    /// Another system than the programs are for.
    #[error("Nix packages run on Linux, and spec.os.name says otherwise; remove {}", annotations::PACKAGES)]
    NotLinux,
    /// Not a pod.
    #[error("the object is not a pod with containers")]
    NotAPod,
}

/// What is to be done with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing, and why.
    Leave {
        /// For the audit log: one word.
        reason: &'static str,
        /// For the person, if it is something to act on.
        warnings: Vec<String>,
    },
    /// This.
    Inject(Plan),
}

/// What a pod gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// One for each distinct set of packages.
    pub volumes: Vec<VolumePlan>,
    /// In the order of the pod.
    pub containers: Vec<ContainerPlan>,
    /// The status annotation's value.
    pub status: String,
    /// Volumes that an earlier call added and that nobody needs any more.
    pub obsolete: Vec<String>,
    /// For the person.
    pub warnings: Vec<String>,
}

/// One CSI volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlan {
    /// Its name in the pod, made from what is in it.
    pub name: String,
    /// Whether it is read-only.
    pub read_only: bool,
    /// The Secret with credentials for caches, if the pod names one.
    pub secret: Option<String>,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
}

/// What one container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPlan {
    /// Its name.
    pub name: String,
    /// The volume at `/nix`.
    pub volume: String,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// The image to set.
    pub image: Option<String>,
    /// The command to set.
    pub command: Option<Vec<String>>,
}

/// What becomes of `pod`.
pub fn decide(pod: &Value, policy: &Policy) -> Result<Decision, Denial> {
    let leave = |reason, warnings| Ok(Decision::Leave { reason, warnings });
    if is_mirror(pod) {
        return leave("mirror-pod", Vec::new());
    }
    let annotations = pod.pointer("/metadata/annotations").and_then(Value::as_object);
    let texts =
        annotations.into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)));
    let wish = Wish::parse(texts)?;
    if wish.disabled {
        return leave("disabled", Vec::new());
    }
    let mut warnings = Vec::new();
    if wish.farm {
        warnings.push(format!("{}: this version does not look for store paths in pods", annotations::FARM));
    }
    if !wish.wants_packages() {
        if Status::of(pod).is_none() {
            warnings.push(format!("nothing is injected: the pod has no {}", annotations::PACKAGES));
        }
        return leave("no-packages", warnings);
    }
    if pod.pointer("/spec/os/name").and_then(Value::as_str).is_some_and(|os| os != "linux") {
        return Err(Denial::NotLinux);
    }
    if wish.read_write && pod.pointer("/spec/hostUsers") == Some(&Value::Bool(false)) {
        return Err(Denial::HostUsers);
    }
    let (status, plan) = (Status::of(pod), Plan::empty(warnings));
    let mut planner = Planner { pod, policy, wish: &wish, status, wish_digest: digest_of_wish(pod), plan };
    let chosen = planner.chosen()?;
    let without =
        wish.command_of.keys().filter(|name| !chosen.iter().any(|container| name_of(container) == **name));
    planner
        .plan
        .warnings
        .extend(without.map(|name| format!("{}.{name}: the container is not chosen", annotations::COMMAND)));
    for container in chosen {
        planner.add(container)?;
    }
    Ok(Decision::Inject(planner.finish()))
}

fn is_mirror(pod: &Value) -> bool {
    pod.pointer("/metadata/annotations").is_some_and(|all| all.get("kubernetes.io/config.mirror").is_some())
}

fn name_of(container: &Value) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or_default()
}

impl Plan {
    fn empty(warnings: Vec<String>) -> Self {
        Self {
            volumes: Vec::new(),
            containers: Vec::new(),
            status: String::new(),
            obsolete: Vec::new(),
            warnings,
        }
    }
}

struct Planner<'a> {
    pod: &'a Value,
    policy: &'a Policy,
    wish: &'a Wish,
    status: Option<Status>,
    wish_digest: String,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn list(&self, field: &str) -> &'a [Value] {
        self.pod.pointer(&format!("/spec/{field}")).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// The containers that get something.
    fn chosen(&self) -> Result<Vec<&'a Value>, Denial> {
        let (main, init) = (self.list("containers"), self.list("initContainers"));
        if main.is_empty() {
            return Err(Denial::NotAPod);
        }
        let all = || init.iter().chain(main);
        let exists = |name: &str| all().any(|container| name_of(container) == name);
        let present = || all().map(|container| name_of(container).to_owned()).collect();
        for (key, name) in self.named() {
            if !exists(name) {
                let container = name.to_owned();
                return Err(Denial::NoContainer { key, container, present: present() });
            }
        }
        let own = |name: &str| self.wish.packages_of.contains_key(name);
        let is_main = |name: &str| main.iter().any(|container| name_of(container) == name);
        let sidecars = sidecars::of(self.pod);
        let is_main = |name: &str| is_main(name) && !sidecars.contains(name);
        // Later calls must not take what another webhook added in between.
        let is_in = |status: &Status, container: &Value| status.confirmed(self.pod, container).is_some();
        let earlier = self.status.as_ref().filter(|status| all().any(|container| is_in(status, container)));
        let first_seen = |container: &Value| earlier.is_none_or(|status| is_in(status, container));
        let is_chosen = |container: &&Value| {
            let name = name_of(container);
            match &self.wish.containers {
                Some(Selection::Named(names)) => own(name) || names.iter().any(|chosen| chosen == name),
                None if self.wish.packages.is_none() => own(name),
                Some(Selection::All) | None => own(name) || (is_main(name) && first_seen(container)),
            }
        };
        Ok(all().filter(is_chosen).collect())
    }

    /// Every container name in the annotations, with the key it stands in.
    fn named(&self) -> impl Iterator<Item = (String, &'a str)> {
        let wish = self.wish;
        let selected = match &wish.containers {
            Some(Selection::Named(names)) => names.as_slice(),
            _ => &[],
        };
        let of = |key: &'static str| move |name: &'a String| (format!("{key}.{name}"), name.as_str());
        let selected = selected.iter().map(|name| (annotations::CONTAINERS.to_owned(), name.as_str()));
        let packages = wish.packages_of.keys().map(of(annotations::PACKAGES));
        selected.chain(packages).chain(wish.command_of.keys().map(of(annotations::COMMAND)))
    }

    fn add(&mut self, container: &'a Value) -> Result<(), Denial> {
        let name = name_of(container);
        let packages = self.wish.packages_of.get(name).or(self.wish.packages.as_ref());
        let packages = packages.ok_or_else(|| Denial::NoPackages { container: name.to_owned() })?;
        let volume = self.volume(packages);
        self.check_mounts(container, &volume)?;
        let image = self.image(container);
        let swapped = image.is_some();
        // The same wish was served before: whoever changed the image since then had a reason.
        let image = image.filter(|_| !self.is_served(container));
        let command = self.command(container, packages, swapped, &volume);
        self.plan.containers.push(ContainerPlan {
            name: name.to_owned(),
            volume,
            read_only: !self.wish.read_write,
            image,
            command,
        });
        Ok(())
    }

    /// The volume with `packages`, which is planned now if it was not before.
    fn volume(&mut self, packages: &References) -> String {
        let mut attributes = attributes(packages);
        if let Some(limit) = &self.wish.size_limit {
            attributes.insert(volume::SIZE_LIMIT.to_owned(), limit.clone());
        }
        let read_only = !self.wish.read_write;
        let secret = self.wish.cache_secret.clone();
        let text = match &secret {
            Some(secret) => serde_json::json!([read_only, attributes, secret]),
            None => serde_json::json!([read_only, attributes]),
        };
        let text = text.to_string();
        let hash = digest(&SHA256, text.as_bytes());
        let name = format!("nix-csi-{}", HEXLOWER.encode(&hash.as_ref()[..5]));
        if !self.plan.volumes.iter().any(|volume| volume.name == name) {
            self.plan.volumes.push(VolumePlan { name: name.clone(), read_only, secret, attributes });
        }
        name
    }

    fn check_mounts(&self, container: &Value, volume: &str) -> Result<(), Denial> {
        let ours = self.status.as_ref().and_then(|status| status.confirmed(self.pod, container));
        for mount in container.get("volumeMounts").and_then(Value::as_array).into_iter().flatten() {
            let at = mount.get("mountPath").and_then(Value::as_str).unwrap_or_default();
            let of = mount.get("name").and_then(Value::as_str).unwrap_or_default();
            let known = at.trim_end_matches('/') == "/nix"
                && (of == volume || ours.is_some_and(|injected| injected.volume == of));
            // Below it, too: it would hide a part of the packages, or find no directory to be mounted on.
            if Path::new(at).starts_with("/nix") && !known {
                let (container, volume) = (name_of(container).to_owned(), of.to_owned());
                return Err(Denial::Occupied { container, volume, at: at.to_owned() });
            }
        }
        Ok(())
    }

    /// Whether an earlier call did to this container what the annotations say now.
    fn is_served(&self, container: &Value) -> bool {
        let served = |status: &Status| {
            status.wish == self.wish_digest && status.confirmed(self.pod, container).is_some()
        };
        self.status.as_ref().is_some_and(served)
    }

    /// The image to set; none if it stays.
    fn image(&mut self, container: &Value) -> Option<String> {
        match self.wish.image.as_ref().unwrap_or(&Image::Distroless) {
            Image::Keep => {
                let name = name_of(container);
                self.plan
                    .warnings
                    .push(format!("container {name}: /nix of its own image, if any, is hidden"));
                None
            }
            Image::Own(image) => Some(image.clone()),
            Image::Distroless if self.needs_user(container) => Some(self.policy.distroless_nonroot.clone()),
            Image::Distroless => Some(self.policy.distroless.clone()),
        }
    }

    /// Whether the container must not be root, and leaves it to the image who it is.
    fn needs_user(&self, container: &Value) -> bool {
        let setting = |name: &str| {
            let own = container.get("securityContext").and_then(|context| context.get(name));
            own.filter(|value| !value.is_null())
                .or_else(|| self.pod.pointer(&format!("/spec/securityContext/{name}")))
        };
        setting("runAsNonRoot") == Some(&Value::Bool(true)) && setting("runAsUser").is_none_or(Value::is_null)
    }

    /// The command to set: only for a container that has none, or has the one from an earlier call.
    fn command(
        &mut self,
        container: &Value,
        packages: &References,
        swapped: bool,
        volume: &str,
    ) -> Option<Vec<String>> {
        let name = name_of(container);
        let entry = vec![format!("{ENTRY_DIR}/{name}")];
        let present: Vec<_> =
            container.get("command").and_then(Value::as_array).into_iter().flatten().collect();
        let ours = present.len() == 1 && present[0].as_str() == Some(&entry[0]);
        // Another webhook may have wrapped what an earlier call set: the link is needed all the same.
        let args = container.get("args").and_then(Value::as_array).into_iter().flatten();
        let wrapped = !ours && present.iter().copied().chain(args).any(|arg| arg.as_str() == Some(&entry[0]));
        if !present.is_empty() && !ours && !wrapped {
            return None;
        }
        let wished = self.wish.command_of.get(name).or(self.wish.command.as_ref());
        let program = match wished {
            Some(Command::Exact(_)) if wrapped => return None,
            Some(Command::Exact(command)) => return Some(command.clone()),
            Some(Command::Program(program)) => program.clone(),
            None => {
                let first = packages.items().first().filter(|item| item.system.is_none());
                let first = first.and_then(|item| item.reference.program.clone());
                match first {
                    Some(program) => program,
                    // Its own image knows what it runs.
                    None if !swapped && !ours && !wrapped => return None,
                    None => ENTRYPOINT_AUTO.to_owned(),
                }
            }
        };
        let planned = self.plan.volumes.iter_mut().find(|planned| planned.name == volume)?;
        planned.attributes.insert(format!("{ENTRYPOINT}.{name}"), program);
        (!wrapped).then_some(entry)
    }

    fn finish(mut self) -> Plan {
        let containers = self.list("initContainers").iter().chain(self.list("containers"));
        let mut injected = BTreeMap::new();
        for container in containers {
            let Some(plan) = self.plan.containers.iter().find(|plan| plan.name == name_of(container)) else {
                continue;
            };
            let before = self.status.as_ref().and_then(|status| status.confirmed(self.pod, container));
            let current = container.get("image").and_then(Value::as_str);
            let image = match (before, &plan.image) {
                (Some(before), Some(new)) if current != Some(new) && before.image.is_none() => current,
                (Some(before), _) => before.image.as_deref(),
                (None, Some(_)) => current,
                (None, None) => None,
            };
            let image = image.map(str::to_owned);
            injected.insert(plan.name.clone(), Injected { volume: plan.volume.clone(), image });
            if let Some(before) = before
                && !self.plan.volumes.iter().any(|volume| volume.name == before.volume)
                && !self.plan.obsolete.contains(&before.volume)
            {
                self.plan.obsolete.push(before.volume.clone());
            }
        }
        let wish = std::mem::take(&mut self.wish_digest);
        let status = Status { v: 1, source: "pod".to_owned(), wish, containers: injected };
        // A struct of strings always becomes JSON.
        self.plan.status = serde_json::to_string(&status).unwrap_or_default();
        self.plan
    }
}

/// Changes when an annotation of ours does.
fn digest_of_wish(pod: &Value) -> String {
    let all = pod.pointer("/metadata/annotations").and_then(Value::as_object);
    let ours: BTreeMap<_, _> = all
        .into_iter()
        .flatten()
        .filter(|(key, _)| key.starts_with(annotations::PREFIX) && *key != annotations::STATUS)
        .collect();
    let text = serde_json::json!(ours).to_string();
    HEXLOWER.encode(&digest(&SHA256, text.as_bytes()).as_ref()[..8])
}

/// Lists by system: a node uses the one of its own system instead of `paths`, so that one has it all.
fn attributes(packages: &References) -> BTreeMap<String, String> {
    let list = |system: Option<System>| {
        let fits = |of: Option<System>| of.is_none() || of == system;
        let paths = packages.items().iter().filter(|item| fits(item.system));
        paths.map(|item| item.reference.path.to_string()).collect::<Vec<_>>().join("\n")
    };
    let mut attributes: BTreeMap<_, _> = System::ALL
        .into_iter()
        .filter(|system| packages.items().iter().any(|item| item.system == Some(*system)))
        .map(|system| (system.to_string(), list(Some(system))))
        .collect();
    let any = list(None);
    if !any.is_empty() {
        attributes.insert(volume::PATHS.to_owned(), any);
    }
    attributes
}
