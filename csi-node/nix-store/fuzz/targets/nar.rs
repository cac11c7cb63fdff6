//! Any bytes are an answer of the NAR reader, the same in whatever pieces they come, and what is a NAR is
//! written again byte by byte.
#![no_main]

use std::convert::Infallible;

use libfuzzer_sys::fuzz_target;
use nix_csi_store::nar::{NarError, NarReader, NarSink, NarWriter, PushError};

const MAX_DEPTH: usize = 64;

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Directory(Vec<u8>),
    Leave,
    File { name: Vec<u8>, executable: bool, contents: Vec<u8> },
    Symlink { name: Vec<u8>, target: Vec<u8> },
}

/// Checks the order of the events while they come.
#[derive(Default)]
struct Check {
    events: Vec<Event>,
    /// One entry per open directory: the name of its last entry.
    open: Vec<Option<Vec<u8>>>,
    /// What the open file still has to get.
    missing: Option<u64>,
    /// How often the sink was called.
    calls: usize,
    has_root: bool,
}

impl Check {
    fn node(&mut self, name: &[u8]) {
        self.calls += 1;
        assert_eq!(self.missing, None, "a node inside a file");
        if let Some(last) = self.open.last_mut() {
            assert!(!name.is_empty() && name.len() <= 255 && name != b"." && name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
            assert!(last.as_deref().is_none_or(|last| last < name), "names do not rise");
            *last = Some(name.to_vec());
        } else {
            assert!(name.is_empty() && !self.has_root, "a second root, or one with a name");
            self.has_root = true;
        }
    }
}

impl NarSink for Check {
    type Error = Infallible;

    fn directory(&mut self, name: &[u8]) -> Result<(), Infallible> {
        self.node(name);
        self.events.push(Event::Directory(name.to_vec()));
        self.open.push(None);
        assert!(self.open.len() <= MAX_DEPTH);
        Ok(())
    }

    fn leave(&mut self) -> Result<(), Infallible> {
        self.calls += 1;
        assert_eq!(self.missing, None, "a directory ends inside a file");
        assert!(self.open.pop().is_some(), "more directories end than begin");
        self.events.push(Event::Leave);
        Ok(())
    }

    fn file(&mut self, name: &[u8], executable: bool, size: u64) -> Result<(), Infallible> {
        self.node(name);
        self.missing = Some(size);
        self.events.push(Event::File { name: name.to_vec(), executable, contents: Vec::new() });
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.calls += 1;
        assert!(!bytes.is_empty(), "data without bytes");
        let missing = self.missing.as_mut().expect("data inside a file");
        *missing = missing.checked_sub(bytes.len() as u64).expect("no more data than the file has");
        let Some(Event::File { contents, .. }) = self.events.last_mut() else { panic!("data of no file") };
        contents.extend_from_slice(bytes);
        Ok(())
    }

    fn file_end(&mut self) -> Result<(), Infallible> {
        self.calls += 1;
        assert_eq!(self.missing.take(), Some(0), "a file ends early");
        Ok(())
    }

    fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), Infallible> {
        self.node(name);
        assert!(!target.is_empty() && target.len() <= 4095 && !target.contains(&0));
        self.events.push(Event::Symlink { name: name.to_vec(), target: target.to_vec() });
        Ok(())
    }
}

/// Reads `bytes` in pieces of the lengths that `piece` says.
fn read(mut bytes: &[u8], mut piece: impl FnMut() -> usize) -> (Result<(), NarError>, Check) {
    let (mut reader, mut check) = (NarReader::new(), Check::default());
    let len = bytes.len();
    let mut outcome = Ok(());
    while outcome.is_ok() && !bytes.is_empty() {
        let (now, rest) = bytes.split_at(piece().min(bytes.len()));
        bytes = rest;
        outcome = match reader.push(now, &mut check) {
            Ok(()) => Ok(()),
            Err(PushError::Nar(error)) => Err(error),
        };
    }
    assert!(check.calls <= len, "more events than bytes");
    let outcome = outcome.and_then(|()| reader.finish());
    if outcome.is_ok() {
        assert!(check.has_root && check.open.is_empty() && check.missing.is_none(), "a part of an archive");
    }
    (outcome, check)
}

fn write(events: &[Event]) -> Vec<u8> {
    let mut writer = NarWriter::new(Vec::new()).expect("memory takes everything");
    let mut depth = 0;
    for event in events {
        if let Event::Directory(name) | Event::File { name, .. } | Event::Symlink { name, .. } = event
            && depth > 0
        {
            writer.entry(name).expect("memory takes everything");
        }
        match event {
            Event::Directory(_) => {
                depth += 1;
                writer.directory()
            }
            Event::Leave => {
                depth -= 1;
                writer.directory_end()
            }
            Event::File { executable, contents, .. } => writer
                .file(*executable, contents.len() as u64)
                .and_then(|()| writer.data(contents))
                .and_then(|()| writer.file_end()),
            Event::Symlink { target, .. } => writer.symlink(target),
        }
        .expect("memory takes everything");
        if depth > 0 && !matches!(event, Event::Directory(_)) {
            writer.entry_end().expect("memory takes everything");
        }
    }
    writer.into_inner()
}

fuzz_target!(|bytes: &[u8]| {
    let (outcome, whole) = read(bytes, || usize::MAX);
    // Lengths between 1 and 24 that depend on the bytes, so that an input that fails fails again.
    let mut state =
        bytes.iter().fold(1u32, |state, byte| (state ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let any_length = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as usize % 24 + 1
    };
    for (again, pieces) in [read(bytes, || 1), read(bytes, any_length)] {
        assert_eq!(outcome, again);
        assert_eq!(whole.events, pieces.events);
    }
    if outcome.is_ok() {
        assert_eq!(write(&whole.events), bytes, "not written as it was read");
    }
});
