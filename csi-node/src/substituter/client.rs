//! The HTTP client for binary caches.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Client;
use reqwest::redirect::Policy;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use crate::config::Config;

/// How much of one answer may be under way.
const STREAM_WINDOW: u32 = 512 * 1024;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// `ssl-cert-file` cannot be read, or has something else in it.
    #[error("cannot read certificates from {}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate that no authority can have.
    #[error("a certificate in {} cannot be used", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// `ssl-cert-file` has none.
    #[error("there is no certificate in {}", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// The options do not fit together.
    #[error("cannot make an HTTP client")]
    Client(#[from] reqwest::Error),
}

/// The authorities in `ssl-cert-file`. Without it this program's own: an image from scratch has no others.
fn roots(config: &Config) -> Result<RootCertStore, ClientError> {
    let Some(path) = &config.ssl_cert_file else {
        return Ok(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() });
    };
    let unreadable = |source| ClientError::Certificates { path: path.clone(), source };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
        roots
            .add(certificate.map_err(unreadable)?)
            .map_err(|source| ClientError::Certificate { path: path.clone(), source })?;
    }
    if roots.is_empty() {
        return Err(ClientError::NoCertificate { path: path.clone() });
    }
    Ok(roots)
}

/// A client that trusts what `config` says. Proxies come from the environment, as everywhere.
pub fn client(config: &Config) -> Result<Client, ClientError> {
    let roots = roots(config)?;
    let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connections = u32::try_from(config.http_connections).unwrap_or(u32::MAX);
    // More than HTTP/2 has room for is refused by the library.
    let window = STREAM_WINDOW.saturating_mul(connections.saturating_add(16)).min(i32::MAX.cast_unsigned());
    let limit = |time: Duration| (!time.is_zero()).then_some(time);
    let mut builder = Client::builder();
    // Zero means no limit, as in Nix.
    if let Some(time) = limit(config.connect_timeout) {
        builder = builder.connect_timeout(time);
    }
    // Between two reads, not for the whole: a large path may take as long as it needs.
    if let Some(time) = limit(config.stalled_download_timeout) {
        builder = builder.read_timeout(time);
    }
    Ok(builder
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("nix-csi/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::limited(5))
        // A download that waits for a restore thread holds what it was sent. All of them together must not
        // hold the whole connection, or those that run would starve.
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(window)
        // An address may hold a token.
        .referer(false)
        .pool_max_idle_per_host(config.http_connections)
        .build()?)
}
