#!/usr/bin/env bash
# Builds once what the benchmarks fetch, and prints the directory it is in. In it, for
# each corpus:
#   CORPUS/zstd, xz, none   signed binary caches, made by real Nix
#   CORPUS/root             the store paths to ask for, one a line
# and the key they are signed with in public-key; for D it is D/public-key.
#
#   A  one path with one file of 300 MB
#   B  a closure of 300 paths, 6,000 files, 104 MB; its root refers to all the others
#   C  one path with 5,000 files, 11 MB
#   D  python3, nginx and redis of the package fixtures, zstd
#   G  one path with one file of 2 GiB: load in the background
set -euo pipefail
exec 3>&1 1>&2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
fixtures=$("$here/../fixtures/build.sh")
key=$(cat "$here"/corpora.{sh,nix} | sha256sum | cut -c1-16)
cache=$(cd "$cache" && pwd -P)
result=$cache/corpora-$key
say() { echo "corpora: $*"; }

# Nix's store is needed only until the caches are written, and is 11,000 files to delete:
# it is in a tmpfs (3 GB) of a mount namespace.
if [[ ${1-} != --in-namespace ]]; then
  exec 9>"$cache/corpora.lock"
  flock 9
  if [[ ! -d $result ]]; then
    more=()
    [[ $(id -u) -eq 0 ]] || more=(--map-root-user)
    unshare --mount --propagation private "${more[@]}" -- "$here/corpora.sh" --in-namespace
  fi
  # D is no copy but the fixtures as they are now, which have keys of their own.
  mkdir -p "$result/D"
  ln -sfn "$fixtures/caches/zstd" "$result/D/zstd"
  ln -sfn "$fixtures/keys/nix-csi-test-1.pub" "$result/D/public-key"
  jq -r '.python3.path, .nginx.path, .redis.path' "$fixtures/paths.json" >"$result/D/root"
  echo "$result" >&3
  exit
fi

shopt -s nullglob
rm -rf --one-file-system "$cache"/.corpora-build.* # of builds that were killed
work=$(mktemp -d "$cache/.corpora-build.XXXXXX")
jobs=()
finish() {
  if ((${#jobs[@]})); then
    kill "${jobs[@]}" 2>/dev/null || true
    wait "${jobs[@]}" || true
  fi
  umount "$work/tmpfs" || true
  rm -rf --one-file-system "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$work"
out=$work/result tmp=$work/tmpfs
mkdir "$out" "$tmp"
mount -t tmpfs -o mode=755,size=6g corpora "$tmp"
mkdir "$tmp/tmp"
export TMPDIR=$tmp/tmp
nix() { NIX_SH_ROOT=$tmp/store NIX_SH_CONFIG='max-jobs = 2
cores = 1' "$here/../fixtures/nix.sh" "$@"; }

# --- store paths ------------------------------------------------------------
# The fixtures' programs and libraries, in the order of their names.
(cd "$fixtures/store/nix/store" &&
  find . -type f -size +16k \( -perm /111 -o -name '*.so*' \) -print0 |
  LC_ALL=C sort -z -t- -k2 | xargs -0 cat) >"$tmp/pool"
say "building store paths"
nix nix-build "$here/corpora.nix" --arg pool "$tmp/pool" --no-out-link >"$work/built" 2>"$work/build.log" ||
  { tail -n 20 "$work/build.log"; exit 1; }
nix nix-instantiate --eval --strict --json "$here/corpora.nix" --arg pool "$tmp/pool" >"$work/roots.json"

# --- signed caches ----------------------------------------------------------
# shellcheck disable=SC2016
nix sh -ec 'nix-store --generate-binary-cache-key nix-csi-bench-1 "$1/secret-key" "$2/public-key"' sh "$tmp" "$out"
mapfile -t roots < <(jq -r '.[]' "$work/roots.json")
nix nix store sign -k "$tmp/secret-key" -r "${roots[@]}"

make_cache() { # corpus, compression
  local dir=$out/$1/$2 level=
  [[ $2 != zstd ]] || level='&compression-level=3'
  mkdir -p "$dir"
  jq -r --arg n "$1" '.[$n]' "$work/roots.json" >"$out/$1/root"
  nix nix copy --to "file://$dir?compression=$2$level" "$(<"$out/$1/root")" &&
    printf 'StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n' >"$dir/nix-cache-info"
}
say "writing caches"
(make_cache A xz) >"$work/xz.log" 2>&1 & # takes as long as all the others
jobs+=($!)
for cache_of in 'A zstd' 'A none' 'B zstd' 'B none' 'B xz' 'C zstd' 'C none' 'C xz' 'G zstd'; do
  read -r corpus compression <<<"$cache_of"
  make_cache "$corpus" "$compression" >"$work/copy.log" 2>&1 || { tail -n 20 "$work/copy.log"; exit 1; }
done
wait "${jobs[0]}" || { tail -n 20 "$work/xz.log"; exit 1; }
jobs=()

mv -T "$out" "$result"
say "$(du -sh "$result" | cut -f1) in $result"
