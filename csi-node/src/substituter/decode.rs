//! Compressed bytes in, NAR bytes out. Synchronous: it runs on the restore threads.

use std::io::{self, BufReader, Read};

use nix_csi_store::Compression;

/// A zstd window of 128 MiB: what `zstd --long=27` makes, and the most a node should reserve.
const ZSTD_WINDOW_LOG: u32 = 27;
/// xz -9 needs 65 MiB.
const XZ_MEMORY: u64 = 128 << 20;

/// A decoder of everything that a cache may send; frames and members that follow each other are one stream.
pub(super) fn decoder<'a>(compression: Compression, input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        Compression::Xz => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED)?;
            Box::new(liblzma::read::XzDecoder::new_stream(input, stream))
        }
        Compression::Bzip2 => Box::new(bzip2::read::MultiBzDecoder::new(input)),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(input))),
        Compression::Brotli => Box::new(brotli_decompressor::Decompressor::new(input, 64 * 1024)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zstd_frames_that_follow_each_other_are_one_stream() {
        let mut bytes = zstd::encode_all(&b"one "[..], 3).unwrap();
        bytes.extend(zstd::encode_all(&b"two"[..], 3).unwrap());
        let mut text = String::new();
        decoder(Compression::Zstd, &bytes[..]).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let bytes = zstd::encode_all(&[7; 4096][..], 3).unwrap();
        let mut out = Vec::new();
        assert!(
            decoder(Compression::Zstd, &bytes[..bytes.len() - 3]).unwrap().read_to_end(&mut out).is_err()
        );
    }
}
