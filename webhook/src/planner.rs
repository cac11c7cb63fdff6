//! A wish and a pod to a plan: which containers, which volumes, and what each container gets. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use data_encoding::HEXLOWER;
use nix_csi_proto::annotations;
use nix_csi_proto::volume::{self, ENTRY_DIR, ENTRYPOINT, ENTRYPOINT_AUTO};
use nix_csi_proto::{References, System};
use nix_csi_store::StorePath;
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::decide::{Denial, Policy, list, name_of};
use crate::environment::{Base, Environment, furnish, passwd};
use crate::image_map::ImageMaps;
use crate::needs::{Farming, Finder, Need, Why};
use crate::plan::{ContainerPlan, Plan, VolumePlan};
use crate::sidecars;
use crate::status::{Injected, Status};
use crate::wish::{Command, Image, Selection, Wish};

/// Makes one plan.
pub(crate) struct Planner<'a> {
    pod: &'a Value,
    policy: &'a Policy,
    wish: &'a Wish,
    maps: Option<&'a ImageMaps>,
    farming: Farming,
    status: Option<Status>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    /// For `pod`, which gets what `wish` says; `plan` says whose wish it is, and warns already.
    pub(crate) fn new(pod: &'a Value, policy: &'a Policy, wish: &'a Wish, plan: Plan) -> Self {
        Self { pod, policy, wish, maps: None, farming: Farming::Off, status: Status::of(pod), plan }
    }

    /// The same, with images that are packages, and with store paths in texts.
    pub(crate) fn finding(self, maps: Option<&'a ImageMaps>, farming: Farming) -> Self {
        Self { maps, farming, ..self }
    }

    /// The whole plan.
    pub(crate) fn plan(mut self) -> Result<Plan, Denial> {
        let needs = self.needs()?;
        let is_chosen = |name: &String| needs.iter().any(|need| name_of(need.container) == name);
        let without = self.wish.command_of.keys().filter(|name| !is_chosen(name));
        let warning = |name| format!("{}.{name}: the container is not chosen", annotations::COMMAND);
        self.plan.warnings.extend(without.map(warning));
        for need in needs {
            // Offered to all pods of a Namespace, or found in a text: this container goes without.
            let may_go_without = !self.plan.source.is_for_this_pod() || need.why == Why::Farmed;
            match self.add(&need) {
                Ok(()) => {}
                Err(denial) if may_go_without => {
                    self.plan.warnings.push(format!("left out: {denial}"));
                }
                Err(denial) => return Err(denial),
            }
        }
        Ok(self.finish())
    }

    /// The containers that get something.
    fn chosen(&self) -> Result<Vec<&'a Value>, Denial> {
        let (main, init) = (list(self.pod, "containers"), list(self.pod, "initContainers"));
        if main.is_empty() {
            return Err(Denial::NotAPod);
        }
        let all = || init.iter().chain(main);
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

    /// What all containers get.
    fn needs(&mut self) -> Result<Vec<Need<'a>>, Denial> {
        let (chosen, wish) = (self.chosen()?, self.wish);
        let listed = |container: &'a Value| {
            let name = name_of(container);
            let is_chosen = chosen.iter().any(|one| name_of(one) == name);
            is_chosen.then(|| {
                let packages = wish.packages_of.get(name).or(wish.packages.as_ref());
                packages.ok_or_else(|| Denial::NoPackages { container: name.to_owned() })
            })
        };
        let status = self.status.as_ref();
        let Self { pod, policy, maps, farming, .. } = *self;
        let finder = Finder { pod, policy, wish, status, maps, farming };
        let mut warnings = Vec::new();
        let needs = finder.find(listed, &mut warnings)?;
        self.plan.warnings.append(&mut warnings);
        Ok(needs)
    }

    fn add(&mut self, need: &Need<'a>) -> Result<(), Denial> {
        let Need { container, why, packages, optional } = need;
        let name = name_of(container);
        let planned = self.volume(packages, optional);
        let volume = planned.name.clone();
        self.check_mounts(container, &volume)?;
        if !self.plan.volumes.iter().any(|known| known.name == volume) {
            self.plan.volumes.push(planned);
        }
        let (image, base) = self.image(need);
        let swapped = image.is_some();
        // The same wish was served before: whoever changed the image since then had a reason.
        let image = image.filter(|_| !self.is_served(container));
        let command = self.command(need, swapped, &volume);
        let has_args = container.get("args").and_then(Value::as_array).is_some_and(|args| !args.is_empty());
        let args = match why {
            Why::Mapped(map) if !has_args && command.as_ref() == Some(&map.command) => map.args.clone(),
            Why::Mapped(_) | Why::Listed | Why::Farmed => Vec::new(),
        };
        let environment = match why {
            Why::Farmed => Environment::default(),
            Why::Listed | Why::Mapped(_) => {
                furnish(self.pod, container, base, packages, &volume, &mut self.plan.warnings)
            }
        };
        self.plan.containers.push(ContainerPlan {
            name: name.to_owned(),
            volume,
            read_only: !self.wish.read_write(),
            image,
            command,
            args,
            // What it names, it names by its whole path.
            path: *why != Why::Farmed,
            image_map: if let Why::Mapped(map) = why { Some(map.map.clone()) } else { None },
            environment,
        });
        Ok(())
    }

    fn warn(&mut self, warning: String) {
        self.plan.warnings.push(warning);
    }

    /// The volume with `packages`, and with what is `optional`.
    fn volume(&self, packages: &References, optional: &[StorePath]) -> VolumePlan {
        let read_only = !self.wish.read_write();
        let mut attributes = attributes(packages);
        if !optional.is_empty() {
            let optional: Vec<_> = optional.iter().map(ToString::to_string).collect();
            attributes.insert(volume::OPTIONAL_PATHS.to_owned(), optional.join("\n"));
        }
        if let Some(limit) = self.wish.size_limit.as_ref().filter(|_| !read_only) {
            attributes.insert(volume::SIZE_LIMIT.to_owned(), limit.clone());
        }
        let secret = self.wish.cache_secret.clone();
        let text = match &secret {
            Some(secret) => serde_json::json!([read_only, attributes, secret]),
            None => serde_json::json!([read_only, attributes]),
        };
        let hash = digest(&SHA256, text.to_string().as_bytes());
        let name = format!("nix-csi-{}", HEXLOWER.encode(&hash.as_ref()[..5]));
        VolumePlan { name, read_only, secret, attributes }
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
            status.wish == self.plan.wish && status.confirmed(self.pod, container).is_some()
        };
        self.status.as_ref().is_some_and(served)
    }

    /// The image to set, none if it stays; and what there will be in it.
    fn image(&mut self, need: &Need<'_>) -> (Option<String>, Base) {
        let container = need.container;
        let wished = match need.why {
            Why::Listed => self.wish.image.clone().unwrap_or_else(|| self.plan.source.default_image()),
            Why::Mapped(_) => Image::Distroless,
            Why::Farmed => Image::Keep,
        };
        match wished {
            Image::Keep if need.why == Why::Farmed && self.is_marker(container) => (None, Base::Other),
            Image::Keep => {
                let name = name_of(container);
                self.warn(format!("container {name}: /nix of its own image, if any, is hidden"));
                if need.why != Why::Farmed && !has_path(container) {
                    self.warn(format!(
                        "container {name}: it sets no PATH, and its image's own cannot be seen"
                    ));
                }
                (None, Base::Other)
            }
            Image::Own(image) => (Some(image), Base::Other),
            Image::Distroless if self.needs_user(container) => {
                (Some(self.policy.distroless_nonroot.clone()), Base::Distroless)
            }
            Image::Distroless => (Some(self.policy.distroless.clone()), Base::Distroless),
        }
    }

    fn is_marker(&self, container: &Value) -> bool {
        let image = container.get("image").and_then(Value::as_str);
        image.is_some_and(|image| self.policy.is_marker(image))
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
    fn command(&mut self, need: &Need<'_>, swapped: bool, volume: &str) -> Option<Vec<String>> {
        let Need { container, why, packages, .. } = need;
        if *why == Why::Farmed {
            return None;
        }
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
            None if let Why::Mapped(map) = why
                && !map.command.is_empty() =>
            {
                return (!wrapped).then(|| map.command.clone());
            }
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
        let containers = list(self.pod, "initContainers").iter().chain(list(self.pod, "containers"));
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
            let (volume, image_map) = (plan.volume.clone(), plan.image_map.clone());
            injected.insert(plan.name.clone(), Injected { volume, image, image_map });
            if let Some(before) = before
                && !self.plan.volumes.iter().any(|volume| volume.name == before.volume)
                && !self.plan.obsolete.contains(&before.volume)
            {
                self.plan.obsolete.push(before.volume.clone());
            }
        }
        let (source, wish) = (self.plan.source.to_string(), self.plan.wish.clone());
        let status = Status { v: 1, source, wish, containers: injected };
        // A struct of strings always becomes JSON.
        self.plan.status = serde_json::to_string(&status).unwrap_or_default();
        let users = self.plan.containers.iter().filter_map(|container| container.environment.user.as_deref());
        self.plan.passwd = passwd(users);
        self.plan
    }
}

/// Whether the container sets a `PATH` that we can put ours before.
fn has_path(container: &Value) -> bool {
    let env = container.get("env").and_then(Value::as_array).into_iter().flatten();
    env.filter_map(|variable| variable.get("name")).any(|name| name == "PATH")
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
