//! Store paths in text that nobody wrote for us: commands, arguments, environment variables, scripts.
//!
//! ```text
//! before   not [0-9A-Za-z_.+/~-], not the end of $(…) or ${…}; or exactly `file://` or `nix:0`
//! path     /nix/store/ <32 of base 32> - <1 to 211 of [0-9A-Za-z+._?=-]>
//! ```
//! The name is the longest one that is legal, without the full stop, question mark or equals sign that a sentence,
//! or `--bind=<path>=/srv`, puts behind it. What the text goes on with is not looked at, but for `$` and `*`: a name
//! that is only complete when something is filled in is not known here. In a `file://` URL the query is no name.
//!
//! What is found can be a name that no cache has. It is never a path that does not stand there.

use std::ops::Range;

use crate::base32::is_base32;
use crate::path::{HASH_LEN, MAX_NAME_LEN, STORE_DIR, StorePath};

/// Before these the path is absolute, although it does not look so.
const SCHEMES: [&str; 2] = ["file://", "nix:0"];
/// How far back the beginning of a `$(…)` is looked for: names of variables are short, and time is linear.
const MAX_EXPANSION: usize = 128;

/// A store path, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundPath {
    /// The path; what was below it is cut off.
    pub path: StorePath,
    /// Its bytes in the text.
    pub range: Range<usize>,
}

/// The store paths in `text`, in their order, each as often as it stands there. Derivations are among them.
///
/// Takes linear time, whatever the text is.
pub fn find_store_paths(text: &str) -> impl Iterator<Item = FoundPath> {
    text.match_indices(STORE_DIR).filter_map(|(start, _)| {
        let scheme = scheme_of(&text[..start]);
        if scheme.is_none() && !may_stand_before(&text[..start]) {
            return None;
        }
        let base = start + STORE_DIR.len() + 1;
        let end = end_of(text, base, scheme == Some("file://"))?;
        let path = StorePath::from_base_name(&text[base..end]).ok()?;
        Some(FoundPath { path, range: start..end })
    })
}

fn scheme_of(before: &str) -> Option<&'static str> {
    SCHEMES.into_iter().find(|scheme| {
        let rest = before.strip_suffix(scheme);
        rest.is_some_and(|rest| !rest.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_'))
    })
}

/// Whether an absolute path may begin behind this.
fn may_stand_before(before: &str) -> bool {
    match before.as_bytes().last() {
        None => true,
        Some(b')') => !is_expansion(before, b'('),
        Some(b'}') => !is_expansion(before, b'{'),
        Some(byte) => !(byte.is_ascii_alphanumeric() || b"_.+/-~".contains(byte)),
    }
}

/// Whether `before` ends with `$(…)`: then the path is below whatever that is.
fn is_expansion(before: &str, open: u8) -> bool {
    let bytes = before.as_bytes();
    let near = &bytes[bytes.len().saturating_sub(MAX_EXPANSION)..];
    let opened = near.iter().rposition(|byte| *byte == open);
    opened.is_some_and(|at| at > 0 && near[at - 1] == b'$')
}

/// Where the path that has its hash at `base` ends, if there is one.
fn end_of(text: &str, base: usize, is_url: bool) -> Option<usize> {
    let bytes = text.as_bytes();
    let hash = bytes.get(base..base + HASH_LEN)?;
    let begins = bytes[base - 1] == b'/' && bytes.get(base + HASH_LEN) == Some(&b'-') && is_base32(hash);
    let name = begins.then_some(base + HASH_LEN + 1)?;
    let belongs =
        |byte: u8| byte.is_ascii_alphanumeric() || b"+-._=".contains(&byte) || (byte == b'?' && !is_url);
    let len = bytes[name..].iter().take(MAX_NAME_LEN).take_while(|byte| belongs(**byte)).count();
    let mut end = name + len;
    match bytes[end..] {
        [b'*', ..] | [b'$', b'(' | b'{' | b'_' | b'a'..=b'z' | b'A'..=b'Z', ..] => return None,
        // A name that goes on below itself is meant as it stands, but for `--bind=<path>=/srv`.
        [b'/', ..] => end -= usize::from(bytes[end - 1] == b'='),
        _ => {
            let tail = bytes[name..end].iter().rev().take_while(|byte| b".?=".contains(byte)).count();
            end -= tail;
        }
    }
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const FOO: &str = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-foo";
    const IMG: &str = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-img.tar";

    fn found(text: &str) -> Vec<String> {
        let all: Vec<_> = find_store_paths(text).collect();
        for path in &all {
            assert_eq!(text[path.range.clone()], path.path.to_string());
        }
        all.into_iter().map(|found| found.path.to_string()).collect()
    }

    #[rstest]
    #[case::alone(FOO.into())]
    #[case::program(format!("{FOO}/bin/foo"))]
    #[case::json(format!("[\"{FOO}\",\"x\"]"))]
    #[case::comma(format!("{FOO},bar"))]
    #[case::assignment(format!("FOO={FOO}"))]
    #[case::option(format!("--config={FOO}/etc/foo.conf"))]
    #[case::second_of_a_path(format!("PATH=/bin:{FOO}/bin:/usr/bin"))]
    #[case::single_quotes(format!("exec '{FOO}/bin/foo' --x"))]
    #[case::escaped_quotes(format!("\\\"{FOO}\\\""))]
    #[case::backquotes(format!("`{FOO}/bin/foo`"))]
    #[case::parentheses(format!("(cd {FOO}; ls)"))]
    #[case::command_substitution(format!("x=$({FOO}/bin/foo)"))]
    #[case::behind_parentheses(format!("(x){FOO}"))]
    #[case::behind_braces(format!("{{}}{FOO}"))]
    #[case::redirection(format!("cat <{FOO}/x >&2|{FOO}/y"))]
    #[case::file_url(format!("file://{FOO}/x"))]
    #[case::git_file_url(format!("git+file://{FOO}"))]
    #[case::query_of_a_url(format!("file://{FOO}?narHash=sha256-abc="))]
    #[case::fragment_of_a_url(format!("path:{FOO}#x"))]
    #[case::full_stop(format!("See {FOO}. And go."))]
    #[case::dots(format!("{FOO}..."))]
    #[case::question(format!("Is it {FOO}?"))]
    #[case::bind(format!("--bind={FOO}=/srv"))]
    #[case::nothing_assigned(format!("{FOO}="))]
    #[case::shebang(format!("#!{FOO}/bin/foo\n"))]
    #[case::lines(format!("a\n{FOO}\nb"))]
    #[case::quotation_marks(format!("“{FOO}”"))]
    #[case::ideographic_full_stop(format!("{FOO}。"))]
    #[case::end_of_a_pattern(format!("^{FOO}$"))]
    #[case::at_sign(format!("@{FOO}"))]
    fn found_once(#[case] text: String) {
        let mut paths = found(&text);
        paths.dedup();
        assert_eq!(paths, [FOO]);
    }

    #[test]
    fn an_image_without_its_tag() {
        assert_eq!(found(&format!("nix:0{IMG}:latest")), [IMG]);
    }

    #[test]
    fn several_in_their_order() {
        assert_eq!(found(&format!("{FOO}:{IMG} {FOO}")), [FOO, IMG, FOO]);
    }

    #[rstest]
    #[case::below_another_directory(format!("/host{FOO}"))]
    #[case::chroot_store(format!("/var/lib/x/{}", &FOO[1..]))]
    #[case::https(format!("https://c{FOO}"))]
    #[case::https_with_port(format!("https://c:80{FOO}"))]
    #[case::host_in_a_file_url(format!("file://c{FOO}"))]
    #[case::another_scheme(format!("profile://{FOO}"))]
    #[case::another_image(format!("unix:0{FOO}"))]
    #[case::home(format!("~{FOO}"))]
    #[case::below_a_variable(format!("$ROOT{FOO}"))]
    #[case::below_a_braced_variable(format!("${{ROOT}}{FOO}"))]
    #[case::below_a_substitution(format!("$(ROOT){FOO}"))]
    #[case::dots(format!("..{FOO}"))]
    #[case::two_slashes(format!("/{FOO}"))]
    #[case::variable_in_the_name(format!("{FOO}-$(VERSION)"))]
    #[case::braced_variable_in_the_name(format!("{FOO}-${{VERSION}}"))]
    #[case::shell_variable_in_the_name(format!("{FOO}-$VERSION"))]
    #[case::pattern(format!("{FOO}*"))]
    #[case::relative("nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-foo".into())]
    #[case::the_store_itself("/nix/store /nix/store/ /nix/store/.links".into())]
    #[case::another_store("/nix/stores/00bgd045z0d4icpbc2yyz4gx48ak44la-foo".into())]
    #[case::hash_with_letters_outside_the_alphabet("/nix/store/e0bgd045z0d4icpbc2yyz4gx48ak44lo-foo".into())]
    #[case::upper_case_hash("/nix/store/00BGD045z0d4icpbc2yyz4gx48ak44la-foo".into())]
    #[case::short_hash("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44l-foo".into())]
    #[case::long_hash("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44laa-foo".into())]
    #[case::no_name("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la- /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la".into())]
    #[case::only_dots("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-...".into())]
    #[case::dots_dash("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-..-x".into())]
    #[case::not_ascii_in_the_hash("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44lä-foo".into())]
    #[case::cut_off("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak4".into())]
    fn not_found(#[case] text: String) {
        assert!(found(&text).is_empty(), "{:?}", found(&text));
    }

    #[rstest]
    #[case::signs("a+b-c._?=Z9")]
    #[case::ends_with_signs("libstdc++")]
    #[case::leading_dot(".config")]
    #[case::derivation("foo.drv")]
    fn names_are_as_long_as_they_may_be(#[case] name: &str) {
        let path = format!("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-{name}");
        assert_eq!(found(&format!("x {path} y")), [path]);
    }

    #[test]
    fn what_goes_on_below_is_meant_as_it_stands() {
        let path = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-foo.";
        assert_eq!(found(&format!("{path}/bin/foo")), [path]);
    }

    #[test]
    fn names_are_cut_at_211() {
        let path = |n| format!("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-{}", "a".repeat(n));
        assert_eq!(found(&path(300)), [path(211)]);
    }

    #[test]
    fn a_long_enemy_takes_no_longer_than_any_other_text() {
        let parts =
            ["/nix/store/", ")/nix/store/", "file://", "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-"];
        for part in parts {
            let text = part.repeat((1 << 20) / part.len());
            let start = std::time::Instant::now();
            let _ = find_store_paths(&text).count();
            // Generous: a build for tests, on a machine with other work. Quadratic time would be minutes.
            assert!(start.elapsed() < std::time::Duration::from_secs(2), "{part}: {:?}", start.elapsed());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "(/nix/store/|[0-9a-z]{32}|-|.){0,40}") {
            let mut end = 0;
            for path in find_store_paths(&text) {
                prop_assert!(path.range.start >= end);
                end = path.range.end;
                let stands_there = &text[path.range];
                prop_assert_eq!(stands_there.parse::<StorePath>(), Ok(path.path.clone()));
                prop_assert_eq!(stands_there, path.path.to_string());
            }
        }

        #[test]
        fn what_is_planted_is_found(
            hash in "[0-9abcdfghijklmnpqrsvwxyz]{32}",
            name in "[0-9A-Za-z+_][0-9A-Za-z+._?=-]{0,100}[0-9A-Za-z+_-]",
            before in "([ \t\n\"'`=:,;<|&(\\[{@#!]|.{0,20}[ =:])?",
            after in "([ \t\n\"'`:,;>|&)\\]}\\\\#]|/bin/x).{0,20}|",
        ) {
            let path = format!("/nix/store/{hash}-{name}");
            let text = format!("{before}{path}{after}");
            let found = find_store_paths(&text).find(|found| found.range.start == before.len());
            prop_assert_eq!(found.map(|found| found.path.to_string()), Some(path), "{}", text);
        }
    }
}
