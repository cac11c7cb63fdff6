#!/bin/bash
# nix-csi from nothing: a cluster, an ordinary Deployment, one annotation.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NIX_CSI_CLUSTER_STATE=${NIX_CSI_CLUSTER_STATE:-$e2e/../target/e2e/demo-cluster}
kubectl() { "$e2e/cluster" kubectl "$@"; }
say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

fixtures=$("$e2e/fixtures/build.sh")
path() { jq -r --arg name "$1" '.[$name].path' "$fixtures/paths.json"; }
hello=$(path hello) bash=$(path bash) coreutils=$(path coreutils) python=$(path python3)

say "A Kubernetes of one node, and nix-csi in it"
"$e2e/cluster" down
trap '[[ -n ${KEEP:-} ]] || "$e2e/cluster" down --purge' EXIT
"$e2e/cluster" up --caches "$fixtures/caches"
"$e2e/install.sh" 2>/dev/null
run kubectl -n nix-csi get pods

say "An ordinary Deployment. Its image has no hello in it, so it cannot run what it is told to"
kubectl apply -f - <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: web
          image: localhost/busybox:1
          command: [bash, -c, "while hello; do sleep 2; done"]
YAML
sleep 4
run kubectl get pods -l app=web
read -r -a broken <<<"$(kubectl get pods -l app=web -o 'jsonpath={.items[*].metadata.name}')"

say "One annotation on its pod template"
patch=$(jq -n --arg packages "$hello $bash $coreutils" \
    '{spec: {template: {metadata: {annotations: {"nix.lillecarl.com/packages": $packages}}}}}')
run kubectl patch deployment web --patch "$patch"
kubectl rollout status deployment/web --timeout=120s >/dev/null
# The pods that could not start take a moment to go.
kubectl wait --for=delete pod "${broken[@]}" --timeout=60s >/dev/null
run kubectl get pods -l app=web
run kubectl logs deployment/web --tail=2
run kubectl get pods -l app=web -o 'jsonpath={.items[0].spec.containers[0].image}{"\n"}{.items[0].spec.volumes[*].csi}{"\n"}'

say "A pod that writes below /nix: only it sees what it writes"
kubectl apply -f - <<YAML
apiVersion: v1
kind: Pod
metadata:
  name: writer
  annotations:
    nix.lillecarl.com/mode: rw
    nix.lillecarl.com/packages: $bash $coreutils
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: any
      command: [bash, -c, "echo mine > /nix/store/note; ls -l /nix/store/note; sleep 1000"]
YAML
run kubectl wait --for=condition=Ready pod/writer --timeout=60s
run kubectl logs writer
run kubectl exec deployment/web -- ls /nix/store/note || true

say "Two pods, one inode: one copy on disk and in memory"
for pod in $(kubectl get pods -l app=web -o 'jsonpath={.items[0:2].metadata.name}'); do
    run kubectl exec "$pod" -- stat --format='inode %i  links %h  %n' "$hello/bin/hello"
done

say "python3 with its library, by its annotation and nothing else: no command, no image of its own"
kubectl apply -f - <<YAML
apiVersion: v1
kind: Pod
metadata:
  name: python
  annotations:
    nix.lillecarl.com/packages: $python/bin/python3
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: any
      args: [-c, "import json, sqlite3, sys; print(json.dumps({'python': sys.version.split()[0], 'sqlite': sqlite3.sqlite_version}))"]
YAML
run kubectl wait --for=jsonpath='{.status.phase}'=Succeeded pod/python --timeout=120s
run kubectl logs python

say "A mistake is told to whoever made it"
run kubectl run oops --image=any --annotations=nix.lillecarl.com/packages=hello || true

say "Everything deleted, nothing left on the node; real Nix verifies the store"
run kubectl delete deployment/web pod/writer pod/python --wait
for _ in $(seq 100); do
    left=$("$e2e/cluster" exec sh -c 'ls /var/lib/nix-csi/volumes; grep -c nix-csi /proc/self/mountinfo | grep -v "^1$"' || true)
    [[ -n $left ]] || break
    sleep 0.3
done
run "$e2e/cluster" exec sh -c 'ls -A /var/lib/nix-csi/volumes | wc -l'
node_root=$NIX_CSI_CLUSTER_STATE/node/var-lib/nix-csi
run "$e2e/fixtures/nix.sh" nix-store --store "$(realpath "$node_root")" --verify --check-contents
say "Done. KEEP=1 make demo keeps the cluster; e2e/cluster says how to use it"
