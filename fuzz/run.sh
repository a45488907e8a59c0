#!/usr/bin/env bash
# Builds the fuzzers with coverage counters and runs some of them. `cargo fuzz run TARGET` does the
# same with a nightly compiler and the address sanitizer; this needs neither.
#
#   fuzz/run.sh [--seconds N] [--seed N] [TARGET...]
#
# 60 seconds each, all targets unless some are named, another way through the inputs each time
# unless a seed is given.
#
# What it finds beyond fuzz/seeds/ is kept in fuzz/corpus/; an input that fails is left in
# fuzz/artifacts/.
set -euo pipefail
cd "$(dirname "$0")"

seconds=60
seed=0
targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:?--seconds needs a number}; shift ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    -*) echo "error: unknown option $1" >&2; exit 2 ;;
    *) targets+=("$1") ;;
  esac
  shift
done
[ ${#targets[@]} -gt 0 ] || targets=(masks layouts forward capi)

host=$(rustc -vV | sed -n 's/^host: //p')
passes=-sanitizer-coverage
export RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=$passes-level=4
  -Cllvm-args=$passes-inline-8bit-counters -Cllvm-args=$passes-pc-table -Cllvm-args=$passes-trace-compares"
RUSTFLAGS=$(tr -s '\n ' ' ' <<<"$RUSTFLAGS")
cargo build --release --locked --target "$host"

for target in "${targets[@]}"; do
  printf '\n--- %s, %s s\n' "$target" "$seconds"
  mkdir -p "corpus/$target" "artifacts/$target"
  "target/$host/release/$target" -max_total_time="$seconds" -seed="$seed" -timeout=30 -print_final_stats=1 \
    -artifact_prefix="artifacts/$target/" "corpus/$target" "seeds/$target" 2>&1 |
    grep -vE '^#[0-9]+\s+(NEW|REDUCE|pulse)'
done
