//! The HTTP client for binary caches.

use reqwest::Client;
use reqwest::redirect::Policy;
use rustls::{ClientConfig, RootCertStore};

use crate::config::Config;

/// A client with this program's own certificate authorities: an image from scratch has no others.
///
/// Proxies come from the environment, as everywhere.
pub fn client(config: &Config) -> reqwest::Result<Client> {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("nix-csi/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(config.connect_timeout)
        // Between two reads, not for the whole: a large path may take as long as it needs.
        .read_timeout(config.stalled_download_timeout)
        .redirect(Policy::limited(5))
        .pool_max_idle_per_host(config.http_connections)
        .build()
}
