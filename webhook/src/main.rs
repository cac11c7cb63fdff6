//! `nix-csi-webhook`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    nix_csi_webhook::run(nix_csi_webhook::Args::parse())
}
