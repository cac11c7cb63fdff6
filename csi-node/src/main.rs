//! `nix-csi-node`: the driver, and its parts by hand.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    nix_csi_node::run(nix_csi_node::Args::parse())
}
