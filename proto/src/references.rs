//! Lists of package references, as they stand in annotations and volume attributes.
//!
//! ```text
//! list      = JSON array of strings | items separated by newline, space, tab or comma; `#` begins a comment line
//! item      = [ <system> "=" ] reference
//! reference = /nix/store/<hash>-<name> [ "/" <program below it> ]
//! ```
//! What cannot be read is refused with its place; nothing is dropped in silence.

use std::fmt;

use nix_csi_store::{ParseStorePathError, StorePath};

use crate::system::{ParseSystemError, System};

const MAX_LEN: usize = 64 * 1024;
const MAX_ITEMS: usize = 1024;

/// Where in the value an item stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a list: line and column, from one.
    Text {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
    },
    /// In a JSON array: which item, from one.
    Item(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text { line, column } => write!(f, "line {line}, column {column}"),
            Self::Item(n) => write!(f, "item {n}"),
        }
    }
}

/// Why a value is not a list of references.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseReferencesError {
    /// Longer than any list that makes sense.
    #[error("the list is longer than 64 KiB")]
    TooLong,
    /// More items than any list that makes sense.
    #[error("the list has more than {MAX_ITEMS} items")]
    TooMany,
    /// Begins like JSON and is none.
    #[error("it begins with `[` but is not a JSON array of strings: {0}")]
    Json(String),
    /// Not a store path.
    #[error("{place}: {item:?} is not a store path; {source}")]
    StorePath {
        /// Where it stands.
        place: Place,
        /// What stands there, shortened.
        item: String,
        /// Why it is none.
        source: ParseStorePathError,
    },
    /// Something before an `=` that is not a system.
    #[error("{place}: {source}")]
    System {
        /// Where it stands.
        place: Place,
        /// Why it is none.
        source: ParseSystemError,
    },
    /// A derivation is a recipe: building it is not what a node does.
    #[error("{place}: {item:?} is a derivation; name what it builds instead (`nix-store --query --outputs`)")]
    Derivation {
        /// Where it stands.
        place: Place,
        /// What stands there.
        item: String,
    },
    /// A program with a control character, or a blank that is not a space, or one at its end. Nobody means
    /// that, and such a name is not the same everywhere it goes.
    #[error("{place}: {item:?} has a character that does not belong into the name of a program")]
    ProgramCharacter {
        /// Where it stands.
        place: Place,
        /// What stands there.
        item: String,
    },
    /// A program that is not inside its path.
    #[error("{place}: {item:?} leaves its store path")]
    Program {
        /// Where it stands.
        place: Place,
        /// What stands there.
        item: String,
    },
}

/// A store path, and what below it should run when a container has no command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// The path.
    pub path: StorePath,
    /// `bin/hello`, when the reference was `/nix/store/…/bin/hello`.
    pub program: Option<String>,
}

/// One item of a list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Item {
    /// Only for nodes of this system; for all when absent.
    pub system: Option<System>,
    /// What it refers to.
    pub reference: Reference,
}

/// A list of package references, in its order, each item once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References(Vec<Item>);

impl References {
    /// Reads a list. An empty one is a list too; whether that makes sense is the caller's to say.
    pub fn parse(value: &str) -> Result<Self, ParseReferencesError> {
        if value.len() > MAX_LEN {
            return Err(ParseReferencesError::TooLong);
        }
        let mut list = Self::default();
        if value.trim_start().starts_with('[') {
            let items: Vec<String> =
                serde_json::from_str(value).map_err(|error| ParseReferencesError::Json(error.to_string()))?;
            for (n, item) in items.iter().enumerate() {
                list.push(Place::Item(n + 1), item.trim())?;
            }
            return Ok(list);
        }
        for (n, line) in value.lines().enumerate() {
            if line.trim_start().starts_with('#') {
                continue;
            }
            for (column, item) in words(line) {
                list.push(Place::Text { line: n + 1, column }, item)?;
            }
        }
        Ok(list)
    }

    fn push(&mut self, place: Place, text: &str) -> Result<(), ParseReferencesError> {
        let item = parse_item(place, text)?;
        if !self.0.contains(&item) {
            self.0.push(item);
        }
        if self.0.len() > MAX_ITEMS { Err(ParseReferencesError::TooMany) } else { Ok(()) }
    }

    /// The items.
    pub fn items(&self) -> &[Item] {
        &self.0
    }

    /// This list, and behind it what is in `others` and not in this one.
    #[must_use]
    pub fn followed_by(&self, others: &Self) -> Self {
        let mut all = self.clone();
        all.0.extend(others.0.iter().filter(|item| !self.0.contains(item)).cloned());
        all
    }

    /// Whether there is nothing in the list.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<StorePath> for References {
    /// A list of one path, for any system.
    fn from(path: StorePath) -> Self {
        Self(vec![Item { system: None, reference: Reference { path, program: None } }])
    }
}

/// The words of a line, each with its column from one.
fn words(line: &str) -> impl Iterator<Item = (usize, &str)> {
    line.split([' ', '\t', ',', '\r'])
        .scan(1, |column, word| {
            let here = *column;
            *column += word.chars().count() + 1;
            Some((here, word))
        })
        .filter(|(_, word)| !word.is_empty())
}

fn parse_item(place: Place, text: &str) -> Result<Item, ParseReferencesError> {
    // A store path may contain `=` too, but it begins with a slash.
    let (system, path) = match text.split_once('=') {
        Some((system, path)) if !text.starts_with('/') => {
            let system = system.parse().map_err(|source| ParseReferencesError::System { place, source })?;
            (Some(system), path)
        }
        _ => (None, text),
    };
    let item = || text.chars().take(300).collect::<String>();
    let (path, below) = StorePath::split(path).map_err(|source| ParseReferencesError::StorePath {
        place,
        item: item(),
        source,
    })?;
    if path.is_derivation() {
        return Err(ParseReferencesError::Derivation { place, item: item() });
    }
    let program = below.map(|below| below.trim_end_matches('/')).filter(|below| !below.is_empty());
    if program.is_some_and(|program| program.split('/').any(|part| matches!(part, "" | "." | ".."))) {
        return Err(ParseReferencesError::Program { place, item: item() });
    }
    let odd = |c: char| c.is_control() || (c.is_whitespace() && c != ' ');
    if program.is_some_and(|program| program.ends_with(' ') || program.contains(odd)) {
        return Err(ParseReferencesError::ProgramCharacter { place, item: item() });
    }
    Ok(Item { system, reference: Reference { path, program: program.map(str::to_owned) } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const A: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a-1.0";
    const B: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-b=2";

    fn paths(value: &str) -> Vec<String> {
        References::parse(value).unwrap().items().iter().map(|item| item.reference.path.to_string()).collect()
    }

    #[rstest]
    #[case::nothing("", &[])]
    #[case::blank(" \n\t,", &[])]
    #[case::one(A, &[A])]
    #[case::lines(&format!("{A}\n{B}\n"), &[A, B])]
    #[case::commas_and_spaces(&format!("{A}, {B}"), &[A, B])]
    #[case::windows_lines(&format!("{A}\r\n{B}\r\n"), &[A, B])]
    #[case::a_comment_line(&format!("# {B}\n  # too\n{A}"), &[A])]
    #[case::repeated_path_counts_once(&format!("{A} {A}"), &[A])]
    #[case::json(&format!(" [\"{A}\",\"{B}\"]"), &[A, B])]
    #[case::empty_json("[]", &[])]
    fn lists(#[case] value: &str, #[case] expected: &[&str]) {
        assert_eq!(paths(value), expected);
    }

    #[test]
    fn a_system_and_a_program() {
        let list = References::parse(&format!("aarch64-linux={A}/bin/a {B}/")).unwrap();
        let [first, second] = list.items() else { panic!("{list:?}") };
        assert_eq!(first.system, Some(System::Aarch64Linux));
        assert_eq!(first.reference.program.as_deref(), Some("bin/a"));
        assert_eq!((second.system, &second.reference.program), (None, &None));
    }

    #[test]
    fn lists_follow_each_other() {
        let parse = |value: &str| References::parse(value).unwrap();
        let both = parse(&format!("{A}/bin/a {B}")).followed_by(&parse(&format!("{B} {A}")));
        assert_eq!(both, parse(&format!("{A}/bin/a {B} {A}")));
        assert_eq!(References::from(A.parse::<StorePath>().unwrap()), parse(A));
    }

    #[rstest]
    #[case::bare_name(
        "hello",
        "line 1, column 1: \"hello\" is not a store path; expected /nix/store/<hash>-<name>"
    )]
    #[case::second_line(&format!("{A}\n  hello"), "line 2, column 3: \"hello\" is not a store path; expected /nix/store/<hash>-<name>")]
    #[case::unknown_system(&format!("amd64={A}"), "line 1, column 1: \"amd64\" is not a system; known are x86_64-linux, aarch64-linux, armv7l-linux and riscv64-linux")]
    #[case::program_outside(&format!("{A}/../x"), &format!("line 1, column 1: \"{A}/../x\" leaves its store path"))]
    // Found by fuzzing: blanks that separate nothing stayed in the program, but not when read again.
    #[case::form_feed_in_a_program(&format!("{A}/a\u{c}"), &format!("line 1, column 1: \"{A}/a\\u{{c}}\" has a character that does not belong into the name of a program"))]
    #[case::nul_in_a_program(&format!("[\"{A}/a\\u0000\"]"), &format!("item 1: \"{A}/a\\0\" has a character that does not belong into the name of a program"))]
    #[case::space_at_the_end_of_a_program(&format!("[\"{A}/a /\"]"), &format!("item 1: \"{A}/a /\" has a character that does not belong into the name of a program"))]
    #[case::json_item("[\"x\"]", "item 1: \"x\" is not a store path; expected /nix/store/<hash>-<name>")]
    fn errors_name_the_place(#[case] value: &str, #[case] message: &str) {
        assert_eq!(References::parse(value).unwrap_err().to_string(), message);
    }

    #[rstest]
    #[case::derivation(&format!("{A}.drv"))]
    #[case::json_of_numbers("[1]")]
    #[case::broken_json("[\"")]
    #[case::too_long(&" ".repeat(70_000))]
    fn refused(#[case] value: &str) {
        assert!(References::parse(value).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(value in ".{0,200}") {
            let _ = References::parse(&value);
        }
    }
}
