//! The syntax of `nix.conf`: lines, and nothing of what they mean.
//!
//! ```text
//! line      = [ statement ] [ "#" comment ]
//! statement = name "=" value | "include" path | "!include" path
//! ```
//! As in Nix, a line is a statement of its own: nothing continues one, nothing is quoted, and `#` begins a
//! comment wherever it stands. A value is what is left of its line without the blanks around it, and may be
//! empty. Blanks are space, tab and carriage return.
//!
//! The one thing that Nix refuses and that is read here: `name=value` without blanks around the `=`.
//!
//! No file is opened: an `include` comes out as what it is, for the caller to follow or to refuse.

/// Why a line is not a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseConfError {
    /// Neither a setting nor an include.
    #[error("line {line}, column {column}: expected `name = value`")]
    Setting {
        /// Which line, from one.
        line: usize,
        /// Where something else stands than what is expected: which character, from one.
        column: usize,
    },
    /// An include of nothing, or of more than one file. Names with blanks cannot be written.
    #[error("line {line}, column {column}: expected `include <path>`")]
    Include {
        /// Which line, from one.
        line: usize,
        /// Where the path, or the second one, should or should not stand.
        column: usize,
    },
}

impl ParseConfError {
    /// Which line, from one.
    pub fn line(&self) -> usize {
        match self {
            Self::Setting { line, .. } | Self::Include { line, .. } => *line,
        }
    }
}

/// One line that says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statement<'a> {
    /// `name = value`.
    Setting(Setting<'a>),
    /// `include path` or `!include path`.
    Include(Include<'a>),
}

/// `name = value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting<'a> {
    /// The name. Never empty.
    pub name: &'a str,
    /// The value, with the blanks in it as they are; Nix makes one space of them.
    pub value: &'a str,
    /// Which line, from one.
    pub line: usize,
    /// Where the value begins: which character, from one.
    pub column: usize,
}

impl<'a> Setting<'a> {
    /// The items of a value that is a list, each with its column.
    pub fn words(&self) -> impl Iterator<Item = (usize, &'a str)> + use<'a> {
        words(self.value, self.column)
    }
}

/// Another file's statements, to be read where this stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Include<'a> {
    /// The file. A relative path is relative to the file that this stands in.
    pub path: &'a str,
    /// Whether the file may be missing: `!include`.
    pub optional: bool,
    /// Which line, from one.
    pub line: usize,
    /// Where the path begins: which character, from one.
    pub column: usize,
}

/// Reads the statements of a file, in their order. Whether the later of two wins is the caller's to say.
pub fn statements(text: &str) -> impl Iterator<Item = Result<Statement<'_>, ParseConfError>> {
    text.split('\n').enumerate().filter_map(|(n, line)| statement(n + 1, line).transpose())
}

fn statement(line: usize, text: &str) -> Result<Option<Statement<'_>>, ParseConfError> {
    let text = text.split_once('#').map_or(text, |(before, _)| before);
    let mut rest = words(text, 1);
    let Some((start, first)) = rest.next() else { return Ok(None) };
    if let "include" | "!include" = first {
        let end = start + first.chars().count();
        let (column, path) = rest.next().ok_or(ParseConfError::Include { line, column: end })?;
        if let Some((column, _)) = rest.next() {
            return Err(ParseConfError::Include { line, column });
        }
        return Ok(Some(Statement::Include(Include {
            path,
            optional: first.starts_with('!'),
            line,
            column,
        })));
    }
    let name = first.split_once('=').map_or(first, |(name, _)| name);
    let end = start + name.chars().count();
    // What stands between the name and the `=` that must follow it.
    let (column, second) =
        if name.len() < first.len() { (end, "=") } else { rest.next().unwrap_or((end, "")) };
    if name.is_empty() || !second.starts_with('=') {
        return Err(ParseConfError::Setting { line, column });
    }
    // The first `=` of the line: there is none in the name, nor between.
    let (_, behind) = text.split_once('=').ok_or(ParseConfError::Setting { line, column })?;
    // From the end first: an empty value stands right behind the `=`, whatever blanks follow.
    let behind = behind.trim_end_matches(BLANKS);
    let value = behind.trim_start_matches(BLANKS);
    let column = column + 1 + (behind.len() - value.len());
    Ok(Some(Statement::Setting(Setting { name, value, line, column })))
}

const BLANKS: [char; 3] = [' ', '\t', '\r'];

/// The words of a text, each with its column, the text's own being `column`.
fn words(text: &str, column: usize) -> impl Iterator<Item = (usize, &str)> {
    text.split(BLANKS)
        .scan(column, |next, word| {
            let here = *next;
            *next += word.chars().count() + 1;
            Some((here, word))
        })
        .filter(|(_, word)| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    fn only(text: &str) -> Result<Statement<'_>, ParseConfError> {
        let mut all: Vec<_> = statements(text).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    // What Nix 2.8.0 makes of a line (`nix show-config`), but for the two without blanks.
    #[rstest]
    #[case::plain("cores = 4", ("cores", "4", 9))]
    #[case::empty_value("cores =", ("cores", "", 8))]
    // Found by fuzzing: the column depended on how lines end.
    #[case::empty_value_and_blanks("cores = \t\r", ("cores", "", 8))]
    #[case::blanks_around("\t cores\t=  4 \t", ("cores", "4", 12))]
    #[case::a_list("a = x  y\tz", ("a", "x  y\tz", 5))]
    #[case::a_comment_behind("cores = 4 # = 5", ("cores", "4", 9))]
    #[case::a_comment_without_blanks("a = http://x#y", ("a", "http://x", 5))]
    #[case::windows_line("cores = 4\r", ("cores", "4", 9))]
    #[case::value_with_equals("a = = b=c", ("a", "= b=c", 5))]
    #[case::backslash_is_no_continuation("a = b \\", ("a", "b \\", 5))]
    #[case::no_blanks("a=b=c", ("a", "b=c", 3))]
    #[case::no_blank_before("a= b", ("a", "b", 4))]
    #[case::no_blank_behind("a =b", ("a", "b", 4))]
    #[case::columns_are_characters("é = ü", ("é", "ü", 5))]
    #[case::only_four_kinds_of_blank("a = \u{a0}b\u{b}", ("a", "\u{a0}b\u{b}", 5))]
    #[case::include_is_a_name_too("includes = x", ("includes", "x", 12))]
    fn settings(#[case] text: &str, #[case] (name, value, column): (&str, &str, usize)) {
        assert_eq!(only(text), Ok(Statement::Setting(Setting { name, value, line: 1, column })));
    }

    #[rstest]
    #[case::plain("include a", ("a", false, 9))]
    #[case::optional(" !include\t/b/c # why", ("/b/c", true, 11))]
    #[case::odd_names_are_names("include =", ("=", false, 9))]
    fn includes(#[case] text: &str, #[case] (path, optional, column): (&str, bool, usize)) {
        assert_eq!(only(text), Ok(Statement::Include(Include { path, optional, line: 1, column })));
    }

    #[rstest]
    #[case::nothing("")]
    #[case::blank(" \t\r\n\n")]
    #[case::comments("# a = b\n  #\n#include x")]
    fn lines_that_say_nothing(#[case] text: &str) {
        assert_eq!(statements(text).count(), 0);
    }

    #[rstest]
    #[case::no_equals("cores", "line 1, column 6: expected `name = value`")]
    #[case::no_equals_but_a_value("\n cores 4", "line 2, column 8: expected `name = value`")]
    #[case::equals_too_late("cores 4 = 5", "line 1, column 7: expected `name = value`")]
    #[case::equals_in_a_value("substituters http://a?b=c", "line 1, column 14: expected `name = value`")]
    #[case::no_name(" = 4", "line 1, column 2: expected `name = value`")]
    #[case::only_a_comment_has_equals("cores # = 4", "line 1, column 6: expected `name = value`")]
    #[case::a_second_line_of_a_value("a = b \\\n  c", "line 2, column 4: expected `name = value`")]
    #[case::include_of_nothing("include # x", "line 1, column 8: expected `include <path>`")]
    #[case::include_of_two("include a b", "line 1, column 11: expected `include <path>`")]
    #[case::include_as_a_name("include = a", "line 1, column 11: expected `include <path>`")]
    fn errors_name_line_and_column(#[case] text: &str, #[case] message: &str) {
        let error = statements(text).find_map(Result::err).unwrap();
        assert_eq!(error.to_string(), message);
        assert_eq!(message.starts_with("line 2"), error.line() == 2);
    }

    #[test]
    fn one_bad_line_does_not_hide_the_others() {
        let all: Vec<_> = statements("a = 1\nb\nc = 3\n").collect();
        let [Ok(Statement::Setting(a)), Err(b), Ok(Statement::Setting(c))] = all[..] else {
            panic!("{all:?}")
        };
        assert_eq!((a.name, b.line(), c.name, c.line), ("a", 2, "c", 3));
    }

    #[test]
    fn words_have_columns() {
        let Ok(Statement::Setting(setting)) = only("a = é  b\tc") else { panic!() };
        assert_eq!(setting.words().collect::<Vec<_>>(), [(5, "é"), (8, "b"), (10, "c")]);
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "([a!=# \t\r\né]|include){0,40}") {
            for statement in statements(&text) {
                let (line, column, value) = match statement {
                    Ok(Statement::Setting(setting)) => {
                        prop_assert!(!setting.name.is_empty());
                        (setting.line, setting.column, setting.value)
                    }
                    Ok(Statement::Include(include)) => (include.line, include.column, include.path),
                    Err(error) => (error.line(), 1, ""),
                };
                // The value stands where it says it does.
                let line = text.split('\n').nth(line - 1).unwrap();
                prop_assert!(line.chars().skip(column - 1).collect::<String>().starts_with(value));
            }
        }

        #[test]
        fn a_setting_is_read_as_it_was_written(name in "[a-z-]{1,9}", words in prop::collection::vec("[!-\"$-~]{1,9}", 0..4)) {
            prop_assume!(name != "include");
            let text = format!("{name} = {}", words.join(" "));
            let Ok(Statement::Setting(setting)) = only(&text) else { panic!("{text:?}") };
            prop_assert_eq!(setting.name, name);
            prop_assert_eq!(setting.words().map(|(_, word)| word).collect::<Vec<_>>(), words);
        }
    }
}
