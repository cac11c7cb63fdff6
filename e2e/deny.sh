#!/bin/bash
# Licences, bans and sources of all dependencies; advisories are reported and do not block.
set -euo pipefail

version=0.20.2
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
deny=$cache/cargo-deny-$version/bin/cargo-deny
if [[ ! -x $deny ]]; then
    echo "deny.sh: building cargo-deny $version, once" >&2
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.deny.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    # Without its defaults: they are for fetching advisories by git.
    cargo install --quiet --locked --root "$work" --target-dir "$work/target" --no-default-features \
        --version "$version" cargo-deny
    rm -rf -- "$work/target"
    mv -T "$work" "$cache/cargo-deny-$version" 2>/dev/null || [[ -x $deny ]]
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"$deny" --all-features --locked check --hide-inclusion-graph licenses bans sources
