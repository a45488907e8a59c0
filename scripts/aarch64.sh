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
  cpu/cpu-tiled/bias cpu/cpu-tiled/varlen_attention cpu/pack cpu/threads/ cpu/instruction_sets/)

target=aarch64-unknown-linux-gnu
packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"
# Debian 13 calls the static one by the plain name.
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || {
  echo "error: qemu-aarch64-static is missing: apt-get install $packages" >&2
  exit 1
}
emulator=("$emulator" -L /usr/aarch64-linux-gnu)
for tool in aarch64-linux-gnu-gcc aarch64-linux-gnu-objdump; do
  command -v "$tool" >/dev/null || { echo "error: $tool is missing: apt-get install $packages" >&2; exit 1; }
done
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc

# The standard library: rustup's, or compiled from rustup's sources or Debian's, as for the page.
compile_std=()
if [ ! -d "$(rustc --print target-libdir --target "$target")" ]; then
  source=$(rustc --print sysroot)/lib/rustlib/src/rust
  if [ ! -d "$source/library" ]; then
    source=target/web/rust-src
    scripts/web/fetch_rust_src.sh "$source"
  fi
  # `-Zbuild-std` is not stable, and these are the variables that tests of cargo itself set.
  export RUSTC_BOOTSTRAP=1
  __CARGO_TESTS_ONLY_SRC_ROOT=$(realpath "$source/library")
  export __CARGO_TESTS_ONLY_SRC_ROOT
  compile_std=(-Zbuild-std=std,test)
fi

# One build for both programs, in a target folder of its own, since RUSTC_BOOTSTRAP makes packages
# build otherwise. Dependencies are optimized little: their generic code, which the hot loops are
# made of, is compiled with this repository's packages, and the rest takes longer to compile than to
# run.
programs=$(cargo test --release --target "$target" --target-dir target/aarch64 "${compile_std[@]}" \
  --config 'profile.release.package."*".opt-level=1' -p varlen-fa -p varlen-fa-tests --lib --test suite \
  --no-default-features --no-run --message-format json |
  python3 -c '
import json, sys
built = {m["target"]["name"]: m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")}
print(built["varlen_fa"], built["suite"])')
read -r unit_tests suite <<<"$programs"
aarch64-linux-gnu-objdump -d --no-show-raw-insn "$unit_tests" | python3 scripts/count_fmla.py
"${emulator[@]}" "$unit_tests" backends::cpu
echo "trials of the suite: ${filters[*]}"
for filter in "${filters[@]}"; do
  count=$("${emulator[@]}" "$suite" --list "$filter" | grep -c ': test$') || { echo "error: no trial is named $filter" >&2; exit 1; }
  echo "$filter: $count trials"
  VARLEN_FA_TEST_REQUIRE=cpu VARLEN_FA_TEST_CASES=8 "${emulator[@]}" "$suite" -q "$filter"
done
