//! Writes a NAR, piece by piece, to anything that takes bytes.

use std::io::{self, Write};

use super::{MAGIC, padding};

/// Writes what it is told; the order of the calls is the grammar, and is the caller's to keep.
///
/// Names must rise strictly by bytes, and a file must get exactly the bytes it announced.
pub struct NarWriter<W> {
    out: W,
    padding: usize,
}

impl<W: Write> NarWriter<W> {
    /// Begins an archive.
    pub fn new(out: W) -> io::Result<Self> {
        let mut writer = Self { out, padding: 0 };
        writer.string(MAGIC)?;
        Ok(writer)
    }

    /// Begins a directory node.
    pub fn directory(&mut self) -> io::Result<()> {
        self.strings(&[b"(", b"type", b"directory"])
    }

    /// Begins an entry of the innermost directory; a node follows.
    pub fn entry(&mut self, name: &[u8]) -> io::Result<()> {
        self.strings(&[b"entry", b"(", b"name", name, b"node"])
    }

    /// Ends an entry, after its node.
    pub fn entry_end(&mut self) -> io::Result<()> {
        self.string(b")")
    }

    /// Ends a directory node.
    pub fn directory_end(&mut self) -> io::Result<()> {
        self.string(b")")
    }

    /// A symbolic link.
    pub fn symlink(&mut self, target: &[u8]) -> io::Result<()> {
        self.strings(&[b"(", b"type", b"symlink", b"target", target, b")"])
    }

    /// Begins a regular file of `size` bytes.
    pub fn file(&mut self, executable: bool, size: u64) -> io::Result<()> {
        self.strings(&[b"(", b"type", b"regular"])?;
        if executable {
            self.strings(&[b"executable", b""])?;
        }
        self.string(b"contents")?;
        self.padding = padding(size).into();
        self.out.write_all(&size.to_le_bytes())
    }

    /// The file's next bytes.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// Ends a regular file.
    pub fn file_end(&mut self) -> io::Result<()> {
        self.pad()?;
        self.string(b")")
    }

    /// What was written to.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn strings(&mut self, values: &[&[u8]]) -> io::Result<()> {
        values.iter().try_for_each(|value| self.string(value))
    }

    fn string(&mut self, value: &[u8]) -> io::Result<()> {
        self.out.write_all(&(value.len() as u64).to_le_bytes())?;
        self.out.write_all(value)?;
        self.padding = padding(value.len() as u64).into();
        self.pad()
    }

    fn pad(&mut self) -> io::Result<()> {
        self.out.write_all(&[0; 8][..self.padding])
    }
}
