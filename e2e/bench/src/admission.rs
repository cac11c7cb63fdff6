//! Reviews, as an API server sends them: over TLS, on connections that stay open.
//!
//! The router of the webhook and a handler that answers always the same are served by one thread each, in this process
//! and in the same way as `nix-csi-webhook` does it. So the CPU time of a review is that of its thread.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::routing::post;
use axum_server::tls_rustls::RustlsConfig;
use futures::future::try_join_all;
use nix_csi_certs::{Bundle, LiveCertificate};
use nix_csi_webhook::{Events, Metrics, ObjectRef, Origins, Owner, Policy, Reviewer, Serving, router};
use reqwest::Client;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::runtime::{Builder, Handle};

use crate::Filter;
use crate::limit::cpu_time;
use crate::report::{Against, Figure};
use crate::times::{Peer, Times};

/// How many reviews are sent one after the other in a round, and how many with others under way.
const ONE_BY_ONE: usize = 1000;
const TOGETHER: usize = 4000;
/// How many are under way then.
const AT_ONCE: usize = 16;
/// The size that is judged, in kB; the most milliseconds that a hundredth of its reviews may exceed, and how many
/// of them one core must answer in a second.
const JUDGED: usize = 6;
const P99_MILLISECONDS: f64 = 2.0;
const REVIEWS_PER_SECOND: f64 = 5000.0;

/// How many ReplicaSets the webhook knows.
const REPLICA_SETS: usize = 10_000;

const HOST: &str = "nix-csi-webhook.nix-csi.svc";
const FLOOR: &str = "always the same answer";

/// The pods: their size in kB, how many containers they have, and whether they ask for packages.
const CASES: [Case; 6] = [
    Case { kilobytes: 2, containers: 1, injected: true },
    Case { kilobytes: 6, containers: 2, injected: true },
    Case { kilobytes: 60, containers: 6, injected: true },
    Case { kilobytes: 2, containers: 1, injected: false },
    Case { kilobytes: 6, containers: 2, injected: false },
    Case { kilobytes: 60, containers: 6, injected: false },
];

#[derive(Clone, Copy)]
struct Case {
    kilobytes: usize,
    containers: usize,
    injected: bool,
}

/// Times and rates of one of the two servers.
#[derive(Default)]
struct Answers {
    times: Times,
    /// Reviews for each second of CPU.
    rates: Vec<f64>,
}

/// Measures the pods that are wanted.
pub(crate) fn measure(rounds: usize, filter: &Filter) -> Result<Vec<Figure>> {
    let cases: Vec<_> = CASES.into_iter().filter(|case| filter.wants(&case.name())).collect();
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    log_as_the_webhook_does()?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certificate = Arc::new(LiveCertificate::default());
    let bundle = Bundle::generate(&[HOST.to_owned()], OffsetDateTime::now_utc())?;
    certificate.set(&bundle)?;
    let serving = Serving {
        reviewer: Arc::new(reviewer()),
        certificate: Arc::clone(&certificate),
        since: Instant::now(),
    };
    let ours = Server::start(router(serving), &certificate, &bundle)?;
    let floor = Server::start(floor()?, &certificate, &bundle)?;

    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut figures = Vec::new();
    for case in cases {
        eprintln!("bench: {}", case.name());
        let body = case.review()?;
        let (mut of_ours, mut of_floor) = (Answers::default(), Answers::default());
        runtime.block_on(async {
            case.check(&ours.ask(&body).await?)?;
            for _ in 0..100 {
                ours.ask(&body).await?;
                floor.ask(&body).await?;
            }
            for _ in 0..rounds {
                for _ in 0..ONE_BY_ONE {
                    of_floor.times.of(floor.ask(&body)).await?;
                    of_ours.times.of(ours.ask(&body)).await?;
                }
                of_floor.rates.push(floor.rate(&body).await?);
                of_ours.rates.push(ours.rate(&body).await?);
            }
            anyhow::Ok(())
        })?;
        of_ours.times.tell("ours");
        of_floor.times.tell("floor");
        figures.extend(case.figures(&of_ours, &of_floor));
    }
    Ok(figures)
}

/// Each injection is a line in the webhook's log.
fn log_as_the_webhook_does() -> Result<()> {
    let log = File::options().write(true).open("/dev/null")?;
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new("info"))
        .json()
        .flatten_event(true)
        .with_writer(Mutex::new(log))
        .try_init();
    Ok(())
}

fn reviewer() -> Reviewer {
    Reviewer {
        policy: Policy {
            distroless: "gcr.io/distroless/static-debian12:latest".to_owned(),
            distroless_nonroot: "gcr.io/distroless/static-debian12:nonroot".to_owned(),
        },
        excluded: vec!["kube-system".to_owned(), "nix-csi".to_owned()],
        origins: Origins::fixed(&replica_sets(), Vec::new()),
        events: Events::none(),
        metrics: Metrics::default(),
    }
}

/// The owners that the webhook of a large cluster knows.
fn replica_sets() -> Vec<Owner> {
    let object = |n: usize| ObjectRef {
        api_version: "apps/v1".to_owned(),
        kind: "ReplicaSet".to_owned(),
        name: format!("web-{n}"),
        uid: format!("00000000-0000-4000-8000-{n:012}"),
    };
    (0..REPLICA_SETS).map(|n| Owner { object: object(n), ..Owner::default() }).collect()
}

/// Takes a review as the webhook does, and answers what is ready.
fn floor() -> Result<Router> {
    let answer = Bytes::from(serde_json::to_vec(&json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "response": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "allowed": true,
            "auditAnnotations": {"decision": "none"},
        },
    }))?);
    let handler = move |body: Bytes| async move {
        drop(body);
        ([(CONTENT_TYPE, "application/json")], answer)
    };
    Ok(Router::new().route("/mutate", post(handler)))
}

/// A server with a thread of its own, and a client that keeps its connection.
struct Server {
    address: SocketAddr,
    thread: Handle,
    client: Client,
}

impl Server {
    fn start(app: Router, certificate: &Arc<LiveCertificate>, bundle: &Bundle) -> Result<Self> {
        let tls = RustlsConfig::from_config(Arc::new(certificate.server_config()?));
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (sender, started) = mpsc::channel();
        std::thread::spawn(move || -> Result<()> {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                sender.send(Handle::current())?;
                Ok(axum_server::from_tcp_rustls(listener, tls)?.serve(app.into_make_service()).await?)
            })
        });
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(bundle.ca_crt.as_bytes())?)?;
        let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        // As an API server asks.
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .resolve(HOST, address)
            .timeout(Duration::from_secs(10))
            .build()?;
        Ok(Self { address, thread: started.recv().context("a server did not start")?, client })
    }

    /// Sends a review and waits for all of the answer.
    async fn ask(&self, body: &Bytes) -> Result<Bytes> {
        let url = format!("https://{HOST}:{}/mutate?timeout=3s", self.address.port());
        let request = self.client.post(url).header(CONTENT_TYPE, "application/json").body(body.clone());
        Ok(request.send().await?.error_for_status()?.bytes().await?)
    }

    /// Seconds of CPU that the server's thread has had.
    async fn cpu(&self) -> Result<f64> {
        Ok(self.thread.spawn(async { cpu_time() }).await?)
    }

    /// How many reviews one core answers in a second, when there is always something to do.
    async fn rate(&self, body: &Bytes) -> Result<f64> {
        let before = self.cpu().await?;
        let client = || async {
            for _ in 0..TOGETHER / AT_ONCE {
                self.ask(body).await?;
            }
            anyhow::Ok(())
        };
        try_join_all((0..AT_ONCE).map(|_| client())).await?;
        let took = self.cpu().await? - before;
        #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
        let reviews = (TOGETHER / AT_ONCE * AT_ONCE) as f64;
        Ok(reviews / took)
    }
}

impl Case {
    fn name(self) -> String {
        let what = if self.injected { "injected" } else { "left alone" };
        format!("admission, {} kB, {what}", self.kilobytes)
    }

    fn figures(self, ours: &Answers, floor: &Answers) -> Vec<Figure> {
        let name = self.name();
        let is_judged = self.kilobytes == JUDGED;
        let mut figures = Vec::new();
        if is_judged {
            figures.extend(ours.times.within(&name, [None, Some(P99_MILLISECONDS)]));
        }
        let peer = Peer { name: FLOOR, times: &floor.times, budgets: [None, None] };
        figures.extend(ours.times.beside(&name, &peer));
        let rate = |peer: &str, budget| Against {
            name: format!("{name}: reviews per second of a core, {peer}"),
            peer_name: peer.to_owned(),
            budget,
        };
        if is_judged {
            let limit = format!("limit: {REVIEWS_PER_SECOND}/s");
            figures.extend(Figure::of_rates(
                rate(&limit, Some(1.0)),
                "1/s",
                &ours.rates,
                &[REVIEWS_PER_SECOND],
            ));
        }
        figures.extend(Figure::of_rates(rate(FLOOR, None), "1/s", &ours.rates, &floor.rates));
        figures
    }

    /// Whether the answer is what this pod must get.
    fn check(self, answer: &Bytes) -> Result<()> {
        let answer: Value = serde_json::from_slice(answer)?;
        let response = &answer["response"];
        ensure!(
            response["allowed"] == true && response["patch"].is_null() != self.injected,
            "{}: {answer}",
            self.name()
        );
        Ok(())
    }

    /// The review of a new pod.
    fn review(self) -> Result<Bytes> {
        let mut variables = 0;
        // As many variables as it takes.
        let pod = loop {
            let pod = self.pod(variables);
            if serde_json::to_vec(&pod)?.len() >= self.kilobytes * 1000 {
                break pod;
            }
            variables += 1;
        };
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
                "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "resource": {"group": "", "version": "v1", "resource": "pods"},
                "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
                "requestResource": {"group": "", "version": "v1", "resource": "pods"},
                "namespace": "shop", "operation": "CREATE",
                "userInfo": {
                    "username": "system:serviceaccount:kube-system:replicaset-controller",
                    "groups": ["system:serviceaccounts", "system:authenticated"],
                },
                "object": pod, "oldObject": null, "dryRun": false,
                "options": {"apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions"},
            },
        });
        Ok(Bytes::from(serde_json::to_vec(&review)?))
    }

    /// A pod as a ReplicaSet makes it and the API server completes it, with `variables` in its environments.
    fn pod(self, variables: usize) -> Value {
        let container = |n: usize| {
            let of_this = (0..variables).filter(|variable| variable % self.containers == n);
            let environment: Vec<_> = of_this
                .map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("value of setting {n}")}))
                .collect();
            json!({
                "name": format!("container-{n}"), "image": "registry.example/shop/web:1.27",
                "command": ["web", "--listen", "0.0.0.0:8080"],
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "env": environment,
                "resources": {
                    "limits": {"memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"},
                },
                "volumeMounts": [{
                    "name": "kube-api-access-x7x2p", "readOnly": true,
                    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                }],
                "readinessProbe": {
                    "httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"},
                    "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3,
                },
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "imagePullPolicy": "IfNotPresent",
            })
        };
        let mut annotations =
            json!({"checksum/config": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61c"});
        if self.injected {
            annotations["nix.lillecarl.com/packages"] = json!(
                "/nix/store/00000000000000000000000000000001-web-1.27\n\
                 /nix/store/00000000000000000000000000000002-bash-5.2\n\
                 /nix/store/00000000000000000000000000000003-coreutils-9.5\n"
            );
        }
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "generateName": "web-7f9c6d5b8-", "namespace": "shop",
                "labels": {"app": "web", "pod-template-hash": "7f9c6d5b8"},
                "annotations": annotations,
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7f9c6d5b8",
                    "uid": "5bf2d0a5-1c6c-4f8e-a3a4-52d2fcb3a1aa",
                    "controller": true, "blockOwnerDeletion": true,
                }],
            },
            "spec": {
                "containers": (0..self.containers).map(container).collect::<Vec<_>>(),
                "volumes": [{"name": "kube-api-access-x7x2p", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                ]}}],
                "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
                "serviceAccountName": "default", "serviceAccount": "default",
                "securityContext": {}, "schedulerName": "default-scheduler", "priority": 0,
                "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority",
                "tolerations": [
                    {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                    {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                ],
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_is_as_large_as_it_says_and_is_answered_as_it_says() {
        let (reviewer, runtime) = (reviewer(), Builder::new_current_thread().build().unwrap());
        for case in CASES {
            let body = case.review().unwrap();
            let size = body.len() - case.kilobytes * 1000;
            assert!((500..1800).contains(&size), "{}: {size}", case.name());
            let review = nix_csi_webhook::review(&reviewer, nix_csi_webhook::Entry::Pod, &body);
            let answer = serde_json::to_vec(&runtime.block_on(review)).unwrap();
            case.check(&Bytes::from(answer)).unwrap();
        }
    }
}
