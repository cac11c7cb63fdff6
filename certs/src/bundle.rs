//! CA and serving certificate: made, judged, written as PEM. Pure but for randomness and the clock given.

use std::collections::BTreeMap;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use time::{Duration, OffsetDateTime};

const CA_LIFETIME: Duration = Duration::days(3650);
const LEAF_LIFETIME: Duration = Duration::days(90);
/// Renewed when a third of its life is left.
const LEAF_RENEWAL: Duration = Duration::days(30);
/// Certificates count from before they were made: clocks differ.
const BACKDATE: Duration = Duration::hours(1);

/// Why certificates cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The Secret lacks a key.
    #[error("the secret has no {0}")]
    Missing(&'static str),
    /// Not PEM, or not what it should be.
    #[error("{0} cannot be read")]
    Unreadable(&'static str),
    /// Making one failed.
    #[error("cannot make a certificate")]
    Generate(#[from] rcgen::Error),
    /// The TLS library does not take it.
    #[error("cannot serve with the certificate")]
    Tls(#[from] rustls::Error),
}

/// A CA and a serving certificate made by it, all PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Bundle {
    /// The CA's certificate: what `caBundle` must hold.
    pub ca_crt: String,
    ca_key: String,
    /// The serving certificate.
    pub tls_crt: String,
    /// Its key.
    pub tls_key: String,
}

impl Bundle {
    /// A new CA and a certificate for `names`.
    pub fn generate(names: &[String], now: OffsetDateTime) -> Result<Self, BundleError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = name("nix-csi webhook CA");
        (params.not_before, params.not_after) = (now - BACKDATE, now + CA_LIFETIME);
        let ca = params.self_signed(&key)?;
        Self::issue(ca.pem(), key.serialize_pem(), names, now)
    }

    /// The same CA with a new certificate for `names`.
    pub fn renew(&self, names: &[String], now: OffsetDateTime) -> Result<Self, BundleError> {
        Self::issue(self.ca_crt.clone(), self.ca_key.clone(), names, now)
    }

    fn issue(
        ca_crt: String,
        ca_key: String,
        names: &[String],
        now: OffsetDateTime,
    ) -> Result<Self, BundleError> {
        let issuer = Issuer::from_ca_cert_pem(&ca_crt, KeyPair::from_pem(&ca_key)?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = name("nix-csi webhook");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (now - BACKDATE, now + LEAF_LIFETIME);
        let leaf = params.signed_by(&key, &issuer)?;
        Ok(Self { tls_crt: leaf.pem(), tls_key: key.serialize_pem(), ca_crt, ca_key })
    }

    /// When the CA's and the serving certificate end.
    fn ends(&self) -> Result<[OffsetDateTime; 2], BundleError> {
        Ok([not_after(&self.ca_crt, "ca.crt")?, not_after(&self.tls_crt, "tls.crt")?])
    }

    /// When the serving certificate ends, in seconds since 1970.
    pub(crate) fn expires(&self) -> Result<u64, BundleError> {
        let end = not_after(&self.tls_crt, "tls.crt")?.unix_timestamp();
        Ok(u64::try_from(end).unwrap_or(0))
    }

    /// What must be done about it at `now`, so that it can be served as `names`.
    pub fn due(&self, names: &[String], now: OffsetDateTime) -> Due {
        match self.ends() {
            // A leaf must not outlive its CA, so the CA goes first.
            Ok([ca, _]) if ca - now < LEAF_LIFETIME => Due::NewAuthority,
            Ok([_, leaf]) if leaf - now < LEAF_RENEWAL => Due::NewCertificate,
            Ok(_) if self.certified_key().is_err() || !self.is_for(names) => Due::NewCertificate,
            Ok(_) => Due::Nothing,
            Err(_) => Due::NewAuthority,
        }
    }

    /// Whether the serving certificate has all of `names`.
    fn is_for(&self, names: &[String]) -> bool {
        let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(self.tls_crt.as_bytes()) else { return false };
        let Ok(certificate) = pem.parse_x509() else { return false };
        let Ok(Some(found)) = certificate.subject_alternative_name() else { return false };
        let found: Vec<_> = found.value.general_names.iter().map(ToString::to_string).collect();
        names.iter().all(|name| found.iter().any(|found| found == &format!("DNSName({name})")))
    }

    /// The serving certificate as rustls wants it; an error if its key is another's.
    pub(crate) fn certified_key(&self) -> Result<CertifiedKey, BundleError> {
        let chain = CertificateDer::pem_slice_iter(self.tls_crt.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| BundleError::Unreadable("tls.crt"))?;
        let key = PrivateKeyDer::from_pem_slice(self.tls_key.as_bytes())
            .map_err(|_| BundleError::Unreadable("tls.key"))?;
        let key = CertifiedKey::new(chain, any_supported_type(&key)?);
        // Unknown is what a provider says that cannot compare; only a real mismatch is an error.
        match key.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(key),
            Err(error) => Err(error.into()),
        }
    }

    /// As the data of a Secret.
    pub fn to_data(&self) -> BTreeMap<String, String> {
        [
            ("ca.crt", &self.ca_crt),
            ("ca.key", &self.ca_key),
            ("tls.crt", &self.tls_crt),
            ("tls.key", &self.tls_key),
        ]
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .into()
    }

    /// From the data of a Secret.
    pub fn from_data<'a>(get: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Self, BundleError> {
        let text = |key: &'static str| {
            let bytes = get(key).ok_or(BundleError::Missing(key))?;
            String::from_utf8(bytes.to_vec()).map_err(|_| BundleError::Unreadable(key))
        };
        Ok(Self {
            ca_crt: text("ca.crt")?,
            ca_key: text("ca.key")?,
            tls_crt: text("tls.crt")?,
            tls_key: text("tls.key")?,
        })
    }
}

/// What a bundle needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// It is good for a while.
    Nothing,
    /// A new serving certificate by the same CA.
    NewCertificate,
    /// All of it anew.
    NewAuthority,
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn not_after(pem: &str, what: &'static str) -> Result<OffsetDateTime, BundleError> {
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| BundleError::Unreadable(what))?;
    let certificate = pem.parse_x509().map_err(|_| BundleError::Unreadable(what))?;
    Ok(certificate.validity().not_after.to_datetime())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        vec!["nix-csi-webhook.nix-csi.svc".to_owned()]
    }

    #[test]
    fn a_certificate_is_renewed_before_it_ends_and_the_ca_before_that() {
        let made = OffsetDateTime::UNIX_EPOCH + Duration::days(20_000);
        let bundle = Bundle::generate(&names(), made).unwrap();
        assert_eq!(bundle.due(&names(), made), Due::Nothing);
        assert_eq!(bundle.due(&names(), made + Duration::days(59)), Due::Nothing);
        assert_eq!(bundle.due(&names(), made + Duration::days(61)), Due::NewCertificate);
        assert_eq!(bundle.due(&names(), made + Duration::days(3600)), Due::NewAuthority);
        let renewed = bundle.renew(&names(), made + Duration::days(61)).unwrap();
        assert_eq!(renewed.ca_crt, bundle.ca_crt);
        assert_eq!(renewed.due(&names(), made + Duration::days(61)), Due::Nothing);
    }

    #[test]
    fn a_secret_holds_all_of_it() {
        let bundle = Bundle::generate(&names(), OffsetDateTime::now_utc()).unwrap();
        let data = bundle.to_data();
        let read = Bundle::from_data(|key| data.get(key).map(String::as_bytes)).unwrap();
        assert!(read == bundle);
        assert!(matches!(Bundle::from_data(|_| None), Err(BundleError::Missing("ca.crt"))));
    }

    #[test]
    fn damage_asks_for_a_new_one() {
        let now = OffsetDateTime::now_utc();
        let good = Bundle::generate(&names(), now).unwrap();
        let mut bundle = good.clone();
        bundle.tls_crt = "damaged".to_owned();
        assert_eq!(bundle.due(&names(), now), Due::NewAuthority);
        let mut bundle = good.clone();
        bundle.tls_key = Bundle::generate(&names(), now).unwrap().tls_key;
        assert_eq!(bundle.due(&names(), now), Due::NewCertificate);
        assert_eq!(good.due(&["another.svc".to_owned()], now), Due::NewCertificate);
    }
}
