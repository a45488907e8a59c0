#!/usr/bin/env bash
# Builds the library for 64-bit Arm, runs its unit tests and the CPU device's suite in an emulator,
# and counts the instructions for a multiplication and addition in the hot loops from the
# disassembly.
#
#   aarch64.sh [FILTER...]    trials to run [default: numerics, masks, biases, packed rows]
#
# Takes Debian's packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static, and the
# sources of the standard library, which scripts/web/fetch_rust_src.sh fetches.
set -euo pipefail
cd "$(dirname "$0")/.."
filters=("$@")
[ ${#filters[@]} -gt 0 ] || filters=(cpu/cpu-tiled/fused/numerics cpu/cpu-tiled/dense/numerics cpu/cpu-tiled/key_mask
  cpu/cpu-tiled/bias cpu/cpu-tiled/varlen_attention cpu/pack cpu/threads cpu/instruction_sets)

target=aarch64-unknown-linux-gnu
for tool in aarch64-linux-gnu-gcc aarch64-linux-gnu-objdump qemu-aarch64-static; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool is missing: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static" >&2
    exit 1
  }
done

# Where the page's build keeps them too.
source=target/web/rust-src
scripts/web/fetch_rust_src.sh "$source"
# As for the page: `-Zbuild-std` is not stable, and these are the variables that tests of cargo
# itself set.
export RUSTC_BOOTSTRAP=1
__CARGO_TESTS_ONLY_SRC_ROOT=$(realpath "$source/library")
export __CARGO_TESTS_ONLY_SRC_ROOT
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
emulator=(qemu-aarch64-static -L /usr/aarch64-linux-gnu)

# Builds the test program that the arguments name, and prints its path. A target folder of its own,
# since RUSTC_BOOTSTRAP makes packages build otherwise.
build() {
  cargo test --release --target "$target" --target-dir target/aarch64 -Zbuild-std=std,test --no-default-features "$@" --no-run --message-format json |
    python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])'
}

unit_tests=$(build -p varlen-fa --lib)
suite=$(build -p varlen-fa-tests --test suite)
aarch64-linux-gnu-objdump -d --no-show-raw-insn "$unit_tests" | python3 scripts/count_fmla.py
"${emulator[@]}" "$unit_tests" backends::cpu
for filter in "${filters[@]}"; do
  count=$("${emulator[@]}" "$suite" --list "$filter" | grep -c ': test$') || { echo "error: no trial is named $filter" >&2; exit 1; }
  echo "$filter: $count trials"
  VARLEN_FA_TEST_REQUIRE=cpu VARLEN_FA_TEST_CASES=8 "${emulator[@]}" "$suite" -q "$filter"
done
