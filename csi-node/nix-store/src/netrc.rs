//! `netrc`: names and passwords by host, as curl reads them and so as Nix does.
//!
//! ```text
//! file     = { entry | macro | "#" comment line }
//! entry    = ( "machine" host | "default" ) { "login" name | "password" password | "account" ignored }
//! macro    = "macdef" name … up to a blank line, skipped
//! ```
//! Words are separated by blanks and line ends. A word in double quotes ends on its line; in it, `\n`, `\r`
//! and `\t` are what they are in C, and any other character behind a backslash is itself. Keywords and hosts
//! are read without regard to case, and what is no keyword is passed over.
//!
//! Curl's versions differ, and this is as the newer ones are: `#` begins a comment only where a line begins
//! (8.x; 7.88 drops a password like `#x`), the value of `account` is not taken for a keyword, nor a macro
//! inside an entry for a part of it. Unlike in any curl, a keyword without its value is an error.
//!
//! Nothing that is printed, by `Debug` or in an error, contains a password.

use std::fmt;
use std::iter::Enumerate;
use std::str::Split;

/// Why a text is not a netrc. Says where, and nothing of what stands there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseNetrcError {
    /// A word in quotes that does not end on its line.
    #[error("line {line}, column {column}: no quote ends what this one begins")]
    OpenQuote {
        /// Which line, from one.
        line: usize,
        /// Where the quote stands: which character, from one.
        column: usize,
    },
    /// A word in quotes with something directly behind it. Curl would drop a character.
    #[error("line {line}, column {column}: expected a blank behind the quote")]
    BehindQuote {
        /// Which line, from one.
        line: usize,
        /// Where something else stands: which character, from one.
        column: usize,
    },
    /// A keyword at the end of the file.
    #[error("line {line}: nothing follows `{keyword}`")]
    NoValue {
        /// The line of the keyword, from one.
        line: usize,
        /// The keyword.
        keyword: &'static str,
    },
}

/// What to say to a host. At least one of the two is there.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Login {
    login: Option<String>,
    password: Option<String>,
}

impl Login {
    /// The name; curl sends an empty one when there is none.
    pub fn login(&self) -> Option<&str> {
        self.login.as_deref()
    }

    /// The password; curl sends an empty one when there is none.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let password = self.password.as_ref().map(|_| format_args!("hidden"));
        f.debug_struct("Login").field("login", &self.login).field("password", &password).finish()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// None: `default`.
    host: Option<String>,
    login: Login,
}

/// The entries of a netrc, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Netrc(Vec<Entry>);

impl Netrc {
    /// Reads a netrc.
    pub fn parse(text: &str) -> Result<Self, ParseNetrcError> {
        let mut words = Words::new(text);
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(word) = words.next()? {
            match word.to_ascii_lowercase().as_str() {
                "machine" => {
                    let host = Some(words.value("machine")?);
                    entries.push(Entry { host, login: Login::default() });
                }
                "default" => entries.push(Entry { host: None, login: Login::default() }),
                "macdef" => words.skip_macro(),
                "account" => drop(words.value("account")?),
                "login" => {
                    let name = words.value("login")?;
                    set(&mut entries, |login| login.login = Some(name));
                }
                "password" => {
                    let password = words.value("password")?;
                    set(&mut entries, |login| login.password = Some(password));
                }
                _ => {}
            }
        }
        entries.retain(|entry| entry.login != Login::default());
        Ok(Self(entries))
    }

    /// What to say to a host, given without its port: of the entries for it and for all hosts the first that
    /// has a password, or the first at all.
    pub fn find(&self, host: &str) -> Option<&Login> {
        let entries = || {
            self.0
                .iter()
                .filter(|entry| entry.host.as_ref().is_none_or(|own| own.eq_ignore_ascii_case(host)))
                .map(|entry| &entry.login)
        };
        entries().find(|login| login.password.is_some()).or_else(|| entries().next())
    }
}

/// Adds to the last entry, which takes no more once it has both; outside of any, nothing counts.
fn set(entries: &mut [Entry], add: impl FnOnce(&mut Login)) {
    if let Some(Entry { login, .. }) = entries.last_mut()
        && (login.login.is_none() || login.password.is_none())
    {
        add(login);
    }
}

const BLANKS: [char; 5] = [' ', '\t', '\r', '\u{b}', '\u{c}'];

/// A netrc's words, one after the other.
struct Words<'a> {
    lines: Enumerate<Split<'a, char>>,
    /// Which line, from one, and all of it.
    number: usize,
    line: &'a str,
    /// What is left of the line.
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn new(text: &'a str) -> Self {
        Self { lines: text.split('\n').enumerate(), number: 0, line: "", rest: "" }
    }

    /// Whether there is another line.
    fn next_line(&mut self) -> bool {
        let Some((n, line)) = self.lines.next() else { return false };
        (self.number, self.line, self.rest) = (n + 1, line, line);
        true
    }

    fn next(&mut self) -> Result<Option<String>, ParseNetrcError> {
        loop {
            self.rest = self.rest.trim_start_matches(BLANKS);
            if !self.rest.is_empty() {
                return self.word().map(Some);
            }
            if !self.next_line() {
                return Ok(None);
            }
            if self.rest.trim_start_matches(BLANKS).starts_with('#') {
                self.rest = "";
            }
        }
    }

    fn value(&mut self, keyword: &'static str) -> Result<String, ParseNetrcError> {
        let line = self.number;
        self.next()?.ok_or(ParseNetrcError::NoValue { line, keyword })
    }

    /// The word at the beginning of the rest.
    fn word(&mut self) -> Result<String, ParseNetrcError> {
        let Some(quoted) = self.rest.strip_prefix('"') else {
            let end = self.rest.find(BLANKS).unwrap_or(self.rest.len());
            let (word, rest) = self.rest.split_at(end);
            self.rest = rest;
            return Ok(word.to_owned());
        };
        let open = ParseNetrcError::OpenQuote { line: self.number, column: self.column() };
        let mut word = String::new();
        let mut chars = quoted.chars();
        loop {
            match chars.next().ok_or(open)? {
                '"' => break,
                '\\' => word.push(match chars.next().ok_or(open)? {
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    other => other,
                }),
                other => word.push(other),
            }
        }
        self.rest = chars.as_str();
        if !self.rest.is_empty() && !self.rest.starts_with(BLANKS) {
            return Err(ParseNetrcError::BehindQuote { line: self.number, column: self.column() });
        }
        Ok(word)
    }

    /// Where the rest begins: which character of the line, from one.
    fn column(&self) -> usize {
        self.line.chars().count() - self.rest.chars().count() + 1
    }

    /// Goes behind the next blank line.
    fn skip_macro(&mut self) {
        self.rest = "";
        while self.next_line() && !self.line.trim_matches(BLANKS).is_empty() {}
        self.rest = "";
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    /// What curl would send to the host `h`: `name:password`.
    fn sent(text: &str) -> Option<String> {
        let netrc = Netrc::parse(text).unwrap();
        let login = netrc.find("h")?;
        Some(format!("{}:{}", login.login().unwrap_or_default(), login.password().unwrap_or_default()))
    }

    // What curl 7.88.1 sends with the same file (`curl --netrc-file`).
    #[rstest]
    #[case::one_line("machine h login a password b\n", "a:b")]
    #[case::no_end_of_line("machine h login a password b", "a:b")]
    #[case::many_lines("machine h\n\n\n\tlogin a\r\n  password b\r\n", "a:b")]
    #[case::password_first("machine h password b login a", "a:b")]
    #[case::only_a_password("machine h password b", ":b")]
    #[case::only_a_name("machine h login a", "a:")]
    #[case::default("default login a password b", "a:b")]
    #[case::default_behind_another("machine o login c password d\ndefault login a password b", "a:b")]
    #[case::default_before("default login a password b\nmachine h login c password d", "a:b")]
    #[case::first_of_two("machine h login a password b\nmachine h login c password d", "a:b")]
    #[case::first_with_a_password("machine h login c\nmachine h login a password b", "a:b")]
    #[case::first_with_a_password_is_default("machine h login c default login a password b", "a:b")]
    #[case::case_does_not_matter("MACHINE H Login a PASSWORD b", "a:b")]
    #[case::second_name_wins("machine h login c login a password b", "a:b")]
    #[case::what_is_complete_stays("machine h login a password b password c login d", "a:b")]
    #[case::unknown_words("machine h port 443 login a password b", "a:b")]
    #[case::before_any_entry("login c password d machine h login a password b", "a:b")]
    #[case::comment_lines(
        "# machine h login c password d\n  # x\nmachine h\n# password d\nlogin a password b",
        "a:b"
    )]
    #[case::quotes("\"machine\" \"h\" login \"a b\" password \"c\\\"\\\\\\n\\t\\x\"", "a b:c\"\\\n\tx")]
    #[case::empty_quotes("machine h login \"\" password b", ":b")]
    #[case::quote_inside_a_word("machine h login a password b\"c", "a:b\"c")]
    #[case::backslash_outside_quotes("machine h login a password b\\\"\\n", "a:b\\\"\\n")]
    #[case::vertical_tab_and_form_feed("machine h\u{b}login\u{c}a password b", "a:b")]
    #[case::macro_before("macdef init\nmachine h login c password d\n\nmachine h login a password b", "a:b")]
    #[case::macro_of_another(
        "machine o login c password d\nmacdef init\npassword x\n\nmachine h login a password b",
        "a:b"
    )]
    fn as_curl_reads_it(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(sent(text).as_deref(), Some(expected));
    }

    #[rstest]
    #[case::nothing("")]
    #[case::another("machine o login a password b")]
    #[case::a_host_that_begins_the_same("machine h.example login a password b")]
    #[case::only_a_host("machine h")]
    #[case::in_a_macro("macdef init machine h login a password b\nmachine h password c\n#\ndefault login a")]
    fn nothing_for_this_host(#[case] text: &str) {
        assert_eq!(sent(text), None);
    }

    // Where curl 7.88.1 does something else: it takes what is a value or a macro for keywords, loses a
    // password that begins with `#`, and a name when another machine follows.
    #[rstest]
    #[case::hash_before_a_password("machine h login a password #b", "a:#b")]
    #[case::account("machine h login a account login password b", "a:b")]
    #[case::macro_inside("machine h macdef init\nlogin c password x\n \nlogin a password b", "a:b")]
    #[case::keywords_as_values("machine o login machine password h machine h login a password b", "a:b")]
    #[case::only_a_name_and_another("machine h login a machine o login c password d", "a:")]
    fn better_than_curl(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(sent(text).as_deref(), Some(expected));
    }

    #[rstest]
    #[case::open_quote(
        "machine h login a password \"b\nc\"",
        "line 1, column 28: no quote ends what this one begins"
    )]
    #[case::escaped_end("\nmachine \"\\\"", "line 2, column 9: no quote ends what this one begins")]
    #[case::behind_a_quote(
        "machine h login é password \"b\"c",
        "line 1, column 31: expected a blank behind the quote"
    )]
    #[case::no_host("machine h\nmachine\n\n", "line 2: nothing follows `machine`")]
    #[case::no_name("machine h login", "line 1: nothing follows `login`")]
    #[case::no_password("machine h login a password # \n# b", "")]
    #[case::password_is_a_comment("machine h login a password\n# b", "line 1: nothing follows `password`")]
    fn errors_name_the_place(#[case] text: &str, #[case] message: &str) {
        assert_eq!(Netrc::parse(text).err().map(|error| error.to_string()).unwrap_or_default(), message);
    }

    #[test]
    fn a_password_is_never_printed() {
        let netrc = Netrc::parse("machine h login name password secret default login all").unwrap();
        let (shown, login) = (format!("{netrc:?}"), format!("{:?}", netrc.find("h").unwrap()));
        assert!(!shown.contains("secret") && shown.contains("name"), "{shown}");
        assert_eq!(login, "Login { login: Some(\"name\"), password: Some(hidden) }");
        let error = Netrc::parse("machine h password \"secret").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"));
    }

    fn quoted(text: &str) -> String {
        let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        format!("\"{escaped}\"")
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "((machine|default|login|password|account|macdef|h)?[ \n\"\\#é]{0,2}){0,20}") {
            if let Ok(netrc) = Netrc::parse(&text) {
                let _ = netrc.find("h");
            }
        }

        #[test]
        fn what_is_quoted_is_read_as_it_was(host in "[a-z.]{1,9}", login in "\\PC{0,9}", password in "[ -~\n\té]{0,20}") {
            let text = format!("machine {host} login {} password {}", quoted(&login), quoted(&password));
            let netrc = Netrc::parse(&text).unwrap();
            let found = netrc.find(&host).unwrap();
            prop_assert_eq!((found.login(), found.password()), (Some(&*login), Some(&*password)));
        }
    }
}
