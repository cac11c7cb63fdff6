#!/bin/bash
# Installs nix-csi from this checkout into the running test cluster and waits until it serves.
#
# Needs: e2e/cluster up, make images. The caches are the fixtures, as the cluster serves them.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$e2e")
fixtures=$("$e2e/fixtures/build.sh")
kubectl() { "$e2e/cluster" kubectl "$@"; }

for program in nix-csi-node nix-csi-webhook; do
    [[ -e $repo/target/images/$program.tar ]] ||
        { echo "install.sh: target/images/$program.tar is missing; run make images" >&2; exit 1; }
    "$e2e/cluster" load "$repo/target/images/$program.tar" >&2
done
cat >"$repo/manifests/overlays/e2e/nix.conf" <<CONF
substituters = http://10.90.0.1:8080/zstd http://10.90.0.1:8080/private http://10.90.0.1:8080/slow
trusted-public-keys = $(cat "$fixtures/keys/nix-csi-test-1.pub")
download-attempts = 2
min-free = 0
CONF
installed=$(kubectl -n nix-csi get daemonset nix-csi-node --ignore-not-found -o name)
kubectl apply -k "$repo/manifests/overlays/e2e" >&2
# The tag of the images never changes, so nothing else would tell the pods that there are new ones.
[[ -z $installed ]] || kubectl -n nix-csi rollout restart daemonset/nix-csi-node deployment/nix-csi-webhook >&2
kubectl -n nix-csi rollout status daemonset/nix-csi-node --timeout=60s >&2
kubectl -n nix-csi rollout status deployment/nix-csi-webhook --timeout=60s >&2
# Ready pods are not yet a caBundle that the API server uses, nor a Service that kube-proxy leads to them: only an
# answer to a review shows both. The review is of a pod that must be refused, and by us.
reviewed() {
    local said
    said=$(kubectl run probe --dry-run=server --image=none --annotations=nix.lillecarl.com/packages=probe 2>&1) || true
    [[ $said == *'"probe" is not a store path'* ]]
}
for _ in $(seq 100); do
    driver=$(kubectl get csinode node-1 -o 'jsonpath={.spec.drivers[*].name}')
    [[ $driver != *nix-csi.lillecarl.com* ]] || ! reviewed || exit 0
    sleep 0.2
done
echo "install.sh: the webhook answers no review, or kubelet does not know the driver (it knows: ${driver:-none})" >&2
exit 1
