//! Any text is an answer of the narinfo reader, and of those of its parts. What is read is the same after it
//! was printed.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use nix_csi_store::{
    ContentAddress, Hash, NarHash, NarInfo, PublicKey, Signature, StorePath, TrustedKeys, decode_base32,
    encode_base32, fingerprint,
};

/// What can be read is printed as a text that means the same.
fn round<T: FromStr + Display + Debug + PartialEq>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    let printed = value.to_string();
    assert_eq!(printed.parse().ok().as_ref(), Some(&value), "{printed:?}");
    Some(value)
}

fn content_address(text: impl Display, path: &StorePath, references: &[StorePath]) {
    let Some(address) = round::<ContentAddress>(&text.to_string()) else { return };
    let _ = address.hasher();
    if address.proves(path, references).is_ok() {
        assert_eq!(address.store_path(path.name(), references).as_ref(), Ok(path));
    }
    if let Ok(derived) = address.store_path(path.name(), references)
        && !references.contains(&derived)
        && address.hasher().is_ok()
    {
        assert_eq!(address.proves(&derived, references), Ok(()));
    }
}

fn narinfo(text: &str) {
    let Some(info) = round::<NarInfo>(text) else { return };
    assert!(info.nar_size > 0 && !info.url.is_empty());
    assert!(info.references.is_sorted() && info.references.windows(2).all(|two| two[0] != two[1]));
    let signed = info.fingerprint();
    let mut backwards = info.references.clone();
    backwards.reverse();
    assert_eq!(fingerprint(&info.path, info.nar_hash, info.nar_size, &backwards), signed);
    assert!(!signed.contains('\n'));
    // A key that nobody has: no text makes a signature by it.
    let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=".parse::<PublicKey>();
    let trusted: TrustedKeys = key.into_iter().collect();
    let _ = trusted.verify(&signed, &info.signatures);
    if let Some(address) = &info.ca {
        content_address(address, &info.path, &info.references);
    }
}

/// Bytes have one text only.
fn base32<const N: usize>(text: &str) {
    if let Ok(bytes) = decode_base32::<N>(text) {
        assert_eq!(encode_base32(&bytes), text);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    narinfo(text);
    for word in text.split(['\n', ' ']) {
        round::<StorePath>(word);
        round::<Hash>(word);
        round::<NarHash>(word);
        let digest = word.rsplit_once(':').map_or(word, |(_, digest)| digest);
        base32::<16>(digest);
        base32::<32>(digest);
        base32::<64>(digest);
        round::<Signature>(word);
        round::<PublicKey>(word);
        let path = StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-x").expect("a store path");
        content_address(word, &path, &[]);
    }
});
