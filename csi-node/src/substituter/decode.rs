//! Compressed bytes in, NAR bytes out. Synchronous: it runs on the restore threads.

use std::io::{self, BufRead, Read};

use nix_csi_store::Compression;

/// A decoder that reserves at most `memory` bytes for its window. Frames and members that follow each other are
/// one stream.
pub(super) fn decoder<'a>(
    compression: Compression,
    input: impl BufRead + 'a,
    memory: u64,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(window_log(memory))?;
            Box::new(decoder)
        }
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(memory, liblzma::stream::CONCATENATED)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Brotli => Box::new(brotli_decompressor::Decompressor::new(input, 64 * 1024)),
    })
}

/// The smallest power of two that is not less, within what zstd takes.
fn window_log(memory: u64) -> u32 {
    memory.next_power_of_two().trailing_zeros().clamp(10, 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 1 << 20;

    #[test]
    fn zstd_frames_that_follow_each_other_are_one_stream() {
        let mut bytes = zstd::encode_all(&b"one "[..], 3).unwrap();
        bytes.extend(zstd::encode_all(&b"two"[..], 3).unwrap());
        let mut text = String::new();
        decoder(Compression::Zstd, &bytes[..], 2 * MEMORY).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let bytes = zstd::encode_all(&[7; 4096][..], 3).unwrap();
        let mut decoder = decoder(Compression::Zstd, &bytes[..bytes.len() - 3], 2 * MEMORY).unwrap();
        assert!(decoder.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_window_larger_than_the_memory_is_an_error() {
        let bytes = zstd::encode_all(&vec![7; 100_000][..], 3).unwrap();
        let mut small = decoder(Compression::Zstd, &bytes[..], MEMORY).unwrap();
        assert!(small.read_to_end(&mut Vec::new()).is_err());
        let content = vec![7; 100_000];
        let mut input = Vec::new();
        liblzma::read::XzEncoder::new(&content[..], 6).read_to_end(&mut input).unwrap();
        let mut small = decoder(Compression::Xz, &input[..], MEMORY).unwrap();
        assert!(small.read_to_end(&mut Vec::new()).is_err());
    }
}
