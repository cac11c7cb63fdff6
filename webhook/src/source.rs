//! Whose word counts: pod, owner or Namespace. Pure.
//!
//! From the pod outwards, the first object that says `inject` or `packages` decides. Objects nearer than that may
//! refine it (`image`, `mode`, `command`, …), farther ones are not even read.

use std::collections::BTreeMap;
use std::fmt;

use data_encoding::HEXLOWER;
use nix_csi_proto::annotations::{self, PREFIX, STATUS};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::decide::Denial;
use crate::origin::{Namespace, Origin};
use crate::wish::{Image, Wish};

/// The object on which a wish stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The pod itself, mostly from its template.
    Pod,
    /// What owns it.
    Owner {
        /// `Deployment`, …
        kind: String,
        /// Its name.
        name: String,
    },
    /// Its Namespace.
    Namespace {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod => out.write_str("pod"),
            Self::Owner { kind, name } => write!(out, "{kind}/{name}"),
            Self::Namespace { name } => write!(out, "Namespace/{name}"),
        }
    }
}

impl Source {
    /// What comes before a message about an annotation: nothing for the pod, which the message is about anyway.
    pub(crate) fn prefix(&self) -> String {
        if *self == Self::Pod { String::new() } else { format!("{self}: ") }
    }

    /// What becomes of images when nobody says it. A pod that did not ask must not lose its image.
    pub(crate) fn default_image(&self) -> Image {
        match self {
            Self::Pod | Self::Owner { .. } => Image::Distroless,
            Self::Namespace { .. } => Image::Keep,
        }
    }

    /// Whether somebody wrote this for these very pods, and so is refused what cannot work; what a Namespace offers
    /// is left out where it does not fit.
    pub(crate) fn is_for_this_pod(&self) -> bool {
        match self {
            Self::Pod | Self::Owner { .. } => true,
            Self::Namespace { .. } => false,
        }
    }
}

/// What all objects that count say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wished {
    pub(crate) wish: Wish,
    /// Whose packages; none if there are none.
    pub(crate) source: Option<Source>,
    /// Who says something about farming.
    pub(crate) farmer: Option<Source>,
    /// Changes when an annotation of ours that counts does.
    pub(crate) digest: String,
}

/// The annotations of ours of one object.
type Texts<'a> = Vec<(&'a str, &'a str)>;

/// What counts for `pod`, whose containers have the names `present`, if that is known; none if that is `inject: disabled`.
pub(crate) fn resolve(
    pod: &Value,
    origin: &Origin,
    present: Option<&[&str]>,
) -> Result<Option<Wished>, Denial> {
    let is_there = |name: &str| present.is_none_or(|present| present.contains(&name));
    let mut together = Together::default();
    let mut levels = std::iter::once((Source::Pod, ours_of(pod))).chain(origin.deciding().map(|owner| {
        let (kind, name) = (owner.object.kind.clone(), owner.object.name.clone());
        (Source::Owner { kind, name }, ours(&owner.annotations))
    }));
    for (source, texts) in levels.by_ref() {
        let wish = Wish::parse(texts.iter().copied())
            .map_err(|error| Denial::Wish { at: source.clone(), error: Box::new(error) })?;
        if let Some((key, container)) = wish.named().find(|(_, name)| !is_there(name)) {
            let present = present.into_iter().flatten().map(ToString::to_string).collect();
            return Err(Denial::NoContainer { at: source, key, container: container.to_owned(), present });
        }
        if wish.inject == Some(false) && !together.asked {
            return Ok(None);
        }
        if together.take(source, wish, &texts) {
            return Ok(Some(together.finish()));
        }
    }
    if let Some(namespace) = origin.namespace.as_deref()
        && (namespace.is_opted_in() || together.asked)
    {
        let (wish, texts) = of_namespace(namespace, is_there)?;
        together.take(Source::Namespace { name: namespace.name.clone() }, wish, &texts);
    }
    Ok(Some(together.finish()))
}

/// Whose packages a pod is to get, as far as metadata say it.
pub(crate) fn wants(pod: &Value, origin: &Origin) -> Option<Source> {
    if origin.namespace.as_ref().is_some_and(|namespace| namespace.is_excluded()) {
        return None;
    }
    // Which containers there are is not known: nothing that is said about one is wrong, and none is chosen by it.
    resolve(pod, origin, None).ok().flatten().and_then(|wished| wished.source)
}

/// Whether the pod's own annotations say it all, so that nobody else need be asked.
pub(crate) fn is_settled_by(pod: &Value) -> bool {
    // What cannot be read is refused without asking anybody.
    Wish::parse(ours_of(pod)).map_or(true, |wish| wish.inject == Some(false) || wish.wants_packages())
}

fn of_namespace(namespace: &Namespace, is_there: impl Fn(&str) -> bool) -> Result<(Wish, Texts<'_>), Denial> {
    let texts = ours(&namespace.annotations);
    let at = || Source::Namespace { name: namespace.name.clone() };
    let mut wish = Wish::parse(texts.iter().copied())
        .map_err(|error| Denial::Wish { at: at(), error: Box::new(error) })?;
    // On a Namespace the label says it. What contradicts it there is not weighed against it.
    if wish.inject == Some(false) && namespace.is_opted_in() {
        return Err(Denial::Contradiction { at: at() });
    }
    wish.keep_containers(is_there);
    Ok((wish, texts))
}

/// What has been read so far, from the pod outwards.
#[derive(Default)]
struct Together<'a> {
    wish: Wish,
    source: Option<Source>,
    farmer: Option<Source>,
    texts: BTreeMap<&'a str, &'a str>,
    /// Somebody says `inject: enabled`, and nobody nearer has packages.
    asked: bool,
}

impl<'a> Together<'a> {
    /// Adds what an object farther out says. Whether that was the last one that counts.
    fn take(&mut self, source: Source, wish: Wish, texts: &Texts<'a>) -> bool {
        // It wants nothing itself, and nobody else gets what stands there.
        if wish.inject == Some(false) {
            return false;
        }
        self.asked |= wish.inject == Some(true);
        for (key, value) in texts {
            self.texts.entry(key).or_insert(value);
        }
        let has_packages = wish.wants_packages();
        if wish.farm.is_some() {
            self.farmer.get_or_insert_with(|| source.clone());
        }
        self.wish = std::mem::take(&mut self.wish).or(wish);
        if has_packages {
            self.source = Some(source);
        }
        has_packages
    }

    fn finish(self) -> Wished {
        let text = serde_json::json!(self.texts).to_string();
        let digest = HEXLOWER.encode(&digest(&SHA256, text.as_bytes()).as_ref()[..8]);
        let mut wish = self.wish;
        wish.inject = self.asked.then_some(true);
        Wished { wish, source: self.source, farmer: self.farmer, digest }
    }
}

fn ours_of(pod: &Value) -> Texts<'_> {
    let all = pod.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten();
    all.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?))).filter(is_ours).collect()
}

fn ours(all: &BTreeMap<String, String>) -> Texts<'_> {
    all.iter().map(|(key, value)| (key.as_str(), value.as_str())).filter(is_ours).collect()
}

fn is_ours((key, _): &(&str, &str)) -> bool {
    key.starts_with(PREFIX) && *key != STATUS
}

/// For whoever asked and gets nothing.
pub(crate) fn nothing_offered() -> String {
    format!(
        "nothing is injected: neither the pod nor what owns it has {}, and its namespace offers none",
        annotations::PACKAGES
    )
}
