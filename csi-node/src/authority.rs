//! Lets kubelet's plugin manager in, whose HTTP/2 requests carry a socket's path as `:authority`.
//!
//! grpc-go sends `%2Fvar%2Flib%2F…` there, which is no authority by RFC 3986, so the HTTP/2 library ends the
//! stream with PROTOCOL_ERROR before any handler sees it. Nobody needs the value: it is replaced on the way
//! in by letters of the same number of bytes, so that no length changes. Everything else passes untouched.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

const PREFACE_LEN: usize = 24;
const FRAME_HEADER_LEN: usize = 9;
/// What a peer may send before it is told otherwise, and we never do.
const MAX_FRAME_LEN: usize = 16_384;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;

/// A connection whose requests all have an authority that can be read.
pub(crate) struct AnyAuthority<S> {
    inner: S,
    /// Frames that have not arrived whole.
    pending: Vec<u8>,
    /// What can be read.
    output: Vec<u8>,
    read: usize,
    greeted: bool,
}

impl<S> AnyAuthority<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self { inner, pending: Vec::new(), output: Vec::new(), read: 0, greeted: false }
    }

    /// Moves what has arrived whole from `pending` to `output`.
    fn take_frames(&mut self) -> io::Result<()> {
        if !self.greeted {
            if self.pending.len() < PREFACE_LEN {
                return Ok(());
            }
            self.output.extend(self.pending.drain(..PREFACE_LEN));
            self.greeted = true;
        }
        while let Some(len) = frame_len(&self.pending) {
            if len > MAX_FRAME_LEN {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an HTTP/2 frame of more than 16 KiB",
                ));
            }
            let Some(frame) = self.pending.get_mut(..FRAME_HEADER_LEN + len) else { return Ok(()) };
            replace_authority(frame);
            self.output.extend(self.pending.drain(..FRAME_HEADER_LEN + len));
        }
        Ok(())
    }
}

fn frame_len(bytes: &[u8]) -> Option<usize> {
    let header = bytes.get(..FRAME_HEADER_LEN)?;
    Some(usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]))
}

/// Makes the authority of a HEADERS frame letters, if it is there in full.
fn replace_authority(frame: &mut [u8]) {
    let (kind, flags) = (frame[3], frame[4]);
    if kind != HEADERS {
        return;
    }
    let mut from = FRAME_HEADER_LEN;
    let mut to = frame.len();
    if flags & PADDED != 0 {
        let padding = frame.get(from).copied().map_or(0, usize::from);
        (from, to) = (from + 1, to.saturating_sub(padding));
    }
    if flags & PRIORITY != 0 {
        from += 5;
    }
    let Some(block) = frame.get_mut(from..to) else { return };
    if let Some((flag, value)) = find_authority(block) {
        // The highest bit says that the value is Huffman coded: now it is not.
        block[flag] &= 0x7f;
        block[value].fill(b'a');
    }
}

/// Where in a header block the authority's length begins, and where its value is.
fn find_authority(block: &[u8]) -> Option<(usize, Range<usize>)> {
    let mut at = 0;
    while let Some(first) = block.get(at) {
        // RFC 7541, section 6: which representation, and how many bits the first number has.
        let (bits, has_value) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index;
        (index, at) = number(block, at, bits)?;
        if !has_value {
            continue;
        }
        if index == 0 {
            at = string(block, at)?.end;
        }
        let value = string(block, at)?;
        if index == AUTHORITY {
            return Some((at, value));
        }
        at = value.end;
    }
    None
}

/// RFC 7541, section 5.1: an integer whose first byte has `bits` bits of it. Also gives what is behind it.
fn number(block: &[u8], mut at: usize, bits: u32) -> Option<(usize, usize)> {
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    at += 1;
    if value < mask {
        return Some((value, at));
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(at)?;
        at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// Where the bytes of the string are whose length stands at `at`.
fn string(block: &[u8], at: usize) -> Option<Range<usize>> {
    let (len, from) = number(block, at, 7)?;
    let value = from..from + len;
    block.get(value.clone()).map(|_| value)
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.read == this.output.len() {
            this.output.clear();
            this.read = 0;
            let mut chunk = [0; 4096];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.pending.extend_from_slice(chunk.filled());
            this.take_frames()?;
        }
        let rest = &this.output[this.read..];
        let len = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..len]);
        this.read += len;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S> Connected for AnyAuthority<S> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    /// `:method: POST`, `:scheme: http`, `:path: /a`, `:authority: <value>`, `te: trailers`.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x86, 0x44, 0x02, b'/', b'a', 0x41];
        block.extend_from_slice(authority);
        block.extend_from_slice(&[0x40, 0x02, b't', b'e', 0x08]);
        block.extend_from_slice(b"trailers");
        block
    }

    fn headers(flags: u8, before: &[u8], block: &[u8], padding: u8) -> Vec<u8> {
        let len = before.len() + block.len() + usize::from(padding);
        let mut frame = vec![0, 0, u8::try_from(len).unwrap(), HEADERS, flags, 0, 0, 0, 1];
        frame.extend_from_slice(before);
        frame.extend_from_slice(block);
        frame.resize(frame.len() + usize::from(padding), 0);
        frame
    }

    #[rstest]
    #[case::plain(&[0x06, b'%', b'2', b'F', b'v', b'a', b'r'], &[0x06, b'a', b'a', b'a', b'a', b'a', b'a'])]
    #[case::huffman(&[0x83, 0x12, 0x34, 0x56], &[0x03, b'a', b'a', b'a'])]
    #[case::empty(&[0x00], &[0x00])]
    fn only_the_authority_changes(#[case] before: &[u8], #[case] after: &[u8]) {
        for (flags, extra, padding) in
            [(0x4, &[][..], 0), (0x4 | PADDED, &[3], 3), (0x4 | PRIORITY, &[0, 0, 0, 0, 9], 0)]
        {
            let mut frame = headers(flags, extra, &block(before), padding);
            replace_authority(&mut frame);
            assert_eq!(frame, headers(flags, extra, &block(after), padding));
        }
    }

    #[tokio::test]
    async fn a_connection_passes_in_whatever_pieces() {
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        sent.extend_from_slice(&settings);
        sent.extend(headers(4, &[], &block(&[0x02, b'%', b'2']), 0));
        sent.extend_from_slice(&settings);
        let mut expected = sent.clone();
        let at = expected.windows(2).position(|bytes| bytes == b"%2").unwrap();
        expected[at..at + 2].fill(b'a');
        for piece in [1, 5, 4096] {
            let (client, server) = tokio::io::duplex(piece);
            let sent = sent.clone();
            let writing = tokio::spawn(async move {
                let mut client = client;
                tokio::io::AsyncWriteExt::write_all(&mut client, &sent).await.unwrap();
            });
            let mut received = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut AnyAuthority::new(server), &mut received)
                .await
                .unwrap();
            writing.await.unwrap();
            assert_eq!(received, expected);
        }
    }

    proptest! {
        #[test]
        fn any_block_is_survived(block in prop::collection::vec(any::<u8>(), 0..60), flags: u8) {
            let mut frame = headers(flags, &[], &block, 0);
            let len = frame.len();
            replace_authority(&mut frame);
            prop_assert_eq!(frame.len(), len);
        }
    }
}
