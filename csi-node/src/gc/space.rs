//! How much room there is, and how much there should be. Pure, but for the one question to the kernel.

use std::path::Path;

/// The most that is kept free where nobody says how much.
const MOST: u64 = 10 << 30;

/// `min-free` and `max-free`; without them, a part of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Below this, collection begins. Zero means never.
    pub min_free: Option<u64>,
    /// It ends when so much is free.
    pub max_free: Option<u64>,
}

/// A filesystem, in bytes and in inodes. One without a fixed number of inodes has none in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) bytes: u64,
    pub(super) free_bytes: u64,
    pub(super) inodes: u64,
    pub(super) free_inodes: u64,
}

/// What is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

impl Space {
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Self {
            bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            free_inodes: stat.f_favail,
        })
    }

    /// What collection has to free before it may end.
    pub(super) fn missing(&self, limits: Limits) -> Missing {
        let (_, most) = limits.bytes(self.bytes);
        Missing {
            bytes: most.saturating_sub(self.free_bytes),
            inodes: (self.inodes / 10).saturating_sub(self.free_inodes),
        }
    }

    /// Whether collection is to begin.
    pub(super) fn is_low(&self, limits: Limits) -> bool {
        let (least, _) = limits.bytes(self.bytes);
        limits.min_free != Some(0) && (self.free_bytes < least || self.free_inodes < self.inodes / 20)
    }
}

impl Limits {
    /// When collection begins and when it ends, on a filesystem of so many bytes.
    fn bytes(self, total: u64) -> (u64, u64) {
        let least = self.min_free.unwrap_or_else(|| (total / 10).min(MOST));
        let most = self.max_free.unwrap_or_else(|| least.saturating_mul(2)).max(least);
        // More than there is cannot be free.
        (least.min(total), most.min(total))
    }
}

impl Missing {
    pub(super) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const GIB: u64 = 1 << 30;

    fn space(free_gib: u64, free_inodes: u64) -> Space {
        Space { bytes: 100 * GIB, free_bytes: free_gib * GIB, inodes: 1000, free_inodes }
    }

    #[rstest]
    #[case::enough(10, 500, None, None, false, 10, 0)]
    #[case::too_little(9, 500, None, None, true, 11, 0)]
    #[case::too_few_inodes(50, 49, None, None, true, 0, 51)]
    #[case::as_it_is_said(9, 500, Some(9), Some(15), false, 6, 0)]
    #[case::less_than_said(8, 500, Some(9), Some(15), true, 7, 0)]
    #[case::most_below_least(8, 500, Some(9), Some(1), true, 1, 0)]
    #[case::more_than_there_is(99, 500, Some(200), None, true, 1, 0)]
    #[case::never(0, 0, Some(0), None, false, 0, 100)]
    fn collection_begins_and_ends(
        #[case] free_gib: u64,
        #[case] free_inodes: u64,
        #[case] min_free: Option<u64>,
        #[case] max_free: Option<u64>,
        #[case] is_low: bool,
        #[case] bytes: u64,
        #[case] inodes: u64,
    ) {
        let space = space(free_gib, free_inodes);
        let limits = Limits { min_free: min_free.map(|n| n * GIB), max_free: max_free.map(|n| n * GIB) };
        assert_eq!(space.is_low(limits), is_low);
        assert_eq!(space.missing(limits), Missing { bytes: bytes * GIB, inodes });
    }
}
