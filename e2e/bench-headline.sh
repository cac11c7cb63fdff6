#!/usr/bin/env bash
# bench-headline.sh
#
# The same ten sets of packages as container images and as volumes of nix-csi, on one node: bytes on the disk, page
# cache, and how long pods take to run. Starts a cluster of its own, prints a table and adds to target/bench.json.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
cd "$e2e/.."
mkdir -p target/e2e
NIX_CSI_CLUSTER_STATE=$(realpath "${NIX_CSI_CLUSTER_STATE:-target/e2e/bench-cluster}")
NIX_CSI_FIXTURES=$("$e2e/fixtures/build.sh")
export NIX_CSI_CLUSTER_STATE NIX_CSI_FIXTURES
# With the flags of bench.sh, so that it is built once.
triple=x86_64-unknown-linux-gnu
RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$triple" -p nix-csi-bench

"$e2e/cluster" down >&2
trap '"$e2e/cluster" down --purge >&2' EXIT
"$e2e/cluster" up --caches "$NIX_CSI_FIXTURES/caches" >&2
"$e2e/install.sh"
"${CARGO_TARGET_DIR:-target}/$triple/release/nix-csi-bench" headline \
  --work "$NIX_CSI_CLUSTER_STATE/images" --json "$PWD/target/bench.json"
