//! Which cache has a path, and whether what it says may be believed.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use nix_csi_store::{ContentAddress, NarInfo, StorePath, TrustedKeys};

use super::cache::BinaryCache;
use super::content;
use super::error::{CacheError, FetchError};
use super::turns::Turns;
use crate::store::Origin;

/// Whose word counts.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Keys whose signatures count.
    pub keys: TrustedKeys,
    /// Whether a path needs a signature at all. `false` only for closed test set-ups.
    pub require_sigs: bool,
}

/// Why a path may be taken from a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Proof {
    /// Signed by the key of that name.
    Signature(String),
    /// Its content will be compared with its address.
    Content(ContentAddress),
    /// `require-sigs = false`.
    None,
}

/// The caches that a fetch may ask.
pub(super) struct Caches {
    /// Those of the node: what they give, they give to every pod.
    pub(super) public: Vec<BinaryCache>,
    /// The same, some of them, with a volume's own credentials. They are asked for what the others do not give.
    pub(super) private: Vec<BinaryCache>,
}

impl Caches {
    /// Whether the cache that said no at `url` is asked with a volume's own credentials too.
    fn is_asked_again(&self, url: &str) -> bool {
        self.private.iter().any(|cache| url.starts_with(&**cache.name()))
    }

    fn names(&self) -> String {
        self.public.iter().map(|cache| &**cache.name()).collect::<Vec<_>>().join(", ")
    }
}

/// Where a path will be fetched from.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) info: Arc<NarInfo>,
    pub(super) proof: Proof,
    pub(super) cache: BinaryCache,
    /// Which of the caches that is: the public ones first.
    pub(super) number: usize,
    /// Whether it was asked with a volume's own credentials.
    pub(super) is_private: bool,
}

impl Source {
    /// What is written down about where the path came from.
    pub(super) fn origin(&self) -> Origin {
        let key = match &self.proof {
            Proof::Signature(key) => Some(key.clone()),
            Proof::Content(_) | Proof::None => None,
        };
        Origin { cache: Arc::clone(self.cache.name()), key, private: self.is_private }
    }
}

impl Trust {
    /// What makes `info` credible. Asked before a byte of the path is downloaded.
    pub(super) fn check(&self, info: &NarInfo, cache: &str) -> Result<Proof, FetchError> {
        let failed = match self.keys.verify(&info.fingerprint(), &info.signatures) {
            Ok(key) => return Ok(Proof::Signature(key.to_owned())),
            Err(error) => error,
        };
        if let Some(address) = info.ca.as_deref().and_then(|ca| ca.parse::<ContentAddress>().ok())
            && content::can_check(&address)
            && address.proves(&info.path, &info.references).is_ok()
        {
            return Ok(Proof::Content(address));
        }
        if !self.require_sigs {
            return Ok(Proof::None);
        }
        Err(FetchError::Untrusted { path: info.path.clone(), cache: cache.to_owned(), source: failed })
    }
}

/// Asks all caches of the first tier at once, then those of the next, until one has the path in a way that can be
/// used; those that are asked with a volume's own credentials last, so that what is public stays so. Caches in
/// `except` are not asked.
pub(super) async fn look_up(
    caches: &Caches,
    trust: &Trust,
    turns: &Turns,
    path: &StorePath,
    except: &[usize],
) -> Result<Source, FetchError> {
    let mut failed = None;
    let mut first = 0;
    for (part, is_private) in [(&caches.public, false), (&caches.private, true)] {
        for tier in tiers(part, first, turns, except).await {
            let mut asked: FuturesUnordered<_> =
                tier.into_iter().map(|n| ask(&part[n], first + n, is_private, trust, turns, path)).collect();
            while let Some(answer) = asked.next().await {
                match answer {
                    Ok(Some(source)) => return Ok(source),
                    // It is asked again, with what it wants to hear.
                    Err(FetchError::Lookup { source: CacheError::Unauthorized { url, .. }, .. })
                        if !is_private && caches.is_asked_again(&url) => {}
                    // Whoever could not answer may have it: that is worth another try, a refusal is not.
                    Err(error) if failed.as_ref().is_none_or(|failed| worth_more(&error, failed)) => {
                        failed = Some(error);
                    }
                    Ok(None) | Err(_) => {}
                }
            }
        }
        first += part.len();
    }
    Err(failed.unwrap_or_else(|| FetchError::NotFound { path: path.clone(), caches: caches.names() }))
}

fn worth_more(error: &FetchError, failed: &FetchError) -> bool {
    error.is_temporary() && !failed.is_temporary()
}

async fn ask(
    cache: &BinaryCache,
    number: usize,
    is_private: bool,
    trust: &Trust,
    turns: &Turns,
    path: &StorePath,
) -> Result<Option<Source>, FetchError> {
    let failed = |source| FetchError::Lookup { path: path.clone(), source };
    // Also says whether the cache is one of this store at all.
    let (priority, info) = tokio::join!(cache.priority(turns), cache.narinfo(turns, path));
    priority.map_err(failed)?;
    let Some(info) = info.map_err(failed)? else { return Ok(None) };
    let proof = trust.check(&info, cache.name())?;
    Ok(Some(Source { info: Arc::new(info), proof, cache: cache.clone(), number, is_private }))
}

/// The caches by their priority, the lowest number first. The number of the first one is `first`.
async fn tiers(caches: &[BinaryCache], first: usize, turns: &Turns, except: &[usize]) -> Vec<Vec<usize>> {
    let left: Vec<_> = (0..caches.len()).filter(|number| !except.contains(&(first + number))).collect();
    if left.len() < 2 {
        return vec![left];
    }
    let mut priorities: FuturesUnordered<_> = left
        .into_iter()
        .map(|number| async move { (caches[number].priority(turns).await, number) })
        .collect();
    let mut tiers = BTreeMap::<_, Vec<usize>>::new();
    while let Some((priority, number)) = priorities.next().await {
        // One of another store is asked last, and then says itself what is wrong.
        tiers.entry(priority.unwrap_or(u32::MAX)).or_default().push(number);
    }
    tiers.into_values().collect()
}
