//! Any text is an answer of the reader of references. What it finds is found again where it is printed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nix_csi_proto::{Item, References};

fn print(item: &Item) -> String {
    let mut text = String::new();
    if let Some(system) = item.system {
        text.push_str(system.as_str());
        text.push('=');
    }
    text.push_str(&item.reference.path.to_string());
    if let Some(program) = &item.reference.program {
        text.push('/');
        text.push_str(program);
    }
    text
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let Ok(list) = References::parse(text) else { return };
    assert!(list.items().len() <= text.len());
    for (n, item) in list.items().iter().enumerate() {
        assert!(!list.items()[..n].contains(item), "an item stands twice");
        assert!(!item.reference.path.is_derivation());
        if let Some(program) = &item.reference.program {
            assert!(program.split('/').all(|part| !matches!(part, "" | "." | "..")));
        }
    }
    let printed: Vec<_> = list.items().iter().map(print).collect();
    let json = serde_json::to_string(&printed).expect("strings are JSON");
    assert_eq!(References::parse(&json).as_ref(), Ok(&list), "as JSON: {json}");
    // A program out of a JSON array may contain what separates items elsewhere.
    if !printed.iter().any(|item| item.contains([' ', '\t', ',', '\r', '\n'])) {
        let lines = printed.join("\n");
        assert_eq!(References::parse(&lines).as_ref(), Ok(&list), "as lines: {lines}");
    }
});
