//! Nix's base 32: no `e`, `o`, `u`, `t`, and the last character carries the first bits.

const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Why a text is not Nix base 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Base32Error {
    /// A character outside `0-9a-z` without `e`, `o`, `u`, `t`.
    #[error("{0:?} is not a character of Nix base 32")]
    Character(char),
    /// The text is longer or shorter than the bytes it should stand for.
    #[error("{found} characters where {expected} were expected")]
    Length {
        /// Characters that the number of bytes needs.
        expected: usize,
        /// Characters found.
        found: usize,
    },
    /// Bits beyond the last byte are set: two texts would mean the same bytes.
    #[error("the first character has bits that mean nothing")]
    NotCanonical,
}

/// The number of characters for `bytes` bytes.
pub(crate) const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Writes `bytes` in Nix base 32.
pub fn encode(bytes: &[u8]) -> String {
    let digit = |n: usize| {
        let (byte, shift) = (n * 5 / 8, n * 5 % 8);
        let low = u32::from(bytes[byte]) >> shift;
        let high = bytes.get(byte + 1).map_or(0, |next| u32::from(*next) << (8 - shift));
        char::from(ALPHABET[((low | high) & 31) as usize])
    };
    (0..encoded_len(bytes.len())).rev().map(digit).collect()
}

/// Reads exactly `N` bytes; only the canonical text of those bytes is accepted.
pub fn decode<const N: usize>(text: &str) -> Result<[u8; N], Base32Error> {
    if text.len() != encoded_len(N) {
        return Err(Base32Error::Length { expected: encoded_len(N), found: text.chars().count() });
    }
    let mut bytes = [0; N];
    for (n, character) in text.bytes().rev().enumerate() {
        let digit = (0u8..32)
            .find(|digit| ALPHABET[usize::from(*digit)] == character)
            .ok_or_else(|| Base32Error::Character(offending(text)))?;
        let (byte, shift) = (n * 5 / 8, n * 5 % 8);
        let [low, high] = (u16::from(digit) << shift).to_le_bytes();
        bytes[byte] |= low;
        match (bytes.get_mut(byte + 1), high) {
            (_, 0) => {}
            (Some(next), carry) => *next |= carry,
            (None, _) => return Err(Base32Error::NotCanonical),
        }
    }
    Ok(bytes)
}

/// The first character that is not of the alphabet, for the message.
fn offending(text: &str) -> char {
    text.chars()
        .find(|c| !c.is_ascii() || !ALPHABET.contains(&(*c as u8)))
        .unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Whether every byte is of the alphabet.
pub(crate) fn is_base32(text: &[u8]) -> bool {
    text.iter().all(|byte| ALPHABET.contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_values_of_nix() {
        // `nix hash to-base32 sha256:…` of the empty input.
        let empty = [
            0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
            0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
        ];
        assert_eq!(encode(&empty), "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73");
    }

    #[test]
    fn refuses_what_is_not_canonical() {
        assert_eq!(decode::<1>("e0"), Err(Base32Error::Character('e')));
        assert_eq!(decode::<1>("0"), Err(Base32Error::Length { expected: 2, found: 1 }));
        assert_eq!(decode::<1>("zz"), Err(Base32Error::NotCanonical));
        assert_eq!(decode::<1>("é"), Err(Base32Error::Character('é')));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(bytes: [u8; 20]) {
            prop_assert_eq!(decode::<20>(&encode(&bytes)), Ok(bytes));
        }

        #[test]
        fn what_is_decoded_is_encoded(text in "[0-9a-z]{52}") {
            if let Ok(bytes) = decode::<32>(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }

        #[test]
        fn any_text_is_an_answer(text in ".{0,60}") {
            let _ = decode::<20>(&text);
            let _ = decode::<32>(&text);
        }
    }
}
