//! What a container runs that has no command: found where the files are, so that admission asks nobody.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use nix_csi_proto::annotations::COMMAND;
use nix_csi_proto::volume::Entrypoint;
use nix_csi_store::StorePath;

use super::inside::Inside;

/// As many names as fit into an event.
const SHOWN: usize = 20;

/// Why there is no entry point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Nothing in `bin`.
    #[error(
        "container {container} has no command, and {package} has no program in bin; \
         give the container a command"
    )]
    None {
        /// Which container.
        container: String,
        /// The first package.
        package: StorePath,
    },
    /// Too much in `bin`.
    #[error(
        "container {container} has no command, and {package} has several programs: {}; \
         choose one with the annotation {COMMAND}.{container}", .candidates.join(", ")
    )]
    Ambiguous {
        /// Which container.
        container: String,
        /// The first package.
        package: StorePath,
        /// Its programs, or the first of them.
        candidates: Vec<String>,
    },
    /// The one that was asked for is not there.
    #[error("container {container} is to run {program:?}, which none of its packages has")]
    Missing {
        /// Which container.
        container: String,
        /// What was asked for.
        program: String,
    },
}

/// The program to link to, as a pod sees it.
pub(super) fn find(
    inside: &Inside<'_>,
    packages: &[StorePath],
    container: &str,
    entrypoint: &Entrypoint,
) -> Result<PathBuf, EntryError> {
    match entrypoint {
        Entrypoint::Program(program) => {
            let below = if program.contains('/') { program.clone() } else { format!("bin/{program}") };
            packages
                .iter()
                .map(|package| PathBuf::from(package.to_string()).join(&below))
                .find(|program| inside.resolve(program).is_some())
                .ok_or_else(|| EntryError::Missing { container: container.into(), program: program.clone() })
        }
        Entrypoint::Auto => {
            let Some(package) = packages.first() else {
                return Err(EntryError::Missing { container: container.into(), program: "auto".into() });
            };
            let programs = programs(inside, package);
            let name = choose(package, container, &programs)?;
            Ok(PathBuf::from(package.to_string()).join("bin").join(name))
        }
    }
}

/// The only program, or the one that is called like its package.
fn choose<'a>(package: &StorePath, container: &str, programs: &'a [String]) -> Result<&'a str, EntryError> {
    match programs {
        [] => Err(EntryError::None { container: container.into(), package: package.clone() }),
        [only] => Ok(only),
        several => {
            several.iter().map(String::as_str).find(|name| *name == package.pname()).ok_or_else(|| {
                EntryError::Ambiguous {
                    container: container.into(),
                    package: package.clone(),
                    candidates: several.iter().take(SHOWN).cloned().collect(),
                }
            })
        }
    }
}

/// What is executable in `bin`, sorted. Wrapped programs hide behind a dot and do not count.
fn programs(inside: &Inside<'_>, package: &StorePath) -> Vec<String> {
    let bin = PathBuf::from(package.to_string()).join("bin");
    let entries = inside.resolve(&bin).and_then(|bin| fs::read_dir(bin).ok());
    let is_program = |name: &String| {
        let physical = inside.resolve(&bin.join(name)).and_then(|physical| fs::metadata(physical).ok());
        physical.is_some_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let mut names: Vec<_> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.') && is_program(name))
        .collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(programs: &[&str]) -> Result<String, EntryError> {
        let package =
            StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-jq-1.7").expect("a store path");
        let programs: Vec<_> = programs.iter().map(ToString::to_string).collect();
        choose(&package, "web", &programs).map(str::to_owned)
    }

    #[test]
    fn the_only_one_or_the_one_with_the_name() {
        assert_eq!(chosen(&["other"]), Ok("other".into()));
        assert_eq!(chosen(&["jq", "jq-tool"]), Ok("jq".into()));
    }

    #[test]
    fn otherwise_the_author_is_told_what_there_is() {
        let message = chosen(&["a", "b"]).unwrap_err().to_string();
        assert!(
            message.contains(
                "several programs: a, b; choose one with the annotation nix.lillecarl.com/command.web"
            ),
            "{message}"
        );
        assert!(matches!(chosen(&[]), Err(EntryError::None { .. })));
    }
}
