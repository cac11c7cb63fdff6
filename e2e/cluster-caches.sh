#!/bin/bash
# Prints a directory of caches for the cluster tests, made of links into the fixtures.
#
#   zstd     all, but for redis and large
#   private  redis, for those who send a token (node.sh)
#   slow     large, a few bytes at a time (node.sh)
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fixtures=$("$e2e/fixtures/build.sh")
caches=$e2e/../target/e2e/cluster-caches
mkdir -p "$(dirname "$caches")"
new=$(mktemp -d "$caches.XXXXXX")
chmod 755 "$new"
cp -rs "$fixtures/caches/zstd" "$new/zstd"
hash_of() { # fixture
    local path
    path=$(sed -n '/^  "'"$1"'": {/,/"path"/s/.*"path": "\(.*\)".*/\1/p' "$fixtures/paths.json")
    [[ -n $path ]] || { echo "cluster-caches.sh: no $1 in $fixtures/paths.json" >&2; exit 1; }
    path=${path#/nix/store/}
    echo "${path%%-*}"
}
move() { # fixture, cache
    mkdir -p "$new/$2/nar"
    local narinfo url
    narinfo=$(hash_of "$1").narinfo
    url=$(sed -n 's/^URL: //p' "$fixtures/caches/zstd/$narinfo")
    mv "$new/zstd/$narinfo" "$new/$2/"
    mv "$new/zstd/$url" "$new/$2/nar/"
    ln -s "$fixtures/caches/zstd/nix-cache-info" "$new/$2/"
}
move redis private
move large slow
rm -rf "$caches"
mv "$new" "$caches"
realpath "$caches"
