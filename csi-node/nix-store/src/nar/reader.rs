//! Reads a NAR out of whatever pieces it arrives in.
//!
//! The reader is *pushed*: bytes go in, events come out, file contents are handed on as slices of the
//! very buffer that was pushed. So a decoder's output is written to disk without another copy, nothing
//! is buffered but a token that was cut in two, and no thread has to wait inside the parser.

use super::{MAGIC, padding};

/// Nix's own limits since 2.34.7 (CVE-2026-44028).
const MAX_DEPTH: usize = 64;
const MAX_NAME: u64 = 255;
const MAX_TARGET: u64 = 4095;
const MAX_TAG: u64 = 32;

/// Why bytes are not a NAR.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NarError {
    /// Another word stands where this one must.
    #[error("expected {expected}, found {found:?}")]
    Unexpected {
        /// What the grammar wants here.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A string that says it is longer than what it stands for can be.
    #[error("{what} of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which string.
        what: &'static str,
        /// Its length, as it says.
        len: u64,
        /// The longest allowed.
        limit: u64,
    },
    /// Padding that is not zero.
    #[error("padding that is not zero")]
    Padding,
    /// An entry's name that is empty, `.`, `..`, or has a slash or NUL in it.
    #[error("{0:?} cannot be the name of an entry")]
    Name(String),
    /// Entries that do not rise strictly: also what a repeated name looks like.
    #[error("entry {0:?} does not come after the one before it")]
    Order(String),
    /// A link's target that is empty or has a NUL in it.
    #[error("a symlink target that is empty or contains NUL")]
    Target,
    /// Deeper than 64 directories.
    #[error("directories more than {MAX_DEPTH} deep")]
    TooDeep,
    /// Bytes behind the end.
    #[error("bytes behind the end of the archive")]
    Trailing,
    /// No more bytes, and the archive is not whole.
    #[error("the archive ends early")]
    Incomplete,
}

/// Either the bytes or what is done with them went wrong.
#[derive(Debug, thiserror::Error)]
pub enum PushError<E> {
    /// Not a NAR.
    #[error("not a valid NAR")]
    Nar(#[from] NarError),
    /// The sink failed.
    #[error(transparent)]
    Sink(E),
}

/// What a NAR is turned into. Names are single components, checked; the root's name is empty.
pub trait NarSink {
    /// Why this sink cannot go on.
    type Error;

    /// A directory begins; what follows is in it, until [`NarSink::leave`].
    fn directory(&mut self, name: &[u8]) -> Result<(), Self::Error>;
    /// The innermost directory is complete.
    fn leave(&mut self) -> Result<(), Self::Error>;
    /// A regular file of `size` bytes begins.
    fn file(&mut self, name: &[u8], executable: bool, size: u64) -> Result<(), Self::Error>;
    /// The file's next bytes.
    fn data(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
    /// The file is complete.
    fn file_end(&mut self) -> Result<(), Self::Error>;
    /// A symbolic link.
    fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), Self::Error>;
}

/// What the grammar wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    NodeOpen,
    NodeType,
    NodeKind,
    /// `executable` or `contents`.
    FileField,
    ExecutableValue,
    ContentsTag,
    /// The length of a file's contents; the bytes follow in `Contents`.
    ContentsLen,
    Contents,
    SymlinkTag,
    SymlinkTarget,
    /// `entry` or `)`.
    DirectoryField,
    EntryOpen,
    NameTag,
    Name,
    NodeTag,
    /// The `)` of a file or symlink.
    NodeClose,
    /// The `)` of an entry.
    EntryClose,
    Done,
}

impl State {
    /// What the string wanted here is called, and how long it can be.
    const fn limit(self) -> (&'static str, u64) {
        match self {
            Self::Name => ("a name", MAX_NAME),
            Self::SymlinkTarget => ("a symlink target", MAX_TARGET),
            _ => ("a tag", MAX_TAG),
        }
    }
}

/// A parser that is fed; see the module for why.
pub struct NarReader {
    state: State,
    /// One entry per open directory: the name of its last entry.
    open: Vec<Vec<u8>>,
    /// The name of the node that is being read.
    name: Vec<u8>,
    executable: bool,
    /// The part of a token that has arrived, its eight length bytes included.
    token: Vec<u8>,
    /// What is left of the file's contents, and of the padding behind them.
    remaining: u64,
    pad: u8,
}

impl Default for NarReader {
    fn default() -> Self {
        Self::new()
    }
}

impl NarReader {
    /// A reader before the first byte.
    pub fn new() -> Self {
        Self {
            state: State::Magic,
            open: Vec::new(),
            name: Vec::new(),
            executable: false,
            token: Vec::new(),
            remaining: 0,
            pad: 0,
        }
    }

    /// Reads the next bytes and tells `sink` what they are. After an error the reader is spent.
    pub fn push<S: NarSink>(&mut self, mut bytes: &[u8], sink: &mut S) -> Result<(), PushError<S::Error>> {
        while !bytes.is_empty() {
            bytes = match self.state {
                State::Contents => self.contents(bytes, sink)?,
                State::Done => return Err(NarError::Trailing.into()),
                _ => self.string(bytes, sink)?,
            };
        }
        Ok(())
    }

    /// Says that there are no more bytes.
    pub fn finish(&self) -> Result<(), NarError> {
        if self.state == State::Done { Ok(()) } else { Err(NarError::Incomplete) }
    }

    /// Hands on file contents and checks the padding behind them. Gives back what is left.
    fn contents<'a, S: NarSink>(
        &mut self,
        bytes: &'a [u8],
        sink: &mut S,
    ) -> Result<&'a [u8], PushError<S::Error>> {
        let (data, rest) = split_at_most(bytes, self.remaining);
        if !data.is_empty() {
            sink.data(data).map_err(PushError::Sink)?;
            self.remaining -= data.len() as u64;
        }
        let mut rest = rest;
        while self.remaining == 0
            && self.pad > 0
            && let Some((byte, behind)) = rest.split_first()
        {
            if *byte != 0 {
                return Err(NarError::Padding.into());
            }
            (self.pad, rest) = (self.pad - 1, behind);
        }
        if self.remaining == 0 && self.pad == 0 {
            sink.file_end().map_err(PushError::Sink)?;
            self.state = State::NodeClose;
        }
        Ok(rest)
    }

    /// Takes one string, or the part of it that is there. Gives back what is left.
    fn string<'a, S: NarSink>(
        &mut self,
        bytes: &'a [u8],
        sink: &mut S,
    ) -> Result<&'a [u8], PushError<S::Error>> {
        // Nearly always the string lies whole in the input and is not copied.
        if self.token.is_empty()
            && let Some((used, value)) = self.whole(bytes)?
        {
            self.token(value, sink)?;
            return Ok(&bytes[used..]);
        }
        // It was cut: collect exactly as much as its length asks for, and no more.
        let want = if self.token.len() < 8 { 8 } else { self.token_len()? };
        let missing = want - self.token.len();
        let (now, rest) = bytes.split_at(missing.min(bytes.len()));
        self.token.extend_from_slice(now);
        let complete = self.token.len() >= 8 && self.token.len() == self.token_len()?;
        if complete {
            let token = std::mem::take(&mut self.token);
            if let Some((_, value)) = self.whole(&token)? {
                self.token(value, sink)?;
            }
        }
        Ok(rest)
    }

    /// How long the collected token will be with length and padding.
    fn token_len(&self) -> Result<usize, NarError> {
        let mut len = [0; 8];
        len.copy_from_slice(&self.token[..8]);
        self.total_len(u64::from_le_bytes(len))
    }

    /// The length of a string with its frame; refused before anything is reserved for it.
    fn total_len(&self, len: u64) -> Result<usize, NarError> {
        if self.state == State::ContentsLen {
            return Ok(8);
        }
        let (what, limit) = self.state.limit();
        if len > limit {
            return Err(NarError::TooLong { what, len, limit });
        }
        let total = 8 + len + u64::from(padding(len));
        usize::try_from(total).map_err(|_| NarError::TooLong { what, len, limit })
    }

    /// The string that `bytes` begin with: how many bytes it takes, and its value.
    fn whole<'a>(&self, bytes: &'a [u8]) -> Result<Option<(usize, &'a [u8])>, NarError> {
        let Some((len, _)) = bytes.split_first_chunk::<8>() else { return Ok(None) };
        let value_len = u64::from_le_bytes(*len);
        let total = self.total_len(value_len)?;
        if self.state == State::ContentsLen {
            return Ok(Some((8, &bytes[..8])));
        }
        let Some(token) = bytes.get(8..total) else { return Ok(None) };
        let (value, pad) = split_at_most(token, value_len);
        if pad.iter().any(|byte| *byte != 0) {
            return Err(NarError::Padding);
        }
        Ok(Some((total, value)))
    }

    /// One step of the grammar.
    fn token<S: NarSink>(&mut self, value: &[u8], sink: &mut S) -> Result<(), PushError<S::Error>> {
        self.state = match self.state {
            State::Magic => self.word(value, MAGIC, "the magic of a NAR", State::NodeOpen)?,
            State::NodeOpen => self.word(value, b"(", "`(`", State::NodeType)?,
            State::NodeType => self.word(value, b"type", "`type`", State::NodeKind)?,
            State::NodeKind => match value {
                b"regular" => {
                    self.executable = false;
                    State::FileField
                }
                b"symlink" => State::SymlinkTag,
                b"directory" => self.enter(sink)?,
                _ => return Err(unexpected("regular, symlink or directory", value).into()),
            },
            State::FileField => match value {
                b"executable" => State::ExecutableValue,
                b"contents" => State::ContentsLen,
                _ => return Err(unexpected("`executable` or `contents`", value).into()),
            },
            State::ExecutableValue => {
                self.executable = true;
                self.word(value, b"", "an empty value of `executable`", State::ContentsTag)?
            }
            State::ContentsTag => self.word(value, b"contents", "`contents`", State::ContentsLen)?,
            State::ContentsLen => self.begin_contents(value, sink)?,
            State::SymlinkTag => self.word(value, b"target", "`target`", State::SymlinkTarget)?,
            State::SymlinkTarget => {
                if value.is_empty() || value.contains(&0) {
                    return Err(NarError::Target.into());
                }
                sink.symlink(&self.name, value).map_err(PushError::Sink)?;
                State::NodeClose
            }
            State::DirectoryField => match value {
                b"entry" => State::EntryOpen,
                b")" => {
                    self.open.pop();
                    sink.leave().map_err(PushError::Sink)?;
                    self.after_node()
                }
                _ => return Err(unexpected("`entry` or `)`", value).into()),
            },
            State::EntryOpen => self.word(value, b"(", "`(`", State::NameTag)?,
            State::NameTag => self.word(value, b"name", "`name`", State::Name)?,
            State::Name => self.entry_name(value)?,
            State::NodeTag => self.word(value, b"node", "`node`", State::NodeOpen)?,
            State::NodeClose => {
                self.word(value, b")", "`)`", State::Done)?;
                self.after_node()
            }
            State::EntryClose => self.word(value, b")", "`)`", State::DirectoryField)?,
            State::Contents | State::Done => unreachable!("`push` never asks for a string here"),
        };
        Ok(())
    }

    #[expect(clippy::unused_self, reason = "a step of the grammar, like its neighbours")]
    fn word(
        &self,
        value: &[u8],
        word: &[u8],
        expected: &'static str,
        next: State,
    ) -> Result<State, NarError> {
        if value == word { Ok(next) } else { Err(unexpected(expected, value)) }
    }

    fn enter<S: NarSink>(&mut self, sink: &mut S) -> Result<State, PushError<S::Error>> {
        if self.open.len() == MAX_DEPTH {
            return Err(NarError::TooDeep.into());
        }
        sink.directory(&self.name).map_err(PushError::Sink)?;
        self.open.push(Vec::new());
        Ok(State::DirectoryField)
    }

    fn begin_contents<S: NarSink>(&mut self, len: &[u8], sink: &mut S) -> Result<State, PushError<S::Error>> {
        let mut size = [0; 8];
        size.copy_from_slice(len);
        let size = u64::from_le_bytes(size);
        sink.file(&self.name, self.executable, size).map_err(PushError::Sink)?;
        (self.remaining, self.pad) = (size, padding(size));
        if size == 0 {
            sink.file_end().map_err(PushError::Sink)?;
            return Ok(State::NodeClose);
        }
        Ok(State::Contents)
    }

    fn entry_name(&mut self, name: &[u8]) -> Result<State, NarError> {
        let shown = || String::from_utf8_lossy(name).into_owned();
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
            return Err(NarError::Name(shown()));
        }
        if let Some(last) = self.open.last_mut() {
            // The empty name of a directory without entries is before every other.
            if name <= last.as_slice() {
                return Err(NarError::Order(shown()));
            }
            last.clear();
            last.extend_from_slice(name);
        }
        self.name.clear();
        self.name.extend_from_slice(name);
        Ok(State::NodeTag)
    }

    fn after_node(&self) -> State {
        if self.open.is_empty() { State::Done } else { State::EntryClose }
    }
}

fn unexpected(expected: &'static str, value: &[u8]) -> NarError {
    NarError::Unexpected { expected, found: String::from_utf8_lossy(value).into_owned() }
}

/// Like `split_at`, with a length that may be larger than memory.
fn split_at_most(bytes: &[u8], len: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::super::NarWriter;
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Tree {
        File { executable: bool, contents: Vec<u8> },
        Symlink(Vec<u8>),
        Directory(Entries),
    }

    type Entries = BTreeMap<Vec<u8>, Tree>;

    /// Builds the tree again: a sink as simple as it can be.
    #[derive(Default)]
    struct Build {
        open: Vec<(Vec<u8>, Entries)>,
        file: Option<(Vec<u8>, bool, Vec<u8>)>,
        root: Option<Tree>,
    }

    impl Build {
        fn add(&mut self, name: &[u8], tree: Tree) {
            match self.open.last_mut() {
                Some((_, entries)) => assert!(entries.insert(name.to_vec(), tree).is_none()),
                None => assert!(self.root.replace(tree).is_none()),
            }
        }
    }

    impl NarSink for Build {
        type Error = Infallible;
        fn directory(&mut self, name: &[u8]) -> Result<(), Infallible> {
            self.open.push((name.to_vec(), BTreeMap::new()));
            Ok(())
        }
        fn leave(&mut self) -> Result<(), Infallible> {
            let (name, entries) = self.open.pop().unwrap();
            self.add(&name, Tree::Directory(entries));
            Ok(())
        }
        fn file(&mut self, name: &[u8], executable: bool, _: u64) -> Result<(), Infallible> {
            self.file = Some((name.to_vec(), executable, Vec::new()));
            Ok(())
        }
        fn data(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
            self.file.as_mut().unwrap().2.extend_from_slice(bytes);
            Ok(())
        }
        fn file_end(&mut self) -> Result<(), Infallible> {
            let (name, executable, contents) = self.file.take().unwrap();
            self.add(&name, Tree::File { executable, contents });
            Ok(())
        }
        fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), Infallible> {
            self.add(name, Tree::Symlink(target.to_vec()));
            Ok(())
        }
    }

    fn read(bytes: &[u8], piece: usize) -> Result<Tree, NarError> {
        let (mut reader, mut build) = (NarReader::new(), Build::default());
        for chunk in bytes.chunks(piece.max(1)) {
            match reader.push(chunk, &mut build) {
                Ok(()) => {}
                Err(PushError::Nar(error)) => return Err(error),
            }
        }
        reader.finish()?;
        Ok(build.root.unwrap())
    }

    fn write(tree: &Tree) -> Vec<u8> {
        fn node(tree: &Tree, writer: &mut NarWriter<Vec<u8>>) {
            match tree {
                Tree::File { executable, contents } => {
                    writer.file(*executable, contents.len() as u64).unwrap();
                    writer.data(contents).unwrap();
                    writer.file_end().unwrap();
                }
                Tree::Symlink(target) => writer.symlink(target).unwrap(),
                Tree::Directory(entries) => {
                    writer.directory().unwrap();
                    for (name, tree) in entries {
                        writer.entry(name).unwrap();
                        node(tree, writer);
                        writer.entry_end().unwrap();
                    }
                    writer.directory_end().unwrap();
                }
            }
        }
        let mut writer = NarWriter::new(Vec::new()).unwrap();
        node(tree, &mut writer);
        writer.into_inner()
    }

    fn string(value: &[u8]) -> Vec<u8> {
        let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// A NAR out of words: everything that no writer of ours would write.
    fn words<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        std::iter::once(MAGIC).chain(words).flat_map(string).collect()
    }

    fn text(line: &str) -> Vec<u8> {
        words(line.split(' ').map(|word| if word == "''" { b"".as_slice() } else { word.as_bytes() }))
    }

    const FILE: &str = "( type regular contents x )";

    #[rstest]
    #[case::repeated_name("( type directory entry ( name a node FILE ) entry ( name a node FILE ) )")]
    #[case::symlink_then_directory(
        "( type directory entry ( name a node ( type symlink target / ) ) entry ( name a node ( type directory ) ) )"
    )]
    #[case::unsorted("( type directory entry ( name b node FILE ) entry ( name a node FILE ) )")]
    #[case::dot_dot("( type directory entry ( name .. node FILE ) )")]
    #[case::dot("( type directory entry ( name . node FILE ) )")]
    #[case::slash("( type directory entry ( name a/b node FILE ) )")]
    #[case::empty_name("( type directory entry ( name '' node FILE ) )")]
    #[case::nul_in_name("( type directory entry ( name a\0b node FILE ) )")]
    #[case::empty_target("( type symlink target '' )")]
    #[case::nul_in_target("( type symlink target a\0b )")]
    #[case::contents_before_executable("( type regular contents x executable '' )")]
    #[case::executable_with_a_value("( type regular executable yes contents x )")]
    #[case::no_contents("( type regular )")]
    #[case::unknown_type("( type fifo )")]
    #[case::unknown_tag("( type regular mode 4755 contents x )")]
    #[case::two_roots("FILE FILE")]
    #[case::cut_off("( type directory")]
    #[case::nothing("''")]
    fn evil(#[case] line: &str) {
        let bytes = text(&line.replace("FILE", FILE));
        let whole = read(&bytes, usize::MAX);
        assert!(whole.is_err(), "{whole:?}");
        for piece in [1, 7, 8, 9] {
            assert_eq!(read(&bytes, piece), whole);
        }
    }

    #[test]
    fn a_length_of_2_to_the_62_reserves_nothing() {
        let mut bytes = text("( type directory entry ( name");
        bytes.extend_from_slice(&(1u64 << 62).to_le_bytes());
        assert!(matches!(read(&bytes, 3), Err(NarError::TooLong { what: "a name", .. })));
        let mut bytes = text("( type regular contents");
        bytes.extend_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(read(&bytes, 3), Err(NarError::Incomplete));
    }

    #[test]
    fn names_end_at_255_and_targets_at_4095() {
        let name = |len| {
            read(&text(&format!("( type directory entry ( name {} node {FILE} ) )", "n".repeat(len))), 64)
        };
        assert!(name(255).is_ok());
        assert!(name(256).is_err());
        let target = |len| read(&text(&format!("( type symlink target {} )", "t".repeat(len))), 64);
        assert!(target(4095).is_ok());
        assert!(target(4096).is_err());
    }

    #[test]
    fn sixty_four_directories_deep_and_no_more() {
        let deep = |depth| {
            let open = "( type directory entry ( name a node ".repeat(depth);
            read(&text(&format!("{open}{FILE}{}", " ) )".repeat(depth))), 64)
        };
        assert!(deep(64).is_ok());
        assert_eq!(deep(65), Err(NarError::TooDeep));
        assert_eq!(deep(3000), Err(NarError::TooDeep));
    }

    #[test]
    fn padding_is_zero_and_nothing_follows() {
        let mut bytes = text(FILE);
        bytes.push(0);
        assert_eq!(read(&bytes, usize::MAX), Err(NarError::Trailing));
        let mut bytes = text(FILE);
        let padding_of_contents = bytes.len() - 16 - 1;
        bytes[padding_of_contents] = 1;
        assert_eq!(read(&bytes, usize::MAX), Err(NarError::Padding));
        let mut bytes = text(FILE);
        *bytes.last_mut().unwrap() = 1;
        assert_eq!(read(&bytes, usize::MAX), Err(NarError::Padding));
    }

    #[test]
    fn capital_and_small_letters_are_two_names() {
        let line = format!("( type directory entry ( name A node {FILE} ) entry ( name a node {FILE} ) )");
        assert!(read(&text(&line), 64).is_ok());
    }

    fn tree() -> impl Strategy<Value = Tree> {
        let name = prop::collection::vec(any::<u8>(), 1..20)
            .prop_filter("a name", |n| n != b"." && n != b".." && !n.iter().any(|b| matches!(b, 0 | b'/')));
        let leaf = prop_oneof![
            (any::<bool>(), prop::collection::vec(any::<u8>(), 0..100))
                .prop_map(|(executable, contents)| Tree::File { executable, contents }),
            prop::collection::vec(1u8.., 1..40).prop_map(Tree::Symlink),
        ];
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop::collection::btree_map(name.clone(), inner, 0..6).prop_map(Tree::Directory)
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_in_any_pieces(tree in tree(), piece in 1usize..70) {
            prop_assert_eq!(read(&write(&tree), piece), Ok(tree));
        }

        #[test]
        fn damage_is_an_answer(tree in tree(), at: prop::sample::Index, byte: u8, piece in 1usize..70) {
            let mut bytes = write(&tree);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = read(&bytes, piece);
            let _ = read(&bytes[..at], piece);
        }
    }
}
