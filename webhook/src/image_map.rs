//! Which images are which packages: ImageMaps to an index, and an image to what runs instead. Pure.
//!
//! ```text
//! docker.io/library/redis@sha256:…    this image
//! docker.io/library/redis:7.2         this tag
//! docker.io/library/redis:7*          tags that begin so, the longest beginning first
//! docker.io/library/redis             any
//! ```
//! The first of these that fits is taken. Where two ImageMaps say the same, the name decides, and both are named.

use std::collections::BTreeMap;
use std::fmt;

use nix_csi_proto::{ParseReferencesError, References};
use serde::Deserialize;
use serde_json::Value;

use crate::image::{ImageReference, ParseImageError, is_tag};

/// What an ImageMap wants, as its author wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct ImageMapSpec {
    /// Its rules.
    #[serde(default)]
    pub images: Vec<ImageRule>,
}

/// One rule, as its author wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct ImageRule {
    /// Which images.
    #[serde(rename = "match")]
    pub pattern: String,
    /// References of the packages that are them.
    pub packages: Vec<String>,
    /// What runs where the container has no command of its own.
    #[serde(default)]
    pub command: Vec<String>,
    /// Its arguments, if the container has no arguments either.
    #[serde(default)]
    pub args: Vec<String>,
}

/// Why an ImageMap cannot be used. None of its rules is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageMapError {
    /// A pattern that no image can have.
    #[error("spec.images[{index}].match: {pattern:?} is not an image: {source}")]
    Pattern {
        /// Which rule, from zero.
        index: usize,
        /// Its pattern.
        pattern: String,
        /// What is wrong with it.
        source: ParseImageError,
    },
    /// Packages that cannot be read.
    #[error("spec.images[{index}].packages, {source}")]
    Packages {
        /// Which rule, from zero.
        index: usize,
        /// What is wrong with them.
        source: ParseReferencesError,
    },
    /// No packages.
    #[error("spec.images[{index}].packages is empty; name at least one store path")]
    NoPackages {
        /// Which rule, from zero.
        index: usize,
    },
    /// Arguments of nothing.
    #[error("spec.images[{index}].args has no command before it; set command, too")]
    ArgsWithoutCommand {
        /// Which rule, from zero.
        index: usize,
    },
    /// Not the shape that the CustomResourceDefinition asks for.
    #[error("spec: {0}")]
    Shape(String),
}

/// What images a rule is for, beside the repository. The order is that of being asked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    Digest(String),
    Tag(String),
    Prefix(String),
    Any,
}

impl Which {
    fn fits(&self, image: &ImageReference) -> bool {
        match self {
            Self::Digest(digest) => image.digest.as_ref() == Some(digest),
            Self::Tag(tag) => image.tag.as_ref() == Some(tag),
            Self::Prefix(prefix) => image.tag.as_ref().is_some_and(|tag| tag.starts_with(prefix)),
            Self::Any => true,
        }
    }

    /// Sorts what is asked first to the front.
    fn rank(&self) -> (u8, usize) {
        match self {
            Self::Digest(_) => (0, 0),
            Self::Tag(_) => (1, 0),
            Self::Prefix(prefix) => (2, usize::MAX - prefix.len()),
            Self::Any => (3, 0),
        }
    }
}

/// What runs instead of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The ImageMap that says so.
    pub map: String,
    /// The packages.
    pub packages: References,
    /// What runs where the container has no command; empty if the packages say it.
    pub command: Vec<String>,
    /// Its arguments, if the container has none either.
    pub args: Vec<String>,
}

/// What was found for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found<'a> {
    /// What is taken.
    pub replacement: &'a Replacement,
    /// Another ImageMap that says something about exactly the same images.
    pub tied_with: Option<&'a str>,
}

#[derive(PartialEq, Eq)]
struct Rule {
    which: Which,
    replacement: Replacement,
}

/// All rules of all valid ImageMaps, by repository.
#[derive(Default, PartialEq, Eq)]
pub struct ImageMaps(BTreeMap<String, Vec<Rule>>);

impl fmt::Debug for ImageMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl ImageMaps {
    /// The index of `maps`, by name; and what is wrong with those that are not in it.
    pub fn new<'a>(
        maps: impl IntoIterator<Item = (&'a str, &'a ImageMapSpec)>,
    ) -> (Self, BTreeMap<String, ImageMapError>) {
        let mut index = Self::default();
        let mut errors = BTreeMap::new();
        for (name, spec) in maps {
            match rules(name, spec) {
                Ok(rules) => {
                    for (repository, rule) in rules {
                        index.0.entry(repository).or_default().push(rule);
                    }
                }
                Err(error) => drop(errors.insert(name.to_owned(), error)),
            }
        }
        for rules in index.0.values_mut() {
            rules.sort_by(|a, b| {
                (a.which.rank(), &a.replacement.map).cmp(&(b.which.rank(), &b.replacement.map))
            });
        }
        (index, errors)
    }

    /// The same from specs that have not been read yet.
    pub fn read<'a>(
        maps: impl IntoIterator<Item = (&'a str, &'a Value)>,
    ) -> (Self, BTreeMap<String, ImageMapError>) {
        let mut specs = BTreeMap::new();
        let mut unread = BTreeMap::new();
        for (name, spec) in maps {
            match ImageMapSpec::deserialize(spec) {
                Ok(spec) => drop(specs.insert(name, spec)),
                Err(error) => drop(unread.insert(name.to_owned(), ImageMapError::Shape(error.to_string()))),
            }
        }
        let (index, mut errors) = Self::new(specs.iter().map(|(name, spec)| (*name, spec)));
        errors.extend(unread);
        (index, errors)
    }

    /// What runs instead of `image`, as it stands in a container. None if no rule fits, or it is no image at all.
    pub fn find(&self, image: &str) -> Option<Found<'_>> {
        let image = ImageReference::parse(image).ok()?;
        let rules = self.0.get(&image.repository)?;
        let at = rules.iter().position(|rule| rule.which.fits(&image))?;
        let taken = &rules[at];
        let same = |rule: &&Rule| rule.which == taken.which && rule.replacement.map != taken.replacement.map;
        let tied_with = rules[at + 1..].iter().find(same).map(|rule| rule.replacement.map.as_str());
        Some(Found { replacement: &taken.replacement, tied_with })
    }

    /// Whether there is no rule at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The rules of one ImageMap, with their repositories.
fn rules(map: &str, spec: &ImageMapSpec) -> Result<Vec<(String, Rule)>, ImageMapError> {
    spec.images.iter().enumerate().map(|(index, rule)| parse_rule(map, index, rule)).collect()
}

fn parse_rule(map: &str, index: usize, rule: &ImageRule) -> Result<(String, Rule), ImageMapError> {
    let (repository, which) = parse_pattern(&rule.pattern).map_err(|source| ImageMapError::Pattern {
        index,
        pattern: rule.pattern.clone(),
        source,
    })?;
    // As JSON, so that a program's name may be anything.
    let packages = References::parse(&serde_json::json!(rule.packages).to_string())
        .map_err(|source| ImageMapError::Packages { index, source })?;
    if packages.is_empty() {
        return Err(ImageMapError::NoPackages { index });
    }
    if rule.command.is_empty() && !rule.args.is_empty() {
        return Err(ImageMapError::ArgsWithoutCommand { index });
    }
    let replacement =
        Replacement { map: map.to_owned(), packages, command: rule.command.clone(), args: rule.args.clone() };
    Ok((repository, Rule { which, replacement }))
}

fn parse_pattern(pattern: &str) -> Result<(String, Which), ParseImageError> {
    if let Some(beginning) = pattern.strip_suffix('*') {
        let (name, prefix) = beginning.rsplit_once(':').ok_or(ParseImageError::Tag)?;
        if !(prefix.is_empty() || is_tag(prefix)) || name.contains('@') {
            return Err(ParseImageError::Tag);
        }
        let image = ImageReference::parse_as_written(name)?;
        return match image.tag {
            None => Ok((image.repository, Which::Prefix(prefix.to_owned()))),
            Some(_) => Err(ParseImageError::Tag),
        };
    }
    let image = ImageReference::parse_as_written(pattern)?;
    let which = match (image.digest, image.tag) {
        (Some(digest), _) => Which::Digest(digest),
        (None, Some(tag)) => Which::Tag(tag),
        (None, None) => Which::Any,
    };
    Ok((image.repository, which))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const REDIS: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-redis-7.2.7";
    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn rule(pattern: &str) -> ImageRule {
        ImageRule { pattern: pattern.to_owned(), packages: vec![REDIS.to_owned()], ..ImageRule::default() }
    }

    fn map(patterns: &[&str]) -> ImageMapSpec {
        ImageMapSpec { images: patterns.iter().map(|pattern| rule(pattern)).collect() }
    }

    /// Each pattern in an ImageMap of that name.
    fn index(patterns: &[&str]) -> ImageMaps {
        let maps: Vec<_> = patterns.iter().map(|pattern| (*pattern, map(&[pattern]))).collect();
        let (index, errors) = ImageMaps::new(maps.iter().map(|(name, spec)| (*name, spec)));
        assert!(errors.is_empty(), "{errors:?}");
        index
    }

    #[rstest]
    #[case::exact("redis:7.2", "redis:7.2")]
    #[case::written_out("redis:7.2", "docker.io/library/redis:7.2")]
    #[case::written_out_in_the_map("docker.io/library/redis:7*", "redis:7.2-alpine")]
    #[case::glob("redis:7*", "redis:7")]
    #[case::any_tag("redis:*", "redis")]
    #[case::repository("redis", "redis:8")]
    #[case::repository_by_digest("redis", &format!("redis@{DIGEST}"))]
    #[case::digest(&format!("redis@{DIGEST}"), &format!("redis@{DIGEST}"))]
    #[case::digest_whatever_the_tag(&format!("redis@{DIGEST}"), &format!("redis:x@{DIGEST}"))]
    #[case::tag_of_a_digest("redis:7*", &format!("redis:7.2@{DIGEST}"))]
    #[case::latest("redis:latest", "redis")]
    #[case::port("registry:5000/redis:7*", "registry:5000/redis:7.2")]
    #[case::port_and_no_tag("registry:5000/redis", "registry:5000/redis:7.2")]
    fn fits(#[case] pattern: &str, #[case] image: &str) {
        assert!(index(&[pattern]).find(image).is_some());
    }

    #[rstest]
    #[case::other_tag("redis:7.2", "redis:7.2.1")]
    #[case::other_repository("redis", "bitnami/redis")]
    #[case::other_registry("redis", "quay.io/library/redis")]
    #[case::below("redis", "docker.io/library/redis/x")]
    #[case::beginning_elsewhere("redis:7*", "redis:17")]
    #[case::glob_of_a_digest("redis:7*", &format!("redis@{DIGEST}"))]
    #[case::exact_needs_the_digest(&format!("redis@{DIGEST}"), "redis:7")]
    #[case::no_image("redis", "nix:0/nix/store/x")]
    fn does_not_fit(#[case] pattern: &str, #[case] image: &str) {
        assert_eq!(index(&[pattern]).find(image), None);
    }

    #[test]
    fn the_most_specific_is_taken() {
        let digest = format!("redis@{DIGEST}");
        let all = ["redis", "redis:7*", "redis:7.2*", "redis:*", "redis:7.2", &digest];
        let taken = |image: &str| index(&all).find(image).unwrap().replacement.map.clone();
        assert_eq!(taken(&format!("redis:7.2@{DIGEST}")), digest);
        assert_eq!(taken("redis:7.2"), "redis:7.2");
        assert_eq!(taken("redis:7.2.1"), "redis:7.2*");
        assert_eq!(taken("redis:7"), "redis:7*");
        assert_eq!(taken("redis"), "redis:*");
        let other = DIGEST.replace('e', "f");
        assert_eq!(taken(&format!("redis@{other}")), "redis");
    }

    #[test]
    fn a_tie_names_both() {
        let same = map(&["redis:7*"]);
        let (index, _) = ImageMaps::new([("b", &same), ("a", &same)]);
        let found = index.find("redis:7").unwrap();
        assert_eq!((found.replacement.map.as_str(), found.tied_with), ("a", Some("b")));
        assert_eq!(super::tests::index(&["redis:7*", "redis"]).find("redis:7").unwrap().tied_with, None);
    }

    #[rstest]
    #[case::pattern(
        rule("Redis"),
        "spec.images[0].match: \"Redis\" is not an image: its repository is not lower-case words, with `/`, `.`, `_` or `-` between them"
    )]
    #[case::glob_of_names(
        rule("docker.io/library/*"),
        "spec.images[0].match: \"docker.io/library/*\" is not an image: its tag is not at most 128 letters, digits, `_`, `.` and `-`"
    )]
    #[case::two_stars(
        rule("redis:*7*"),
        "spec.images[0].match: \"redis:*7*\" is not an image: its tag is not at most 128 letters, digits, `_`, `.` and `-`"
    )]
    #[case::star_in_the_middle(
        rule("redis:7*2"),
        "spec.images[0].match: \"redis:7*2\" is not an image: its tag is not at most 128 letters, digits, `_`, `.` and `-`"
    )]
    #[case::star_behind_a_port(rule("registry:5000*"), "")]
    #[case::packages(ImageRule { packages: vec!["redis".into()], ..rule("redis") }, "spec.images[0].packages, item 1: \"redis\" is not a store path; expected /nix/store/<hash>-<name>")]
    #[case::no_packages(ImageRule { packages: vec![], ..rule("redis") }, "spec.images[0].packages is empty; name at least one store path")]
    #[case::args(ImageRule { args: vec!["x".into()], ..rule("redis") }, "spec.images[0].args has no command before it; set command, too")]
    fn errors_name_the_place(#[case] rule: ImageRule, #[case] message: &str) {
        let spec = ImageMapSpec { images: vec![rule] };
        let (index, errors) = ImageMaps::new([("m", &spec)]);
        let said = errors.get("m").map(ToString::to_string).unwrap_or_default();
        assert_eq!(said, message);
        assert_eq!(index.is_empty(), !message.is_empty());
    }

    #[test]
    fn one_bad_rule_makes_its_map_unused_and_no_other() {
        let (bad, good) = (map(&["redis:7", "Redis"]), map(&["redis:8"]));
        let (index, errors) = ImageMaps::new([("bad", &bad), ("good", &good)]);
        assert_eq!(errors.keys().collect::<Vec<_>>(), ["bad"]);
        assert!(index.find("redis:7").is_none() && index.find("redis:8").is_some());
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(pattern in "([a-z0-9./:@*-]|.){0,40}", image in "([a-z0-9./:@-]|.){0,40}") {
            let spec = map(&[&pattern]);
            let (index, _) = ImageMaps::new([("m", &spec)]);
            let _ = index.find(&image);
        }

        #[test]
        fn the_order_of_the_maps_changes_nothing(tags in proptest::collection::vec("7[.]?[0-9]{0,2}[*]?", 1..6), image in "7[.]?[0-9]{0,2}") {
            let maps: Vec<_> = tags.iter().enumerate().map(|(n, tag)| (format!("m{n}"), map(&[&format!("redis:{tag}")]))).collect();
            let forth = maps.iter().map(|(name, spec)| (name.as_str(), spec));
            let (a, _) = ImageMaps::new(forth.clone());
            let (b, _) = ImageMaps::new(forth.rev());
            let image = format!("redis:{image}");
            prop_assert_eq!(a.find(&image), b.find(&image));
        }
    }
}
