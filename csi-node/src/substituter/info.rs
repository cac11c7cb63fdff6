//! `nix-cache-info`: what a cache says about itself.

use nix_csi_store::STORE_DIR;

/// What a cache that says nothing is taken to have, as in Nix.
const PRIORITY: u32 = 50;
/// Longer answers are something else.
pub(super) const MAX_LEN: usize = 4096;

/// What counts of it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheInfo {
    /// Lower is asked earlier.
    pub(super) priority: u32,
}

impl Default for CacheInfo {
    fn default() -> Self {
        Self { priority: PRIORITY }
    }
}

impl CacheInfo {
    /// Reads it, or gives back the store directory if that is another one: none of its paths can be used.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut info = Self::default();
        for (field, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            match field {
                "StoreDir" if value != STORE_DIR => return Err(value.chars().take(200).collect()),
                "Priority" => info.priority = value.parse().unwrap_or(PRIORITY),
                _ => {}
            }
        }
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::full("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n", Ok(30))]
    #[case::as_nix_copy_writes_it("StoreDir: /nix/store\n", Ok(PRIORITY))]
    #[case::empty("", Ok(PRIORITY))]
    #[case::not_a_number("Priority: first\n", Ok(PRIORITY))]
    #[case::another_store("StoreDir: /gnu/store\nPriority: 1\n", Err("/gnu/store".to_owned()))]
    fn what_counts_is_read(#[case] text: &str, #[case] expected: Result<u32, String>) {
        assert_eq!(CacheInfo::parse(text).map(|info| info.priority), expected);
    }
}
