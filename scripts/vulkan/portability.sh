#!/usr/bin/env bash
# Runs the wgpu suite on adapters that differ in what they offer. All are software, so any Linux
# machine with Debian's apt will do.
#
#   portability.sh [--full] [lavapipe] [webgpu-limits] [swiftshader] [lavapipe-coop]        all of them by default
#
#   adapter         what it is                                                   subgroup  invocations  cooperative matrix
#   lavapipe        the distribution's Mesa                                      8         1024         no
#   webgpu-limits   the same, opened with WebGPU's default limits, no feature    -         256          no
#   swiftshader     from the package chromium                                    4         256          no
#   lavapipe-coop   Mesa of trixie-backports, unpacked under target/vulkan       8         1024         8x8
#
# Hardware is a matter of the machine: `cargo xtask gpu-bundle` makes a folder whose run.sh runs the
# same suite on the Vulkan adapter of an NVIDIA GPU (subgroup 32, cooperative matrix 16x16). `run.sh
# suite` does so; with VARLEN_FA_TEST_LIMITS=webgpu before it, at WebGPU's default limits.
#
# These adapters compute on the CPU. With --full the suite runs all of its trials on each. Without it,
# it leaves out what it does on every such adapter (VARLEN_FA_TEST_EMULATED), and the trials whose
# names hold one of the words in REPEATED and SETTLED below, which CI runs on lavapipe. What an adapter
# skips by itself is printed by the suite, each with its reason.
set -euo pipefail
cd "$(dirname "$0")/../.."

# The same many times over: random masks, every head dimension, many threads, key ranges of many sizes.
REPEATED=(properties/ device_meta/ranges/ same_bits every_head_dim calls_from_many_threads many_ranges
  ranges/every_tile_width ranges/lengths_around_tiles ranges/windows_around_tiles ranges/more_queries
  ranges/random ranges/one_infinite_value modifiers/every_tile_width modifiers/lengths_around_tiles)
# Refusals on the host, which no adapter changes, and a tensor that fills the memory of most.
SETTLED=(external_wgpu/refusals more_than_2_31_elements)

full=
adapters=()
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    lavapipe | webgpu-limits | swiftshader | lavapipe-coop) adapters+=("$argument") ;;
    *) echo "error: expected --full, lavapipe, webgpu-limits, swiftshader or lavapipe-coop, got $argument" >&2; exit 2 ;;
  esac
done
[ ${#adapters[@]} -gt 0 ] || adapters=(lavapipe webgpu-limits swiftshader lavapipe-coop)

skips=()
if [ -n "$full" ]; then
  export VARLEN_FA_TEST_EMULATED=whole
else
  for word in "${REPEATED[@]}" "${SETTLED[@]}"; do skips+=(--skip "$word"); done
  echo "not run, without --full: trials with ${skips[*]//--skip/}"
fi

suite=$(cargo test --release --workspace --test suite --no-run --message-format json |
  python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "suite": print(message["executable"])')

# Installs packages of the distribution that are missing.
need() {
  dpkg -s "$@" >/dev/null 2>&1 && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

lavapipe_icd() { echo /usr/share/vulkan/icd.d/lvp_icd*.json; }
swiftshader_icd=/usr/lib/chromium/vk_swiftshader_icd.json

export VARLEN_FA_TEST_REQUIRE=wgpu
for adapter in "${adapters[@]}"; do
  printf '\n--- %s (%ss)\n' "$adapter" "$SECONDS"
  run=() only=(wgpu/)
  case $adapter in
    lavapipe)
      need libvulkan1 mesa-vulkan-drivers
      run=(env VK_DRIVER_FILES="$(lavapipe_icd)" VK_ICD_FILENAMES="$(lavapipe_icd)") ;;
    webgpu-limits)
      need libvulkan1 mesa-vulkan-drivers
      run=(env VK_DRIVER_FILES="$(lavapipe_icd)" VK_ICD_FILENAMES="$(lavapipe_icd)" VARLEN_FA_TEST_LIMITS=webgpu) ;;
    swiftshader)
      need libvulkan1 chromium
      run=(env VK_DRIVER_FILES="$swiftshader_icd" VK_ICD_FILENAMES="$swiftshader_icd") ;;
    lavapipe-coop)
      scripts/vulkan/fetch_lavapipe.sh target/vulkan/lavapipe
      run=(target/vulkan/lavapipe/run)
      # It compiles a kernel on matrices in seconds to a minute; other kernels are the same on the
      # other adapters.
      if [ -z "$full" ]; then
        # Each variant of the kernel takes it seconds up to 32 elements, and more than a minute past
        # them, where the output passes through workgroup memory in several slices. So the suite has
        # 40 and 64 without more, and takes 16 where a trial is about something else. What trials of
        # many head dimensions, of the log-sum-exp and of bf16 test beside that, the portable kernel
        # has in common with this one. Of score modifiers, all of them together are tested; of
        # cross-attention, masks that differ.
        many_kernels=(nan_reaches_only_queries heads_times_dim_not_a_power_of_two any_head_dim lse/ /bf16
          modifiers/with_ranges modifiers/long_rows modifiers/scores_beyond modifiers/none
          cross/lengths_that_differ grouped_heads/cross device_meta/each_side_rebuilt)
        only=(wgpu/wgsl-coop/fused/)
        for word in "${many_kernels[@]}"; do only+=(--skip "$word"); done
        echo "not run, without --full: kernels other than wgsl-coop, paths other than fused, and ${many_kernels[*]}"
        echo "at head dimension 16 alone: segments, joint layers, a bias, modifiers, grouped heads, ranges under metadata of the device"
      fi ;;
  esac
  "${run[@]}" "$suite" "${only[@]}" "${skips[@]}"
done
