//! Any text is an answer of the search for store paths, and what it finds stands there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nix_csi_store::{StorePath, find_store_paths};

fn belongs_into_a_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte)
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let mut last = 0;
    for found in find_store_paths(text) {
        assert!(found.range.start >= last, "they overlap");
        last = found.range.end;
        let here = &text[found.range.clone()];
        assert_eq!(here.parse::<StorePath>().as_ref(), Ok(&found.path));
        assert_eq!(here, found.path.to_string());
        // Nothing absolute begins in the middle of a word, and a name ends where it must.
        let before = &text[..found.range.start];
        let in_a_word = before.ends_with(|c: char| c.is_ascii_alphanumeric() || "_.+/-~".contains(c));
        assert!(!in_a_word || before.ends_with("file://") || before.ends_with("nix:0"));
        let rest = &bytes[found.range.end..];
        let is_whole = rest.first().is_none_or(|byte| !belongs_into_a_name(*byte) || b".?=".contains(byte));
        assert!(is_whole || found.path.name().len() == 211);
        // It is found again where it stands alone.
        let again: Vec<_> = find_store_paths(here).map(|found| found.path).collect();
        let trimmed = here.trim_end_matches(['.', '?', '=']);
        assert!(again == [found.path] || trimmed != here);
    }
});
