//! Keeps Secret, serving certificate and `caBundle` in agreement.

use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE64;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhook, MutatingWebhookConfiguration};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use time::OffsetDateTime;

use crate::bundle::{Bundle, BundleError, Due};
use crate::resolver::LiveCertificate;

/// Checked by the wall clock and often: a long sleep does not notice that a machine was suspended.
const INTERVAL: Duration = Duration::from_secs(10);
/// The first pause after something failed.
const RETRY: Duration = Duration::from_millis(200);
const FIELD_MANAGER: &str = "nix-csi-webhook-ca";

/// Why the certificates are not in order.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The API server.
    #[error("cannot {op} {name}")]
    Api {
        /// What was tried.
        op: &'static str,
        /// On which object.
        name: String,
        /// What it said.
        source: kube::Error,
    },
    /// The certificates.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Who keeps the certificates of one webhook.
pub struct Keeper {
    client: Client,
    namespace: String,
    secret: String,
    configuration: String,
    names: Vec<String>,
    live: Arc<LiveCertificate>,
}

impl Keeper {
    /// For the webhook behind `service` in `namespace`, whose configuration object is `configuration`.
    pub fn new(
        client: Client,
        namespace: &str,
        service: &str,
        secret: &str,
        configuration: &str,
        live: Arc<LiveCertificate>,
    ) -> Self {
        // The first is what the API server verifies for a service reference.
        let names = ["svc", "svc.cluster.local"].map(|domain| format!("{service}.{namespace}.{domain}"));
        Self {
            client,
            namespace: namespace.to_owned(),
            secret: secret.to_owned(),
            configuration: configuration.to_owned(),
            names: names.into(),
            live,
        }
    }

    /// Looks after the certificates for ever. What fails is tried again; what is served stays.
    pub async fn run(self) {
        let mut retry = RETRY;
        loop {
            match self.check().await {
                Ok(()) => {
                    retry = RETRY;
                    tokio::time::sleep(INTERVAL).await;
                }
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "certificates are not in order");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(INTERVAL);
                }
            }
        }
    }

    /// Makes everything agree, once. API servers learn of a new CA before anybody serves with it.
    pub async fn check(&self) -> Result<(), KeeperError> {
        let bundle = self.ensure_secret().await?;
        let told = self.ensure_ca_bundle(&bundle).await;
        // A certificate that is not trusted yet is still better than none.
        self.live.set(&bundle)?;
        told
    }

    /// What the Secret holds, after making or renewing it if need be.
    async fn ensure_secret(&self) -> Result<Bundle, KeeperError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let api = |op| {
            let name = format!("secret {}/{}", self.namespace, self.secret);
            move |source| KeeperError::Api { op, name, source }
        };
        loop {
            let now = OffsetDateTime::now_utc();
            let found = secrets.get_opt(&self.secret).await.map_err(api("read"))?;
            let old = found.as_ref().and_then(|secret| {
                let data = secret.data.as_ref()?;
                Bundle::from_data(|key| data.get(key).map(|bytes| bytes.0.as_slice())).ok()
            });
            let new = match old.as_ref().map(|bundle| (bundle, bundle.due(&self.names, now))) {
                Some((bundle, Due::Nothing)) => return Ok(bundle.clone()),
                // A CA whose key is damaged cannot sign: then it is as good as none.
                Some((bundle, Due::NewCertificate)) => {
                    bundle.renew(&self.names, now).or_else(|_| Bundle::generate(&self.names, now))?
                }
                Some((_, Due::NewAuthority)) | None => Bundle::generate(&self.names, now)?,
            };
            let wanted = |resource_version| Secret {
                metadata: ObjectMeta {
                    name: Some(self.secret.clone()),
                    namespace: Some(self.namespace.clone()),
                    labels: Some([("app.kubernetes.io/part-of".to_owned(), "nix-csi".to_owned())].into()),
                    resource_version,
                    ..ObjectMeta::default()
                },
                string_data: Some(new.to_data()),
                type_: Some("kubernetes.io/tls".to_owned()),
                ..Secret::default()
            };
            let written = match found {
                None => secrets.create(&PostParams::default(), &wanted(None)).await,
                Some(found) => {
                    let secret = wanted(found.metadata.resource_version);
                    secrets.replace(&self.secret, &PostParams::default(), &secret).await
                }
            };
            match written {
                Ok(_) => {
                    tracing::info!(secret = self.secret, "wrote a new certificate");
                    return Ok(new);
                }
                // Another replica was faster: what it wrote is as good.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(api("write")(error)),
            }
        }
    }

    async fn ensure_ca_bundle(&self, bundle: &Bundle) -> Result<(), KeeperError> {
        let configurations: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let api = |op| {
            let name = format!("mutatingwebhookconfiguration {}", self.configuration);
            move |source| KeeperError::Api { op, name, source }
        };
        let found = configurations.get(&self.configuration).await.map_err(api("read"))?;
        let webhooks = found.webhooks.unwrap_or_default();
        let present = |w: &MutatingWebhook| w.client_config.ca_bundle.as_ref().map(|ca| ca.0.clone());
        let ours = bundle.ca_crt.trim();
        let has_ours = |ca: Vec<u8>| String::from_utf8_lossy(&ca).contains(ours);
        if webhooks.iter().all(|w| present(w).is_some_and(has_ours)) {
            return Ok(());
        }
        // The one before stays beside it: other replicas may serve with it for a moment.
        let before = webhooks.iter().find_map(present).unwrap_or_default();
        let before = newest_certificate(&String::from_utf8_lossy(&before));
        let ca = BASE64.encode(format!("{ours}\n{before}").as_bytes());
        let webhooks: Vec<_> = webhooks
            .iter()
            .map(|w| serde_json::json!({ "name": w.name, "clientConfig": { "caBundle": ca } }))
            .collect();
        let patch = serde_json::json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "webhooks": webhooks,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        configurations
            .patch(&self.configuration, &params, &Patch::Apply(patch))
            .await
            .map_err(api("write caBundle of"))?;
        tracing::info!(configuration = self.configuration, "wrote caBundle");
        Ok(())
    }
}

/// The first certificate of a bundle: new ones are put before old ones.
fn newest_certificate(bundle: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    bundle.find(END).map(|at| format!("{}\n", bundle[..at + END.len()].trim())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_older_authority_is_kept() {
        let pem = |text: &str| format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
        assert_eq!(newest_certificate(&format!("{}{}", pem("b"), pem("a"))), pem("b"));
        assert_eq!(newest_certificate(""), "");
        assert_eq!(newest_certificate("Cg=="), "");
    }
}
