//! What rustls serves with: changed by one pointer, without a restart; open connections stay.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::crypto::ring::{default_provider, sign::any_supported_type};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::bundle::{Bundle, BundleError};

/// The serving certificate of the moment.
#[derive(Debug, Default)]
pub struct LiveCertificate(ArcSwapOption<CertifiedKey>);

impl LiveCertificate {
    /// Serves with `bundle` from the next handshake on.
    pub fn set(&self, bundle: &Bundle) -> Result<(), BundleError> {
        let chain = CertificateDer::pem_slice_iter(bundle.tls_crt.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| BundleError::Unreadable("tls.crt"))?;
        let key = PrivateKeyDer::from_pem_slice(bundle.tls_key.as_bytes())
            .map_err(|_| BundleError::Unreadable("tls.key"))?;
        let key = CertifiedKey::new(chain, any_supported_type(&key)?);
        // Unknown is what a provider says that cannot compare; only a real mismatch is an error.
        match key.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(error) => return Err(error.into()),
        }
        self.0.store(Some(Arc::new(key)));
        Ok(())
    }

    /// Whether there is a certificate to serve with.
    pub fn is_set(&self) -> bool {
        self.0.load().is_some()
    }

    /// A TLS server configuration that asks this for its certificate at each handshake.
    pub fn server_config(self: &Arc<Self>) -> Result<ServerConfig, BundleError> {
        let resolver = Arc::clone(self);
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::OffsetDateTime;

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let bundle = || Bundle::generate(&["a".to_owned()], OffsetDateTime::now_utc()).unwrap();
        let (one, other) = (bundle(), bundle());
        let live = LiveCertificate::default();
        let mut mixed = one.clone();
        mixed.tls_key = other.tls_key;
        assert!(live.set(&mixed).is_err());
        assert!(!live.is_set());
        live.set(&one).unwrap();
        assert!(live.is_set());
    }
}
