//! The systems that a store path can be for, in Nix's words.

use std::fmt;
use std::str::FromStr;

/// Not a system that a node can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a system; known are x86_64-linux, aarch64-linux, armv7l-linux and riscv64-linux")]
pub struct ParseSystemError(String);

/// What Nix calls the machine and kernel of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum System {
    /// Kubernetes: `amd64`.
    X86_64Linux,
    /// Kubernetes: `arm64`.
    Aarch64Linux,
    /// Kubernetes: `arm`.
    Armv7lLinux,
    /// Kubernetes: `riscv64`.
    Riscv64Linux,
}

impl System {
    /// Every system.
    pub const ALL: [Self; 4] = [Self::X86_64Linux, Self::Aarch64Linux, Self::Armv7lLinux, Self::Riscv64Linux];

    /// The name, as in Nix and as key of a volume attribute.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86_64Linux => "x86_64-linux",
            Self::Aarch64Linux => "aarch64-linux",
            Self::Armv7lLinux => "armv7l-linux",
            Self::Riscv64Linux => "riscv64-linux",
        }
    }

    /// The system this program was compiled for.
    pub const fn current() -> Self {
        match std::env::consts::ARCH.as_bytes() {
            b"aarch64" => Self::Aarch64Linux,
            b"arm" => Self::Armv7lLinux,
            b"riscv64" => Self::Riscv64Linux,
            _ => Self::X86_64Linux,
        }
    }
}

impl FromStr for System {
    type Err = ParseSystemError;

    fn from_str(text: &str) -> Result<Self, ParseSystemError> {
        Self::ALL
            .into_iter()
            .find(|system| system.as_str() == text)
            .ok_or_else(|| ParseSystemError(text.to_owned()))
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
