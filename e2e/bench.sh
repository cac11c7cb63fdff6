#!/usr/bin/env bash
# bench.sh [--rounds N] [--only PATTERN]
#
# Measures how fast closures are fetched and published, views built and pods reviewed: prints a table and writes
# target/bench.json. With --only, figures of other names in it stay. Each fetch has an empty store on a journaled ext4 of its own, which is in memory if there
# is enough of it: a disk, or a file system that deletes beside, would be measured instead.
#
# NIX_CSI_NODE=FILE  measures that nix-csi-node instead of a new release build.
set -euo pipefail

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

# In a mount namespace, with which all mounts go, and with the last of them the loop device.
if [[ ${1-} == --in-namespace ]]; then
  shift
  dir=target/bench
  available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo) # KiB
  if ((available > 12 << 20)); then
    mount -t tmpfs -o mode=700,size=9g bench "$dir"
  else
    echo "bench: less than 12 GiB of memory is free; the file system is on a disk, so figures vary" >&2
  fi
  mkdir -p "$dir/scratch"
  rm -f "$dir/image"
  truncate -s 8G "$dir/image"
  mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$dir/image"
  mount -o loop,noatime "$dir/image" "$dir/scratch"
  rm "$dir/image" # the loop device has it open
  "$@" --scratch "$PWD/$dir/scratch"
  exit
fi

cd "$e2e/.."
target=${CARGO_TARGET_DIR:-target}
corpora=$("$e2e/bench/corpora.sh")
triple=x86_64-unknown-linux-gnu
export RUSTFLAGS="-C target-feature=+crt-static"
# As in the image, and not together with the benchmark, which wants more of their dependencies: what is shipped is what
# is measured.
[[ -n ${NIX_CSI_NODE-} ]] ||
  cargo build --release --locked --target "$triple" -p nix-csi-node -p nix-csi-webhook
cargo build --release --locked --target "$triple" -p nix-csi-bench

command=("$target/$triple/release/nix-csi-bench" run --corpora "$corpora" --json "$PWD/target/bench.json"
  --node "${NIX_CSI_NODE:-$(realpath "$target/$triple/release/nix-csi-node")}")
if nix=$("$e2e/nix-version.sh" sid); then
  command+=(--nix-rootfs "$nix")
else
  echo "bench: Debian sid's Nix cannot be had; the machine's own is the peer" >&2
fi
mkdir -p target/bench
exec unshare --mount --propagation private -- \
  "$e2e/bench.sh" --in-namespace "${command[@]}" "$@"
