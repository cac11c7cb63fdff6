#!/bin/bash
# Takes nix-csi off a cluster: first the webhook, so that no new pod gets a volume, then the driver.
#
#   uninstall.sh [--delete-node-data]
#
# Refuses while pods still use volumes: without a driver they could not end. What nodes have fetched stays in
# /var/lib/nix-csi unless --delete-node-data says otherwise. May be called again after it was interrupted.
# Set KUBECTL to use another kubectl or context.
set -euo pipefail

manifests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -r -a kubectl <<<"${KUBECTL:-kubectl}"
# `command`: the name in the array may be this function's own.
kubectl() { command "${kubectl[@]}" "$@"; }

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
        echo "uninstall: $1" >&2
        exit 1
    }
}

delete() { kubectl delete --ignore-not-found --wait "$@"; }

# The driver's image can delete node data; found here, while there is still something that names it.
image=$(kubectl -n nix-csi get daemonset nix-csi-node nix-csi-delete-node-data --ignore-not-found \
    -o 'jsonpath={.items[0].spec.template.spec.containers[0].image}')
[[ -z $delete_node_data || -n $image ]] ||
    { echo "uninstall: no driver is installed, so nothing can delete node data" >&2; exit 1; }
refuse_while_used "nothing was changed"
delete mutatingwebhookconfiguration 00-nix-csi
# Somebody may have been admitted in between.
refuse_while_used "only the webhook's configuration was removed; applying the manifests again restores it"
delete -n nix-csi deployment,poddisruptionbudget,service nix-csi-webhook
# What the driver serves, and its sockets, go when it is told to end.
delete -n nix-csi daemonset nix-csi-node --cascade=foreground --timeout=5m ||
    echo "uninstall: not every node answers; its driver goes when it does" >&2
if [[ -n $delete_node_data ]]; then
    sed "s|image: nix-csi-node|image: $image|" "$manifests/delete-node-data.yaml" | kubectl apply -f -
    kubectl -n nix-csi rollout status daemonset/nix-csi-delete-node-data --timeout=10m || {
        echo "uninstall: data is still on the nodes of these pods; call again when they answer:" >&2
        kubectl -n nix-csi get pods -l app.kubernetes.io/component=delete-node-data -o wide >&2
        exit 1
    }
    delete -n nix-csi daemonset nix-csi-delete-node-data --cascade=foreground --timeout=5m
fi
delete csidriver nix-csi.lillecarl.com
delete customresourcedefinition imagemaps.nix.lillecarl.com
delete validatingadmissionpolicybinding,validatingadmissionpolicy nix-csi-owner-annotations nix-csi-node-startup-taint
delete clusterrolebinding nix-csi-webhook nix-csi-webhook-owners nix-csi-node nix-csi-node-startup-taint
delete clusterrole nix-csi-webhook nix-csi-webhook-owners nix-csi-webhook-owners-of-kubernetes nix-csi-node \
    nix-csi-node-startup-taint
# If overlays/guard is installed.
delete validatingadmissionpolicybinding,validatingadmissionpolicy nix-csi-guard-pods nix-csi-guard-namespaces
delete clusterrole nix-csi-user nix-csi-namespace-admin
delete namespace nix-csi
echo "uninstall: nix-csi is off this cluster"
[[ -n $delete_node_data ]] || echo "uninstall: nodes keep what they fetched in /var/lib/nix-csi"
