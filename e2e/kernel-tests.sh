#!/bin/bash
# Tests against the real kernel, real Nix and csi-sanity, in a mount namespace that ends with them.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NIX_CSI_FIXTURES=$("$e2e/fixtures/build.sh")
CSI_SANITY=$("$e2e/kube/build.sh" csi-sanity)/csi-sanity
export NIX_CSI_FIXTURES CSI_SANITY
cd "$e2e/.."
cargo build --locked -p nix-csi-node
exec unshare --mount --propagation private \
    cargo test --locked -p nix-csi-e2e --lib --test store --test caches --test tls --test tenancy --test churn --test kills --test gc --test nix_inside --test hostile --test recovery --test repair --test differential --test driver "$@"
