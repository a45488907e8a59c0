#!/usr/bin/env bash
# Tests and times varlen-fa on this machine's NVIDIA GPU. Part of the folder that `cargo xtask gpu-bundle` writes.
#
#   run.sh [--filter TEXT] [STEP...]
#
# Steps, all of them unless some are named:
#   suite      every test program, and the C library's test in Python; a CUDA device must be there, and a Vulkan device if there
#              is a Vulkan loader
#   sanitizer  the CUDA suite under compute-sanitizer, memcheck and synccheck, where that is installed: a reduced set
#   bench      the benches and the example, with their results as JSON lines
#
# --filter runs the tests alone whose names contain TEXT, in the suite and in the sanitizer's set.
#
# Variables:
#   OUT                where logs and results go (results, beside this script)
#   SUITE_SECONDS      time limit of each step (900 each)
#   SANITIZER_SECONDS
#   BENCH_SECONDS
#
# A step that fails does not stop the others. Ends with a table; fails if anything in it failed.
set -uo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$script"; }

refuse() {
  echo "$0: $1; --help says more" >&2
  exit 2
}

script=$(realpath "$0")
bundle=$(dirname "$script")
filter=
steps=()
while [ $# -gt 0 ]; do
  case $1 in
  -h | --help) usage && exit ;;
  --filter)
    [ $# -ge 2 ] && [ -n "$2" ] || refuse "--filter needs a text"
    filter=$2
    shift
    ;;
  suite | sanitizer | bench) steps+=("$1") ;;
  *) refuse "unknown argument $1" ;;
  esac
  shift
done
[ ${#steps[@]} -gt 0 ] || steps=(suite sanitizer bench)

mkdir -p "${OUT:=$bundle/results}" && OUT=$(realpath "$OUT") || exit 2
cd "$bundle" && mkdir -p programs && tar -xzf programs.tar.gz -C programs && cd programs || exit 2
unset VARLEN_FA VARLEN_FA_DEVICE VARLEN_FA_KERNEL

rows=()
failures=0
child=

# row STATUS SECONDS NAME [DETAIL]
row() {
  rows+=("$(printf '%-11s %6s  %-28s %s' "$@")")
  echo "${rows[-1]}"
}

fail() {
  failures=$((failures + 1))
  row "FAILED" "$@"
}

trap 'kill "$child" 2>/dev/null; echo "interrupted" >&2; exit 130' INT TERM HUP

# program NAME COMMAND...: runs it in what is left of the step's time.
program() {
  local name=$step/$1 log=$OUT/$step-$1.log status=0 start=$SECONDS left=$((deadline - SECONDS))
  shift
  if [ "$left" -le 0 ]; then
    fail 0 "$name" "not started: no time left"
    return
  fi
  echo "+ $*" >"$log"
  timeout --kill-after=10 "$left" "$@" >>"$log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=
  local seconds=$((SECONDS - start)) detail
  detail=$(grep -E '^test result:|ERROR SUMMARY' "$log" | tail -n 2 | sed 's/^=* *//; s/; finished in .*//' | paste -sd ' ')
  # Nothing to run is no success, unless a filter asked for it.
  case "$step,$filter" in
  suite, | sanitizer,*) [[ $status -ne 0 || $detail != *" 0 passed; 0 failed"* ]] || status="0, but no test ran" ;;
  esac
  case $status in
  0) row "ok" "$seconds" "$name" "$detail" ;;
  124 | 137) fail "$seconds" "$name" "stopped after ${left} s; $log" ;;
  *)
    tail -n 20 "$log" | sed 's/^/    /'
    fail "$seconds" "$name" "exit $status; $detail $log"
    ;;
  esac
}

has_vulkan() { { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | grep -q 'libvulkan\.so\.1'; }

run_suite() {
  local test names=() required=cuda
  has_vulkan && required=cuda,wgpu
  for test in tests/*; do
    case ${test#tests/} in
    suite) ;;
    # Needs the emulated kernels of `cargo xtask kernels --emulated`, which are not in the folder.
    self_check) ;;
    *) names+=("${test#tests/}") ;;
    esac
  done
  if [ -n "$filter" ]; then
    program filtered env "VARLEN_FA_TEST_REQUIRE=$required" tests/suite "$filter"
  else
    program cuda env "VARLEN_FA_TEST_REQUIRE=$required" tests/suite cuda/
  fi
  for test in "${names[@]}"; do
    program "$test" env "VARLEN_FA_TEST_REQUIRE=$required" "tests/$test" ${filter:+"$filter"}
  done
  # The other devices take longest: last, so that they take time from nothing else.
  for test in wgpu cpu; do
    if [ -n "$filter" ]; then
      continue
    elif [ "$test" = wgpu ] && ! has_vulkan; then
      row "skipped" 0 "suite/wgpu" "no Vulkan loader (libvulkan.so.1)"
      continue
    fi
    program "$test" env "VARLEN_FA_TEST_REQUIRE=$required" tests/suite "$test/"
  done
  if [ -n "$filter" ]; then
    row "skipped" 0 "suite/c-library" "its tests have no names that --filter knows"
  elif ! command -v python3 >/dev/null; then
    row "skipped" 0 "suite/c-library" "no python3"
  else
    program c-library env "VARLEN_FA_LIBRARY=$PWD/capi/libvarlen_fa.so" python3 capi/tests/test_varlen_fa.py cuda
  fi
}

# Two random cases of each property, and neither large tensors nor repetitions.
run_sanitizer() {
  local sanitizer tool
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    row "skipped" 0 "sanitizer" "compute-sanitizer is not installed"
    return
  }
  for tool in memcheck synccheck; do
    # Tests of refusals make calls of the driver fail; those are no errors of the kernels.
    program "$tool" env VARLEN_FA_TEST_REQUIRE=cuda VARLEN_FA_TEST_CASES=2 \
      "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 99 \
      tests/suite --test-threads 1 "${filter:-cuda/}" --skip /large/ --skip repeats/ --skip prod
  done
}

run_bench() {
  local dtype
  # Without --bench, as under `cargo test`, they only show that they run.
  for dtype in f16 bf16; do
    program "attention-cuda-$dtype" benches/attention --bench --device cuda --dtype "$dtype" --json "$OUT/attention-cuda-$dtype.jsonl"
  done
  program metadata benches/metadata --bench --json "$OUT/metadata.jsonl"
  program external-cuda examples/external_cuda
  program example examples/masked_attention --device cuda --json "$OUT/masked_attention.jsonl"
  if has_vulkan; then
    program attention-wgpu benches/attention --bench --device wgpu --json "$OUT/attention-wgpu.jsonl"
  else
    row "skipped" 0 "bench/attention-wgpu" "no Vulkan loader (libvulkan.so.1)"
  fi
}

{
  date -u
  uname -a
  getconf GNU_LIBC_VERSION
  nvidia-smi
} >"$OUT/machine.txt" 2>&1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi does not run here"

for step in "${steps[@]}"; do
  case $step in
  suite) deadline=$((SECONDS + ${SUITE_SECONDS:-900})) ;;
  sanitizer) deadline=$((SECONDS + ${SANITIZER_SECONDS:-900})) ;;
  bench) deadline=$((SECONDS + ${BENCH_SECONDS:-900})) ;;
  esac
  echo "=== $step"
  "run_$step"
done

{
  echo
  printf '%-11s %6s  %s\n' "" "s" "step"
  printf '%s\n' "${rows[@]}"
  [ "$failures" -eq 0 ] || echo "$failures failed"
} | tee "$OUT/summary.txt"
[ "$failures" -eq 0 ]
