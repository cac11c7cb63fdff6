#!/usr/bin/env bash
# Runs each fuzz target for some seconds, on stable Rust.
#
#   run.sh [SECONDS PER TARGET [TARGET]...]         default: 20, all targets
#
# Begins with the committed corpus: `nix-*` are archives by `nix-store --dump`, `evil-*` is what has
# to be refused, the others are hand-made; add what once failed. What is new and interesting is
# lost with a temporary directory; an input that fails is kept in <target directory>/fuzz/artifacts,
# and named.
# To see such a failure again:  <target directory>/fuzz/*/release/TARGET INPUT
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
repo=$(cd "$here/../../.." && pwd -P)
seconds=${1:-20}
shift $(($# > 0 ? 1 : 0))
targets=("$@")
[[ $# -gt 0 ]] || targets=(farming nar narinfo nix_conf references)
[[ $seconds =~ ^[1-9][0-9]*$ ]] || {
  echo "usage: run.sh [SECONDS PER TARGET [TARGET]...]" >&2
  exit 64
}

# Fewer executions mean that a target did not really run: each does thousands in a second.
minimum=$((seconds * 100))

# The longest input. For a NAR more than 64 directories, one in the other, take.
max_len() { [[ $1 == nar ]] && echo 16384 || echo 4096; }

cd "$here" # for rust-toolchain.toml, which is above
host=$(rustc -vV | sed -n 's/^host: //p')
out=$(realpath -m "${CARGO_TARGET_DIR:-$repo/target}")/fuzz
artifacts=$out/artifacts
mkdir -p "$artifacts"

# What `cargo fuzz` passes, without a sanitizer: those need a nightly compiler, and there is no
# unsafe code here for them to look at. With --target it is for the targets, not for build scripts.
unset CARGO_ENCODED_RUSTFLAGS
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
CARGO_TARGET_DIR=$out cargo build --quiet --locked --release --target "$host"

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

failed=0
for target in "${targets[@]}"; do
  mkdir "$work/$target"
  log=$work/$target.log
  status=0
  "$out/$host/release/$target" -max_total_time="$seconds" -max_len="$(max_len "$target")" \
    -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 -dict="$here/$target.dict" \
    -artifact_prefix="$artifacts/$target-" \
    "$work/$target" "$here/corpus/$target" >"$log" 2>&1 || status=$?
  count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  covered=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 || true)
  if ((status != 0)); then
    tail -n 40 "$log" >&2
    echo "fuzz $target: FAILED after ${count:-no} executions (status $status)" >&2
    sed -n 's/^.*Test unit written to /fuzz '"$target"': the input is /p' "$log" >&2
    failed=1
  elif ((${count:-0} < minimum)); then
    tail -n 40 "$log" >&2
    echo "fuzz $target: FAILED: ${count:-no} executions in ${seconds}s, at least $minimum were expected" >&2
    failed=1
  else
    echo "fuzz $target: $count executions in ${seconds}s, ${covered:-cov: none}, no failure"
  fi
done
exit "$failed"
