#!/bin/bash
# Tests against the real kernel, real Nix and csi-sanity, in a mount namespace that ends with them.
set -euo pipefail

programs=(
    store
    caches
    tls
    tenancy
    churn
    kills
    gc
    volumes
    limits
    views
    nix_inside
    hostile
    recovery
    repair
    differential
    driver
)

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NIX_CSI_FIXTURES=$("$e2e/fixtures/build.sh")
CSI_SANITY=$("$e2e/kube/build.sh" csi-sanity)/csi-sanity
export NIX_CSI_FIXTURES CSI_SANITY
cd "$e2e/.."
cargo build --locked -p nix-csi-node
exec unshare --mount --propagation private \
    cargo test --locked -p nix-csi-e2e --lib "${programs[@]/#/--test=}" "$@"
