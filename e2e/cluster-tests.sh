#!/bin/bash
# The tests on a real Kubernetes: a cluster of their own, nix-csi installed into it, and afterwards nothing.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NIX_CSI_CLUSTER_STATE=${NIX_CSI_CLUSTER_STATE:-$e2e/../target/e2e/test-cluster}
NIX_CSI_FIXTURES=$("$e2e/fixtures/build.sh")
export NIX_CSI_FIXTURES
cd "$e2e/.."
cargo test --locked -p nix-csi-e2e --no-run
"$e2e/cluster" down >&2

# What a cluster could leave on the machine, or change there.
machine() {
    cat /proc/self/mountinfo | sort
    ip -o address
    ip route show table all
    # Rules only: tables appear when their kernel module is loaded, by whomever.
    iptables-save | grep '^-' || true
    find /sys/fs/cgroup -type d -name '*nix-csi*'
    find /var/lib/kubelet /var/lib/nix-csi /var/lib/containerd /run/containerd /etc/cni /opt/cni 2>/dev/null || true
}
before=$(machine)

trap '"$e2e/cluster" down --purge >&2' EXIT
caches=$("$e2e/cluster-caches.sh")
"$e2e/cluster" up --caches "$caches" >&2
"$e2e/install.sh"
# On two cores, more at once only makes each of them slower.
cargo test --locked -p nix-csi-e2e --test cluster --test adopt --test real_world -- --test-threads=4 "$@"
# Last, and alone: it takes nix-csi away.
cargo test --locked -p nix-csi-e2e --test uninstall

"$e2e/cluster" down >&2
diff <(echo "$before") <(machine) || { echo "cluster-tests.sh: the cluster changed the machine" >&2; exit 1; }
