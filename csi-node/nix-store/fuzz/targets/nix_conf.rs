//! Any text is an answer of the readers of `nix.conf` and netrc. What they say stands where they say it
//! does, and how lines end does not matter.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nix_csi_store::conf::{ParseConfError, Statement, statements};
use nix_csi_store::{Netrc, ParseNetrcError};

/// What is at a place, both counted from one.
fn at(text: &str, line: usize, column: usize) -> String {
    let line = text.split('\n').nth(line - 1).expect("the line exists");
    assert!(column <= line.chars().count() + 1, "the column exists");
    line.chars().skip(column - 1).collect()
}

fn conf(text: &str) {
    let mut last = 0;
    for statement in statements(text) {
        let line = match statement {
            Ok(Statement::Setting(setting)) => {
                assert!(
                    !setting.name.is_empty() && !setting.name.contains(['=', '#', ' ', '\t', '\r', '\n'])
                );
                assert!(!setting.value.contains(['#', '\n']));
                assert!(at(text, setting.line, setting.column).starts_with(setting.value));
                for (column, word) in setting.words() {
                    assert!(!word.is_empty() && at(text, setting.line, column).starts_with(word));
                }
                setting.line
            }
            Ok(Statement::Include(include)) => {
                assert!(!include.path.is_empty() && !include.path.contains(['#', ' ', '\t', '\r', '\n']));
                assert!(at(text, include.line, include.column).starts_with(include.path));
                include.line
            }
            Err(ParseConfError::Setting { line, column } | ParseConfError::Include { line, column }) => {
                at(text, line, column);
                line
            }
        };
        assert!(line > last, "a line is one statement at most");
        last = line;
    }
    let windows = text.replace('\n', "\r\n");
    assert!(statements(text).eq(statements(&windows)));
}

fn netrc(text: &str) {
    let parsed = Netrc::parse(text);
    match &parsed {
        Ok(netrc) => {
            for host in ["a", "example.com", ""] {
                let Some(login) = netrc.find(host) else { continue };
                assert!(login.login().is_some() || login.password().is_some());
                assert!(netrc.find(&host.to_ascii_uppercase()) == Some(login));
            }
            // Nothing that is added behind changes what was found before, but in a macro.
            if !text.to_ascii_lowercase().contains("macdef") {
                let more = Netrc::parse(&format!("{text}\nmachine a login b password c"));
                let found = more.as_ref().ok().and_then(|more| more.find("a"));
                assert!(found.is_some());
                if let Some(before) = netrc.find("a").filter(|login| login.password().is_some()) {
                    assert!(found == Some(before));
                }
            }
        }
        Err(ParseNetrcError::OpenQuote { line, column }) => {
            assert!(at(text, *line, *column).starts_with('"'));
        }
        Err(ParseNetrcError::BehindQuote { line, column }) => assert!(!at(text, *line, *column).is_empty()),
        Err(ParseNetrcError::NoValue { line, .. }) => assert!(!at(text, *line, 1).is_empty()),
    }
    let windows = text.replace('\n', "\r\n");
    assert!(Netrc::parse(&windows) == parsed);
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    conf(text);
    netrc(text);
});
