#!/bin/bash
# Takes nix-csi off a cluster: first the webhook, so that no new pod gets a volume, then the driver.
#
#   uninstall.sh [--delete-node-data]
#
# Refuses, and changes nothing, while pods still use volumes: without a driver they could not end. What nodes
# have fetched stays in /var/lib/nix-csi unless --delete-node-data says otherwise.
# Set KUBECTL to use another kubectl or context.
set -euo pipefail

manifests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -r -a kubectl <<<"${KUBECTL:-kubectl}"
kubectl() { "${kubectl[@]}" "$@"; }

delete_node_data=
case ${1:-} in
    '') ;;
    --delete-node-data) delete_node_data=yes ;;
    *) echo "usage: uninstall.sh [--delete-node-data]" >&2; exit 2 ;;
esac

# One line a pod. Ended pods count too: their volumes are unpublished when they are deleted.
pods_with_volumes() {
    kubectl get pods --all-namespaces -o go-template='{{range $pod := .items}}{{range .spec.volumes}}{{if .csi}}{{if eq .csi.driver "nix-csi.lillecarl.com"}}{{$pod.metadata.namespace}}/{{$pod.metadata.name}}{{"\n"}}{{end}}{{end}}{{end}}{{end}}' | sort -u
}

refuse_while_used() {
    local pods
    pods=$(pods_with_volumes)
    [[ -z $pods ]] || {
        echo "uninstall: these pods still use nix-csi volumes; delete them or their owners first:" >&2
        echo "$pods" >&2
        exit 1
    }
}

delete() { kubectl delete --ignore-not-found --wait "$@"; }

refuse_while_used
delete mutatingwebhookconfiguration 00-nix-csi
# Somebody may have been admitted in between.
refuse_while_used
delete -n nix-csi deployment,poddisruptionbudget,service nix-csi-webhook
# What the driver serves, and its sockets, go when it is told to end.
image=$(kubectl -n nix-csi get daemonset nix-csi-node --ignore-not-found \
    -o 'jsonpath={.spec.template.spec.containers[0].image}')
delete -n nix-csi daemonset nix-csi-node --cascade=foreground
if [[ -n $delete_node_data ]]; then
    [[ -n $image ]] || { echo "uninstall: no driver is installed, so nothing can delete node data" >&2; exit 1; }
    sed "s|image: nix-csi-node|image: $image|" "$manifests/delete-node-data.yaml" | kubectl apply -f -
    kubectl -n nix-csi rollout status daemonset/nix-csi-delete-node-data --timeout=10m
    delete -n nix-csi daemonset nix-csi-delete-node-data --cascade=foreground
fi
delete csidriver nix-csi.lillecarl.com
delete clusterrolebinding,clusterrole nix-csi-webhook
delete namespace nix-csi
echo "uninstall: nix-csi is off this cluster"
[[ -n $delete_node_data ]] || echo "uninstall: nodes keep what they fetched in /var/lib/nix-csi"
