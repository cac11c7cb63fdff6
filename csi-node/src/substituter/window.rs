//! How much memory a decoder will need, from the first bytes of what it has to decode.
//!
//! Pure. The answer decides what a transfer takes out of the memory budget before it is decoded; a header that
//! lies is stopped by the decoder's own limit, which is set to what was taken.

use nix_csi_store::Compression;

const MIB: u64 = 1 << 20;

/// The largest window that is decoded at all: what `zstd --long=27` makes.
pub(super) const LARGEST: u64 = 128 * MIB;

/// How many bytes [`needed`] wants to see, where that many come.
pub(super) const HEAD: usize = 64;

/// What is expected before a byte has arrived: what the usual levels of each format need.
pub(super) fn expected(compression: Compression) -> u64 {
    match compression {
        Compression::None => 0,
        Compression::Zstd => 2 * MIB,
        Compression::Xz => 9 * MIB,
        Compression::Bzip2 => 4 * MIB,
        Compression::Gzip => MIB / 8,
        Compression::Brotli => 16 * MIB,
    }
}

/// The memory that decoding what begins with `head` takes; [`expected`] where that cannot be read from it.
pub(super) fn needed(compression: Compression, head: &[u8]) -> u64 {
    let read = match compression {
        Compression::Zstd => zstd_window(head),
        // The dictionary and what stands around it.
        Compression::Xz => xz_dictionary(head).map(|size| size.saturating_add(MIB)),
        Compression::Brotli => brotli_window(head),
        _ => None,
    };
    read.unwrap_or_else(|| expected(compression))
}

/// RFC 8878, 3.1.1.1: the window of the first frame that is not skippable.
fn zstd_window(head: &[u8]) -> Option<u64> {
    let frame = head.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd])?;
    let descriptor = *frame.first()?;
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let window = *frame.get(1)?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // Without a window of its own the whole content is one.
    let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content = frame.get(1 + dictionary_id..)?;
    let size = match descriptor >> 6 {
        0 => u64::from(*content.first()?),
        1 => u64::from(u16::from_le_bytes(*content.first_chunk()?)) + 256,
        2 => u64::from(u32::from_le_bytes(*content.first_chunk()?)),
        _ => u64::from_le_bytes(*content.first_chunk()?),
    };
    Some(size)
}

/// RFC 7932, 9.1. The marker of the larger windows that came later means up to 1 GiB.
fn brotli_window(head: &[u8]) -> Option<u64> {
    let first = *head.first()?;
    Some(if first & 1 == 0 {
        1 << 16
    } else if first & 0x7f == 0x11 {
        1 << 30
    } else {
        match ((first >> 1) & 7, (first >> 4) & 7) {
            (0, 0) => 1 << 17,
            (0, bits) => 1 << (8 + bits),
            (bits, _) => 1 << (17 + bits),
        }
    })
}

/// The .xz format, 3.1 and 5.3.1: the dictionary that the first block's LZMA2 filter names.
fn xz_dictionary(head: &[u8]) -> Option<u64> {
    const STREAM_HEADER: usize = 12;
    const LZMA2: u64 = 0x21;
    let mut block = head.strip_prefix(b"\xfd7zXZ\0")?.get(STREAM_HEADER - 6 + 1..)?;
    let (flags, rest) = block.split_first()?;
    block = rest;
    for has_size in [flags & 0x40 != 0, flags & 0x80 != 0] {
        if has_size {
            variable_length(&mut block)?;
        }
    }
    for _ in 0..=(flags & 3) {
        let filter = variable_length(&mut block)?;
        let len = usize::try_from(variable_length(&mut block)?).ok()?;
        let (properties, rest) = block.split_at_checked(len)?;
        block = rest;
        if filter == LZMA2 {
            return match properties.first()? & 0x3f {
                40 => Some(u64::from(u32::MAX)),
                bits @ 0..40 => Some((2 | u64::from(bits & 1)) << (bits / 2 + 11)),
                _ => None,
            };
        }
    }
    None
}

/// The .xz format, 1.2: seven bits a byte, the lowest first.
fn variable_length(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for n in 0..9 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use std::io::Write as _;

    fn zstd(level: i32, window_log: Option<u32>, len: usize, pledged: bool) -> Vec<u8> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).unwrap();
        if let Some(log) = window_log {
            encoder.long_distance_matching(true).unwrap();
            encoder.window_log(log).unwrap();
        }
        if pledged {
            encoder.set_pledged_src_size(Some(len as u64)).unwrap();
        }
        encoder.write_all(&vec![7; len]).unwrap();
        encoder.finish().unwrap()
    }

    #[rstest]
    #[case::as_nix_streams_it(zstd(3, None, 100_000, false), 2 * MIB)]
    #[case::high_level(zstd(19, None, 100_000, false), 8 * MIB)]
    #[case::long(zstd(3, Some(27), 100_000, false), 128 * MIB)]
    #[case::longer_than_allowed(zstd(3, Some(30), 100_000, false), 1024 * MIB)]
    #[case::known_size(zstd(3, None, 100_000, true), 100_000)]
    #[case::known_small_size(zstd(3, None, 300, true), 300)]
    #[case::known_tiny_size(zstd(3, None, 3, true), 3)]
    fn zstd_says_its_window(#[case] bytes: Vec<u8>, #[case] window: u64) {
        assert_eq!(needed(Compression::Zstd, &bytes), window);
    }

    #[rstest]
    #[case(0, MIB / 4)]
    #[case(6, 8 * MIB)]
    #[case(9, 64 * MIB)]
    fn xz_says_its_dictionary(#[case] level: u32, #[case] dictionary: u64) {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), level);
        encoder.write_all(&vec![7; 100_000]).unwrap();
        let bytes = encoder.finish().unwrap();
        assert_eq!(needed(Compression::Xz, &bytes[..HEAD]), dictionary + MIB);
    }

    #[rstest]
    #[case::small(0x00, 1 << 16)]
    #[case::largest(0x0f, 1 << 24)]
    #[case::usual(0x0b, 1 << 22)]
    #[case::beyond_the_standard(0x11, 1 << 30)]
    fn brotli_says_its_window(#[case] first: u8, #[case] window: u64) {
        assert_eq!(needed(Compression::Brotli, &[first]), window);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..HEAD)) {
            let zstd = [&[0x28, 0xb5, 0x2f, 0xfd][..], &bytes].concat();
            let xz = [&b"\xfd7zXZ\0\0\0\0\0\0\0"[..], &bytes].concat();
            needed(Compression::Zstd, &zstd);
            needed(Compression::Xz, &xz);
        }
    }
}
