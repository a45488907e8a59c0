#!/usr/bin/env bash
# Tests and times varlen-fa on the NVIDIA GPU of this machine. `cargo xtask gpu-bundle` writes a
# folder with this script and the programs that it runs.
#
#   run.sh [--filter TEXT] [STEP...]
#
# Steps; all of them run unless some are named:
#   suite      every test program, and the C library's test in Python. A CUDA device is required,
#              and a Vulkan device too if there is a Vulkan loader.
#   sanitizer  a reduced CUDA suite under compute-sanitizer (memcheck and synccheck), if that is
#              installed
#   bench      the benches and the example, with their results as JSON lines
#
# --filter runs only tests whose names contain TEXT, in the suite and under the sanitizer.
#
# Variables:
#   OUT                where logs and results go (results, beside this script)
#   SUITE_SECONDS      time limit of each step (900 each)
#   SANITIZER_SECONDS
#   BENCH_SECONDS
#
# A step that fails does not stop the others. The script ends with a table, and fails if anything
# in it failed.
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
cd "$bundle" && mkdir -p programs && tar -xJf programs.tar.xz -C programs && cd programs || exit 2
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

# program NAME COMMAND...: runs the command in the time that is left of the step.
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
  # A program that runs no test fails, unless a filter excludes its tests.
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
    # Needs the emulated kernels of `cargo xtask kernels --emulated`, which the folder lacks.
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
  # The other devices take longest, so they run last and take no time from the rest.
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
    row "skipped" 0 "suite/c-library" "--filter does not apply to its tests"
  elif ! command -v python3 >/dev/null; then
    row "skipped" 0 "suite/c-library" "no python3"
  else
    program c-library env "VARLEN_FA_LIBRARY=$PWD/capi/libvarlen_fa.so" python3 capi/tests/test_varlen_fa.py cuda
  fi
}

# Runs two random cases of each property, and no large tensors or repetitions.
run_sanitizer() {
  local sanitizer tool
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    row "skipped" 0 "sanitizer" "compute-sanitizer is not installed"
    return
  }
  for tool in memcheck synccheck; do
    # Tests of refusals make driver calls fail, which is not an error of a kernel.
    program "$tool" env VARLEN_FA_TEST_REQUIRE=cuda VARLEN_FA_TEST_CASES=2 \
      "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 99 \
      tests/suite --test-threads 1 "${filter:-cuda/}" --skip /large/ --skip repeats/ --skip prod
  done
}

run_bench() {
  local dtype
  # Without --bench, as under `cargo test`, benches only check that they run.
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
