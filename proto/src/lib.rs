//! Every contract between processes: what people write on their objects, what the webhook writes into a
//! volume and the node reads, the two gRPC interfaces between kubelet and the node, and the one by which commands ask
//! the driver.
//!
//! Parsers stand beside the keys they parse, so that webhook and node cannot disagree. Nothing here does
//! I/O.

pub mod annotations;
mod quantity;
mod references;
mod system;
pub mod volume;

pub use quantity::parse_quantity;
pub use references::{Item, ParseReferencesError, Reference, References};
pub use system::{ParseSystemError, System};

/// The name of the CSIDriver object and of the driver that registers with kubelet.
pub const DRIVER_NAME: &str = "nix-csi.lillecarl.com";

/// The Container Storage Interface, generated.
#[cfg(feature = "grpc")]
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// kubelet's plugin registration, generated.
#[cfg(feature = "grpc")]
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// What commands ask of a running driver, generated.
#[cfg(feature = "grpc")]
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod control {
    tonic::include_proto!("nixcsi.control.v1");
}
