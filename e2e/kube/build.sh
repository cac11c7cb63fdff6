#!/bin/bash
# Builds the Kubernetes programs the test cluster runs, from the Go modules
# pinned beside this file, and prints the directory that holds them.
#
#   build.sh [1.36|1.34|csi-sanity]
#
# The result is kept in the per-user cache under a name made from everything
# that decides it, so a second call costs milliseconds. A cold build takes about
# 15 CPU minutes and leaves 3 GB in Go's build cache.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
which=${1:-1.36}
module=$here/$which

die() { echo "kube/build.sh: $*" >&2; exit 1; }

[[ -f $module/go.mod && -f $module/go.sum ]] ||
    die "no $which here; there is: $(cd "$here" && echo */ | tr -d /)"

# The version a go.mod requires of a module.
required_version() { awk -v m="$1" '$1 == m && $2 ~ /^v/ { print $2; exit }' "$module/go.mod"; }

ldflags='-s -w'
if [[ $which == csi-sanity ]]; then
    version=$(required_version github.com/kubernetes-csi/csi-test/v5)
    prefix=csi-sanity
    packages=(github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity)
else
    version=$(required_version k8s.io/kubernetes)
    prefix=kube
    packages=(k8s.io/kubernetes/cmd/{kube-apiserver,kubelet,kube-controller-manager,kube-scheduler,kube-proxy,kubectl})
    # Without these the programs call themselves v0.0.0 and kubelet's
    # version skew check refuses them.
    IFS=. read -r major minor _ <<<"${version#v}"
    for variable in "gitVersion=$version" "gitMajor=$major" "gitMinor=$minor" gitTreeState=clean; do
        ldflags+=" -X k8s.io/component-base/version.$variable -X k8s.io/client-go/pkg/version.$variable"
    done
fi
flags=(-mod=readonly -trimpath -buildvcs=false -ldflags "$ldflags")

key=$({ cat "$module/go.mod" "$module/go.sum"; printf '%s\n' "${flags[@]}" "${packages[@]}"; } | sha256sum)
result=$cache/$prefix-${version#v}-${key:0:16}

if [[ ! -d $result ]]; then
    command -v go >/dev/null || die "go is missing; see e2e/setup.sh"
    mkdir -p "$cache"
    # One build at a time: two would fight for the same processors, and the
    # second finds the first one's result.
    exec 9>"$cache/kube-build.lock"
    flock 9
    if [[ ! -d $result ]]; then
        echo "kube/build.sh: building $which ($version); minutes when Go's cache is cold" >&2
        # The final name appears only by rename, so it always means a whole build.
        work=$(mktemp -d "$cache/.building.XXXXXX")
        trap 'rm -rf -- "$work"' EXIT
        (cd "$module" && CGO_ENABLED=0 GOWORK=off GOFLAGS='' go build "${flags[@]}" -o "$work/" "${packages[@]}") >&2 9>&-
        chmod 755 "$work"
        mv -T "$work" "$result"
    fi
fi
echo "$result"
