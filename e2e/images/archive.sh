#!/bin/bash
# Builds a Containerfile into an OCI archive that `e2e/cluster load` takes.
#
#   archive.sh CONTAINERFILE CONTEXT NAME OUT.tar
#
# No daemon and no registry, hence only `FROM scratch`. The archive appears whole
# or not at all.
set -euo pipefail

if [[ $# -ne 4 ]]; then
    echo "usage: archive.sh CONTAINERFILE CONTEXT NAME OUT.tar" >&2
    exit 2
fi
containerfile=$1 context=$2 name=$3 out=$4
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
mkdir -p "$(dirname "$out")"

# A store of our own per call, so parallel calls share nothing and nothing stays
# behind. It lies beside the cache: vfs copies every layer, /tmp may be small.
mkdir -p "$cache"
work=$(mktemp -d "$cache/.archive.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

# buildah insists on a policy; what it copies is only ever our own.
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"

# For root, buildah keeps a cache of blobs in /var/lib/containers whatever it is
# told; a mount of our own over that place leaves the machine's alone.
in_private_var_lib() {
    if [[ $EUID == 0 ]]; then
        # shellcheck disable=SC2016
        unshare --mount --propagation private sh -c 'mount -t tmpfs none /var/lib && exec "$@"' sh "$@"
    else
        "$@"
    fi
}

buildah_here() {
    local command=$1
    shift
    TMPDIR=$work in_private_var_lib buildah --storage-driver vfs --root "$work/root" --runroot "$work/run" \
        "$command" --signature-policy "$work/policy.json" "$@"
}

# --timestamp 0 makes equal content an equal image.
buildah_here build --isolation chroot --pull-never --quiet --timestamp 0 \
    --tag "$name" --file "$containerfile" "$context" >"$work/log" 2>&1 &&
    buildah_here push --quiet "$name" "oci-archive:$work/image.tar:$name" >>"$work/log" 2>&1 ||
    { echo "archive.sh: building $name failed:" >&2; cat "$work/log" >&2; exit 1; }
mv -f "$work/image.tar" "$out"
