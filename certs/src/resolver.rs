//! What rustls serves with: changed by one pointer, without a restart; open connections stay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::bundle::{Bundle, BundleError};

/// The serving certificate of the moment.
#[derive(Debug, Default)]
pub struct LiveCertificate {
    key: ArcSwapOption<CertifiedKey>,
    /// Seconds since 1970; 0 as long as there is none.
    expires: AtomicU64,
}

impl LiveCertificate {
    /// Serves with `bundle` from the next handshake on.
    pub fn set(&self, bundle: &Bundle) -> Result<(), BundleError> {
        let (key, expires) = (bundle.certified_key()?, bundle.expires()?);
        self.key.store(Some(Arc::new(key)));
        self.expires.store(expires, Ordering::Relaxed);
        Ok(())
    }

    /// When the certificate ends, in seconds since 1970.
    pub fn expires(&self) -> Option<u64> {
        Some(self.expires.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0)
    }

    /// Whether there is a certificate to serve with.
    pub fn is_set(&self) -> bool {
        self.key.load().is_some()
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
        self.key.load_full()
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
        assert_eq!(live.expires(), None);
        live.set(&one).unwrap();
        assert!(live.is_set());
        let in_90_days = OffsetDateTime::now_utc() + time::Duration::days(90);
        let expires = i64::try_from(live.expires().unwrap()).unwrap();
        assert!((in_90_days.unix_timestamp() - expires).abs() < 60, "{expires}");
    }
}
