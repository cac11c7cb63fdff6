//! Turns files into a NAR again, to hash what is on the disk. The reverse of [`crate::restore`].

use std::ffi::CString;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix_csi_store::NarHash;
use nix_csi_store::nar::NarWriter;
use ring::digest::{Context, SHA256};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

const BUFFER: usize = 256 * 1024;

/// The hash and length of the NAR of `path`.
pub(crate) fn hash(path: &Path) -> io::Result<(NarHash, u64)> {
    let mut nar = NarWriter::new(Hasher { hash: Context::new(&SHA256), len: 0 })?;
    let root = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut buffer = vec![0; BUFFER];
    // Directories that are being written, with the entries that are left, the last one first.
    let mut open: Vec<(OwnedFd, Vec<CString>)> = Vec::new();
    if let Some(dir) = node(&mut nar, CWD, &root, &mut buffer)? {
        open.push(dir);
    }
    while let Some((dir, entries)) = open.last_mut() {
        if let Some(name) = entries.pop() {
            nar.entry(name.as_bytes())?;
            match node(&mut nar, dir.as_fd(), &name, &mut buffer)? {
                Some(inner) => open.push(inner),
                None => nar.entry_end()?,
            }
        } else {
            nar.directory_end()?;
            open.pop();
            if !open.is_empty() {
                nar.entry_end()?;
            }
        }
    }
    let Hasher { hash, len } = nar.into_inner();
    let mut digest = [0; 32];
    digest.copy_from_slice(hash.finish().as_ref());
    Ok((NarHash::new(digest), len))
}

/// Writes one node. A directory is only begun, and comes back with its entries.
fn node<W: Write>(
    nar: &mut NarWriter<W>,
    parent: rustix::fd::BorrowedFd<'_>,
    name: &CString,
    buffer: &mut [u8],
) -> io::Result<Option<(OwnedFd, Vec<CString>)>> {
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let mut file = std::fs::File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
            let size = u64::try_from(stat.st_size).unwrap_or_default();
            nar.file(stat.st_mode & 0o100 != 0, size)?;
            let mut left = size;
            while left > 0 {
                let want = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
                match file.read(&mut buffer[..want])? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    read => {
                        nar.data(&buffer[..read])?;
                        left -= read as u64;
                    }
                }
            }
            nar.file_end()?;
            Ok(None)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
            nar.symlink(target.as_bytes())?;
            Ok(None)
        }
        FileType::Directory => {
            let dir = rustix::fs::openat(parent, name, flags | OFlags::DIRECTORY, Mode::empty())?;
            let mut entries = Vec::new();
            for entry in Dir::read_from(&dir)? {
                let name = entry?.file_name().to_owned();
                if !matches!(name.as_bytes(), b"." | b"..") {
                    entries.push(name);
                }
            }
            entries.sort_unstable_by(|a, b| b.cmp(a));
            nar.directory()?;
            Ok(Some((dir, entries)))
        }
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a store has no {other:?}"))),
    }
}

struct Hasher {
    hash: Context,
    len: u64,
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
