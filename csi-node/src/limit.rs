//! Whether a pod may have a volume to write into, and how much of it. Pure.

use std::path::PathBuf;

use nix_csi_proto::volume::{MEDIUM, Medium, SIZE_LIMIT};

use crate::volume::Limit;

/// Why a pod may not write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// The administrator wants one.
    #[error(
        "a volume that can be written needs `{SIZE_LIMIT}` on this node, at most {most} bytes (max-size-limit)"
    )]
    Missing {
        /// The most that it may be.
        most: u64,
    },
    /// The administrator wants less.
    #[error("`{SIZE_LIMIT}` of {bytes} bytes is more than the {most} that this node allows (max-size-limit)")]
    TooMuch {
        /// What was asked for.
        bytes: u64,
        /// The most that it may be.
        most: u64,
    },
    /// Nobody would hold the pod to it.
    #[error(
        "`{SIZE_LIMIT}` cannot be enforced here: the filesystem of {} has no project quotas; \
         set `{MEDIUM}: Memory` beside it, or let the administrator mount that filesystem with prjquota",
        root.display()
    )]
    NotEnforced {
        /// The driver's directory.
        root: PathBuf,
    },
    /// The disk is needed for what is there.
    #[error("less is free on this node's disk than min-free says, so no more pods may write to it")]
    Low,
}

/// What a node has for pods that write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Node {
    /// `max-size-limit`.
    pub(crate) most: Option<u64>,
    /// Whether the filesystem enforces limits.
    pub(crate) has_quotas: bool,
    /// Whether less is free than there should be.
    pub(crate) is_low: bool,
}

/// Whether a volume with this limit may be published on `node`. One that was there before may stay, whatever has been
/// decided since; but not without its limit.
pub(crate) fn check(
    limit: Option<Limit>,
    is_new: bool,
    node: Node,
    root: impl FnOnce() -> PathBuf,
) -> Result<(), LimitError> {
    match (node.most.filter(|_| is_new), limit) {
        (Some(most), None) => return Err(LimitError::Missing { most }),
        (Some(most), Some(Limit { bytes, .. })) if bytes > most => {
            return Err(LimitError::TooMuch { bytes, most });
        }
        (Some(_) | None, _) => {}
    }
    let medium = limit.map_or(Medium::Disk, |limit| limit.medium);
    match medium {
        Medium::Disk if limit.is_some() && !node.has_quotas => Err(LimitError::NotEnforced { root: root() }),
        Medium::Disk if is_new && node.is_low => Err(LimitError::Low),
        Medium::Disk | Medium::Memory => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const PLAIN: Node = Node { most: None, has_quotas: false, is_low: false };
    const STRICT: Node = Node { most: Some(10), has_quotas: true, is_low: false };
    const LOW: Node = Node { is_low: true, ..PLAIN };

    fn disk(bytes: u64) -> Limit {
        Limit { bytes, medium: Medium::Disk }
    }

    fn memory(bytes: u64) -> Limit {
        Limit { bytes, medium: Medium::Memory }
    }

    #[rstest]
    #[case::as_much_as_it_likes(None, true, PLAIN, Ok(()))]
    #[case::in_memory(Some(memory(5)), true, PLAIN, Ok(()))]
    #[case::not_enforced(Some(disk(5)), true, PLAIN, Err(LimitError::NotEnforced { root: "/root".into() }))]
    #[case::not_enforced_any_more(Some(disk(5)), false, PLAIN, Err(LimitError::NotEnforced { root: "/root".into() }))]
    #[case::enforced(Some(disk(10)), true, STRICT, Ok(()))]
    #[case::none_where_it_is_needed(None, true, STRICT, Err(LimitError::Missing { most: 10 }))]
    #[case::too_much(Some(disk(11)), true, STRICT, Err(LimitError::TooMuch { bytes: 11, most: 10 }))]
    #[case::too_much_memory(Some(memory(11)), true, STRICT, Err(LimitError::TooMuch { bytes: 11, most: 10 }))]
    #[case::was_there_before_the_limit(None, false, STRICT, Ok(()))]
    #[case::was_there_before_it_sank(Some(disk(11)), false, STRICT, Ok(()))]
    #[case::full(None, true, LOW, Err(LimitError::Low))]
    #[case::full_but_was_there_before(None, false, LOW, Ok(()))]
    #[case::memory_needs_no_disk(Some(memory(5)), true, LOW, Ok(()))]
    fn who_may_write(
        #[case] limit: Option<Limit>,
        #[case] is_new: bool,
        #[case] node: Node,
        #[case] expected: Result<(), LimitError>,
    ) {
        assert_eq!(check(limit, is_new, node, || "/root".into()), expected);
    }
}
