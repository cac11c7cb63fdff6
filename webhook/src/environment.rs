//! What programs of Nix miss in an image that is not theirs: made to work, or said. Pure.
//!
//! | What | In an image without programs | In another one |
//! |---|---|---|
//! | certificates | are there | `NIX_SSL_CERT_FILE`, if cacert is among the packages |
//! | time zones | `TZDIR` | `TZDIR`, if tzdata is among the packages; else a warning where `TZ` is set |
//! | locale | `LANG`, and `LOCALE_ARCHIVE` if glibc-locales is among the packages | only the latter |
//! | protocols, services | `NIX_ETC_…`, if iana-etc is among the packages | the same |
//! | users | `/etc/passwd` with the pod's, `HOME`, `USER` | theirs |
//! | `/tmp` when the root is read-only | an emptyDir | theirs |
//! | shells of commands, probes, hooks | mounted where they are looked for, or a warning | theirs |
//! | `LD_LIBRARY_PATH`, `LD_PRELOAD` | a warning | a warning |
//!
//! What the author set stays. Security settings are read and never written.

use std::path::Path;

use data_encoding::HEXLOWER;
use nix_csi_proto::References;
use nix_csi_proto::volume::RESULT;
use nix_csi_store::StorePath;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

/// Holds the pod's users, from where kubelet makes a file of it. Not one of the keys that people write: it asks for
/// nothing.
pub(crate) const PASSWD: &str = "nix-csi.lillecarl.com/passwd";
/// The volume with that file.
const PASSWD_VOLUME: &str = "nix-csi-passwd";
/// Users that images without programs have.
const KNOWN_USERS: [i64; 3] = [0, 65532, 65534];
/// Where commands look for programs that every other image has: what it is, which package has it, and where.
const PROGRAMS: [(&str, &[(&str, &str)]); 5] = [
    ("/bin/sh", SHELLS),
    ("/usr/bin/sh", SHELLS),
    ("/bin/bash", BASHES),
    ("/usr/bin/bash", BASHES),
    ("/usr/bin/env", &[("coreutils", "bin/env"), ("busybox", "bin/busybox")]),
];
const SHELLS: &[(&str, &str)] = &[
    ("bash", "bin/bash"),
    ("bash-interactive", "bin/bash"),
    ("busybox", "bin/busybox"),
    ("dash", "bin/dash"),
];
const BASHES: &[(&str, &str)] = &[("bash", "bin/bash"), ("bash-interactive", "bin/bash")];
/// The same by name alone. (A package called so may be anything; it is only about a warning.)
const NAMES: [(&str, &[&str]); 3] = [
    ("sh", &["bash", "bash-interactive", "busybox"]),
    ("bash", &["bash", "bash-interactive"]),
    ("ash", &["busybox"]),
];
/// Outputs that hold no programs.
const OTHER_OUTPUTS: [&str; 7] = ["-man", "-doc", "-dev", "-info", "-debug", "-lib", "-devdoc"];

/// What a container's image is, as far as that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    /// Ours, without programs.
    Distroless,
    /// Another one, whose contents nobody here knows.
    Other,
}

/// What a container gets besides packages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// Variables that it does not have.
    pub env: Vec<(&'static str, String)>,
    /// Mounts, each of a path where it has none.
    pub mounts: Vec<Value>,
    /// Volumes for those.
    pub volumes: Vec<Value>,
    /// Its line of `/etc/passwd`, if its image has none.
    pub user: Option<String>,
}

/// What `container` of `pod` needs to run programs of `packages`, which are in `volume`. What is not to be had is said.
pub(crate) fn furnish(
    pod: &Value,
    container: &Value,
    base: Base,
    packages: &References,
    volume: &str,
    warnings: &mut Vec<String>,
) -> Environment {
    let packages = packages.items().iter().filter(|item| item.system.is_none());
    let packages: Vec<_> = packages.map(|item| &item.reference.path).collect();
    let room = Room { pod, container, packages: &packages };
    let mut environment = Environment::default();
    room.variables(base, &mut environment, warnings);
    if base == Base::Distroless {
        room.user(&mut environment);
        room.tmp(&mut environment);
        room.programs(volume, &mut environment, warnings);
    }
    environment
}

struct Room<'a> {
    pod: &'a Value,
    container: &'a Value,
    packages: &'a [&'a StorePath],
}

impl<'a> Room<'a> {
    fn name(&self) -> &'a str {
        self.container.get("name").and_then(Value::as_str).unwrap_or_default()
    }

    fn list(&self, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        self.container.get(field).and_then(Value::as_array).into_iter().flatten()
    }

    fn has(&self, variable: &str) -> bool {
        self.list("env").any(|of| of.get("name").and_then(Value::as_str) == Some(variable))
    }

    /// The program part of the first package that is called so.
    fn package(&self, pname: &str) -> Option<&'a StorePath> {
        let has_programs =
            |path: &StorePath| !OTHER_OUTPUTS.iter().any(|output| path.name().ends_with(output));
        self.packages.iter().copied().find(|path| path.pname() == pname && has_programs(path))
    }

    /// A setting of the container, or else of the pod.
    fn security(&self, name: &str) -> Option<&'a Value> {
        let own = self.container.get("securityContext").and_then(|context| context.get(name));
        let own = own.filter(|value| !value.is_null());
        own.or_else(|| self.pod.pointer(&format!("/spec/securityContext/{name}")))
    }

    /// The user that the author chose, if no image has it.
    fn unknown_user(&self) -> Option<i64> {
        self.security("runAsUser").and_then(Value::as_i64).filter(|user| !KNOWN_USERS.contains(user))
    }

    fn has_read_only_root(&self) -> bool {
        self.container.pointer("/securityContext/readOnlyRootFilesystem") == Some(&Value::Bool(true))
    }

    /// What is mounted at `path` or around it, by volume; not what stands below it.
    fn mounted(&self, path: &str) -> Option<&'a str> {
        let mount = self.list("volumeMounts").find(|mount| {
            let at = mount.get("mountPath").and_then(Value::as_str).unwrap_or_default();
            at.len() > 1 && Path::new(path).starts_with(at)
        });
        mount.map(|mount| mount.get("name").and_then(Value::as_str).unwrap_or_default())
    }

    fn variables(&self, base: Base, environment: &mut Environment, warnings: &mut Vec<String>) {
        let (name, result) = (self.name(), |path: &str| format!("{RESULT}/{path}"));
        let mut wanted: Vec<(&str, String)> = Vec::new();
        let has_cacert = self.package("nss-cacert").or_else(|| self.package("cacert")).is_some();
        // A file that is not there would not be passed over, so only what is there for certain.
        if base == Base::Other && has_cacert && !self.has("SSL_CERT_FILE") {
            wanted.push(("NIX_SSL_CERT_FILE", result("etc/ssl/certs/ca-bundle.crt")));
        }
        if self.package("tzdata").is_some() {
            wanted.push(("TZDIR", result("share/zoneinfo")));
        } else if base == Base::Distroless {
            wanted.push(("TZDIR", "/usr/share/zoneinfo".to_owned()));
        } else if self.has("TZ") && !self.has("TZDIR") {
            warnings
                .push(format!("container {name}: Nix programs need tzdata among the packages to heed TZ"));
        }
        if self.package("glibc-locales").is_some() {
            wanted.push(("LOCALE_ARCHIVE", result("lib/locale/locale-archive")));
        } else if self.wants_locale() && !self.has("LOCALE_ARCHIVE") {
            warnings.push(format!("container {name}: its locale needs glibc-locales among the packages"));
        }
        if self.package("iana-etc").is_some() {
            wanted.push(("NIX_ETC_PROTOCOLS", result("etc/protocols")));
            wanted.push(("NIX_ETC_SERVICES", result("etc/services")));
        }
        if base == Base::Distroless {
            if !self.has("LC_ALL") {
                wanted.push(("LANG", "C.UTF-8".to_owned()));
            }
            if self.unknown_user().is_some() || self.has_read_only_root() {
                wanted.push(("HOME", "/tmp".to_owned()));
            }
            wanted.extend(self.unknown_user().map(|user| ("USER", user_name(user))));
        }
        wanted.retain(|(variable, _)| !self.has(variable));
        let elsewhere = self.list("envFrom").next().is_some();
        if elsewhere && !wanted.is_empty() {
            // Ours would hide theirs, and theirs cannot be seen from here.
            let names: Vec<_> = wanted.iter().map(|(variable, _)| *variable).collect();
            let names = names.join(", ");
            warnings.push(format!("container {name}: it has envFrom, so {names} are left to it"));
        } else {
            environment.env = wanted;
        }
        for variable in ["LD_LIBRARY_PATH", "LD_PRELOAD"] {
            if self.has(variable) {
                warnings.push(format!(
                    "container {name}: {variable} reaches Nix programs, too, and may crash them"
                ));
            }
        }
    }

    /// Whether the author chose a locale that glibc does not have built in.
    fn wants_locale(&self) -> bool {
        let built_in = |value: &str| matches!(value, "" | "C" | "POSIX" | "C.UTF-8" | "C.utf8");
        self.list("env").any(|variable| {
            let name = variable.get("name").and_then(Value::as_str).unwrap_or_default();
            let value = variable.get("value").and_then(Value::as_str);
            matches!(name, "LANG" | "LC_ALL") && value.is_some_and(|value| !built_in(value))
        })
    }

    fn user(&self, environment: &mut Environment) {
        let Some(user) = self.unknown_user() else { return };
        if self.mounted("/etc/passwd").is_some_and(|volume| volume != PASSWD_VOLUME) {
            return;
        }
        let group = self.security("runAsGroup").and_then(Value::as_i64).unwrap_or(0);
        environment.user = Some(format!("{0}:x:{user}:{group}:{0}:/tmp:/sbin/nologin", user_name(user)));
        environment.mounts.push(json!({
            "name": PASSWD_VOLUME, "mountPath": "/etc/passwd", "subPath": "passwd", "readOnly": true,
        }));
        environment.volumes.push(json!({
            "name": PASSWD_VOLUME,
            "downwardAPI": {
                "defaultMode": 0o444,
                "items": [{
                    "path": "passwd",
                    "fieldRef": {"apiVersion": "v1", "fieldPath": format!("metadata.annotations['{PASSWD}']")},
                }],
            },
        }));
    }

    fn tmp(&self, environment: &mut Environment) {
        if !self.has_read_only_root() {
            return;
        }
        // One for each container: they shared nothing before.
        let hash = HEXLOWER.encode(&digest(&SHA256, self.name().as_bytes()).as_ref()[..5]);
        let volume = format!("nix-csi-tmp-{hash}");
        if self.mounted("/tmp").is_some_and(|mounted| mounted != volume) {
            return;
        }
        environment.mounts.push(json!({"name": volume, "mountPath": "/tmp"}));
        environment.volumes.push(json!({"name": volume, "emptyDir": {}}));
    }

    /// The programs of the command, of probes and of hooks, with where they stand.
    fn run(&self) -> impl Iterator<Item = (String, &'a str)> + use<'a> {
        let container = self.container;
        let execs =
            ["startupProbe", "livenessProbe", "readinessProbe", "lifecycle/postStart", "lifecycle/preStop"];
        let execs =
            execs.into_iter().map(|place| (place.replace('/', "."), format!("/{place}/exec/command/0")));
        let all = std::iter::once(("command".to_owned(), "/command/0".to_owned())).chain(execs);
        all.filter_map(move |(place, pointer)| Some((place, container.pointer(&pointer)?.as_str()?)))
    }

    fn programs(&self, volume: &str, environment: &mut Environment, warnings: &mut Vec<String>) {
        let name = self.name();
        for (place, program) in self.run() {
            // `$(VAR)` may be anything.
            if program.contains("$(") {
                continue;
            }
            if !program.starts_with('/') {
                let lacks = |(known, packages): &(&str, &[&str])| {
                    *known == program && !packages.iter().any(|package| self.package(package).is_some())
                };
                if NAMES.iter().any(lacks) {
                    warnings.push(format!("container {name}, {place}: none of the packages looks like it has {program}; add bash"));
                }
                continue;
            }
            let ours = |mounted: &str| mounted.starts_with("nix-csi-") && is_program(program);
            if program.starts_with("/nix/") || self.mounted(program).is_some_and(|mounted| !ours(mounted)) {
                continue;
            }
            match self.mountable(program) {
                Some((package, file)) => {
                    let mount = json!({
                        "name": volume, "mountPath": program, "readOnly": true,
                        "subPath": format!("store/{}/{file}", package.base_name()),
                    });
                    if !environment.mounts.contains(&mount) {
                        environment.mounts.push(mount);
                    }
                }
                None => warnings.push(self.missing(&place, program)),
            }
        }
    }

    /// The package with the program that is looked for at that path, and where it is in it.
    fn mountable(&self, at: &str) -> Option<(&'a StorePath, &'static str)> {
        let (_, packages) = PROGRAMS.iter().find(|(program, _)| *program == at)?;
        packages.iter().find_map(|(pname, file)| Some((self.package(pname)?, *file)))
    }

    fn missing(&self, place: &str, program: &str) -> String {
        let name = self.name();
        let package = PROGRAMS.iter().find(|(known, _)| *known == program).map(|(_, packages)| packages[0].0);
        if let Some(package) = package {
            return format!(
                "container {name}, {place}: its image has no {program}; add {package} to the packages"
            );
        }
        let short: String = program.chars().take(100).collect();
        format!(
            "container {name}, {place}: its image has no {short}; write the program without its directory"
        )
    }
}

fn user_name(user: i64) -> String {
    format!("uid{user}")
}

/// Whether this is a path at which programs are mounted.
pub(crate) fn is_program(at: &str) -> bool {
    PROGRAMS.iter().any(|(program, _)| *program == at)
}

/// The file with the users of images without programs, and with `users`.
pub(crate) fn passwd<'a>(users: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut lines: Vec<_> = users.into_iter().collect();
    lines.sort_unstable();
    lines.dedup();
    let known = "root:x:0:0:root:/root:/sbin/nologin\n\
                 nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n\
                 nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n";
    (!lines.is_empty()).then(|| format!("{known}{}\n", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const BASH: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-bash-5.2.37";

    fn packages(names: &[&str]) -> References {
        let paths: Vec<_> =
            names.iter().enumerate().map(|(n, name)| format!("/nix/store/{n:032}-{name}")).collect();
        References::parse(&paths.join(" ")).unwrap()
    }

    fn look(base: Base, container: &Value, names: &[&str]) -> (Environment, Vec<String>) {
        let mut container = container.clone();
        container["name"] = json!("web");
        let pod = json!({"spec": {"containers": [container]}});
        let mut warnings = Vec::new();
        let environment = furnish(&pod, &container, base, &packages(names), "nix-csi-0", &mut warnings);
        (environment, warnings)
    }

    #[rstest]
    #[case::nothing_else(Base::Other, json!({}), &["hello-2.10"], &[])]
    #[case::distroless(Base::Distroless, json!({}), &["hello-2.10"], &[("TZDIR", "/usr/share/zoneinfo"), ("LANG", "C.UTF-8")])]
    #[case::what_is_set_stays(Base::Distroless, json!({"env": [{"name": "TZDIR", "value": "x"}, {"name": "LANG"}]}), &[], &[])]
    #[case::lc_all_says_it(Base::Distroless, json!({"env": [{"name": "LC_ALL", "value": "C"}]}), &[], &[("TZDIR", "/usr/share/zoneinfo")])]
    #[case::certificates(Base::Other, json!({}), &["nss-cacert-3.101"], &[("NIX_SSL_CERT_FILE", "/nix/var/result/etc/ssl/certs/ca-bundle.crt")])]
    #[case::own_certificates(Base::Other, json!({"env": [{"name": "SSL_CERT_FILE", "value": "/ca"}]}), &["nss-cacert-3.101"], &[])]
    #[case::zones_and_locales(Base::Other, json!({"env": [{"name": "LANG", "value": "de_DE.UTF-8"}]}), &["tzdata-2025b", "glibc-locales-2.40"], &[("TZDIR", "/nix/var/result/share/zoneinfo"), ("LOCALE_ARCHIVE", "/nix/var/result/lib/locale/locale-archive")])]
    #[case::services(Base::Other, json!({}), &["iana-etc-20240318"], &[("NIX_ETC_PROTOCOLS", "/nix/var/result/etc/protocols"), ("NIX_ETC_SERVICES", "/nix/var/result/etc/services")])]
    #[case::user(Base::Distroless, json!({"securityContext": {"runAsUser": 12345}}), &[], &[("TZDIR", "/usr/share/zoneinfo"), ("LANG", "C.UTF-8"), ("HOME", "/tmp"), ("USER", "uid12345")])]
    #[case::known_user(Base::Distroless, json!({"securityContext": {"runAsUser": 65532}}), &[], &[("TZDIR", "/usr/share/zoneinfo"), ("LANG", "C.UTF-8")])]
    #[case::read_only_root(Base::Distroless, json!({"securityContext": {"readOnlyRootFilesystem": true}}), &[], &[("TZDIR", "/usr/share/zoneinfo"), ("LANG", "C.UTF-8"), ("HOME", "/tmp")])]
    #[case::user_of_another_image(Base::Other, json!({"securityContext": {"runAsUser": 12345, "readOnlyRootFilesystem": true}}), &[], &[])]
    fn variables(
        #[case] base: Base,
        #[case] container: Value,
        #[case] names: &[&str],
        #[case] expected: &[(&str, &str)],
    ) {
        let (environment, warnings) = look(base, &container, names);
        let env: Vec<_> = environment.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!((env.as_slice(), warnings), (expected, vec![]));
    }

    #[rstest]
    #[case::time_zone(Base::Other, json!({"env": [{"name": "TZ", "value": "Europe/Oslo"}]}), "container web: Nix programs need tzdata among the packages to heed TZ")]
    #[case::locale(Base::Other, json!({"env": [{"name": "LC_ALL", "value": "de_DE.UTF-8"}]}), "container web: its locale needs glibc-locales among the packages")]
    #[case::libraries(Base::Other, json!({"env": [{"name": "LD_LIBRARY_PATH", "value": "/usr/lib"}]}), "container web: LD_LIBRARY_PATH reaches Nix programs, too, and may crash them")]
    #[case::preloaded(Base::Distroless, json!({"env": [{"name": "LD_PRELOAD", "value": "x"}]}), "container web: LD_PRELOAD reaches Nix programs, too, and may crash them")]
    #[case::variables_from_elsewhere(Base::Distroless, json!({"envFrom": [{"configMapRef": {"name": "c"}}]}), "container web: it has envFrom, so TZDIR, LANG are left to it")]
    #[case::shell_of_a_probe(Base::Distroless, json!({"livenessProbe": {"exec": {"command": ["/bin/sh", "-c", "true"]}}}), "container web, livenessProbe: its image has no /bin/sh; add bash to the packages")]
    #[case::env_of_a_hook(Base::Distroless, json!({"lifecycle": {"preStop": {"exec": {"command": ["/usr/bin/env", "x"]}}}}), "container web, lifecycle.preStop: its image has no /usr/bin/env; add coreutils to the packages")]
    #[case::shell_by_name(Base::Distroless, json!({"command": ["sh", "-c", "x"]}), "container web, command: none of the packages looks like it has sh; add bash")]
    #[case::program_of_the_image(Base::Distroless, json!({"command": ["/usr/sbin/nginx"]}), "container web, command: its image has no /usr/sbin/nginx; write the program without its directory")]
    fn what_is_not_to_be_had_is_said(#[case] base: Base, #[case] container: Value, #[case] warning: &str) {
        let (_, warnings) = look(base, &container, &["hello-2.10", "bash-5.2-man"]);
        assert_eq!(warnings, [warning]);
        assert!(warning.len() <= 120, "{}", warning.len());
    }

    #[rstest]
    #[case::shell(json!({"command": ["/bin/sh", "-c", "x"], "livenessProbe": {"exec": {"command": ["/bin/sh"]}}}), &["hello-2", "bash-5.2.37"], &[("/bin/sh", "store/00000000000000000000000000000001-bash-5.2.37/bin/bash")])]
    #[case::busybox(json!({"readinessProbe": {"exec": {"command": ["/bin/sh"]}}}), &["busybox-1.36"], &[("/bin/sh", "store/00000000000000000000000000000000-busybox-1.36/bin/busybox")])]
    #[case::env(json!({"command": ["/usr/bin/env", "bash"]}), &["coreutils-9.5", "bash"], &[("/usr/bin/env", "store/00000000000000000000000000000000-coreutils-9.5/bin/env")])]
    #[case::by_name(json!({"command": ["sh", "-c", "x"]}), &["bash-5.2"], &[])]
    #[case::in_nix(json!({"command": ["/nix/var/entry/web"]}), &["bash-5.2"], &[])]
    #[case::in_a_volume(json!({"command": ["/scripts/run"], "volumeMounts": [{"name": "s", "mountPath": "/scripts"}]}), &[], &[])]
    #[case::shell_in_a_volume(json!({"command": ["/bin/sh"], "volumeMounts": [{"name": "s", "mountPath": "/bin"}]}), &["bash-5"], &[])]
    #[case::variable(json!({"command": ["/$(X)/run"]}), &[], &[])]
    fn shells(#[case] container: Value, #[case] names: &[&str], #[case] expected: &[(&str, &str)]) {
        let (environment, warnings) = look(Base::Distroless, &container, names);
        assert!(warnings.is_empty(), "{warnings:?}");
        let mounts: Vec<_> = environment
            .mounts
            .iter()
            .map(|mount| (mount["mountPath"].as_str().unwrap(), mount["subPath"].as_str().unwrap()))
            .collect();
        assert_eq!(mounts, expected);
        assert!(
            environment.mounts.iter().all(|mount| mount["name"] == "nix-csi-0" && mount["readOnly"] == true)
        );
        assert_eq!(look(Base::Other, &container, names).0.mounts, Vec::<Value>::new());
    }

    #[test]
    fn a_read_only_root_gets_its_tmp_once() {
        let mut container = json!({"securityContext": {"readOnlyRootFilesystem": true}});
        let (environment, _) = look(Base::Distroless, &container, &[]);
        assert_eq!(environment.volumes[0]["emptyDir"], json!({}));
        assert_eq!(environment.mounts[0]["mountPath"], "/tmp");
        assert_eq!(environment.mounts[0]["name"], environment.volumes[0]["name"]);
        // Again, with what it got.
        container["volumeMounts"] = json!(environment.mounts);
        assert_eq!(look(Base::Distroless, &container, &[]).0.mounts, environment.mounts);
        for at in ["/tmp", "/tmp/"] {
            container["volumeMounts"] = json!([{"name": "own", "mountPath": at}]);
            assert!(look(Base::Distroless, &container, &[]).0.mounts.is_empty());
        }
        // Below it is not at it.
        container["volumeMounts"] = json!([{"name": "own", "mountPath": "/tmp/x"}]);
        assert_eq!(look(Base::Distroless, &container, &[]).0.mounts.len(), 1);
    }

    #[test]
    fn an_unknown_user_is_in_passwd() {
        let context = json!({"runAsUser": 12345, "runAsGroup": 3000});
        let (environment, _) = look(Base::Distroless, &json!({"securityContext": context}), &[]);
        let user = environment.user.as_deref().unwrap();
        assert_eq!(user, "uid12345:x:12345:3000:uid12345:/tmp:/sbin/nologin");
        assert_eq!(environment.mounts[0]["mountPath"], "/etc/passwd");
        assert!(
            environment.volumes[0]
                .to_string()
                .contains("metadata.annotations['nix-csi.lillecarl.com/passwd']")
        );
        let own = json!({"securityContext": context, "volumeMounts": [{"name": "users", "mountPath": "/etc/passwd"}]});
        assert_eq!(look(Base::Distroless, &own, &[]).0.user, None);
        let file = passwd([user, user]).unwrap();
        assert!(file.starts_with("root:x:0:0:") && file.ends_with(&format!("\n{user}\n")), "{file}");
        assert_eq!(file.matches("uid12345:x").count(), 1);
        assert_eq!(passwd([]), None);
    }

    #[test]
    fn packages_for_one_system_are_not_counted_on() {
        let list = References::parse(&format!("aarch64-linux={BASH}")).unwrap();
        let container = json!({"name": "web", "command": ["/bin/sh"]});
        let mut warnings = Vec::new();
        let environment = furnish(&json!({}), &container, Base::Distroless, &list, "v", &mut warnings);
        assert!(environment.mounts.is_empty() && !warnings.is_empty());
    }
}
