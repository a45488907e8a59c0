#!/usr/bin/env bash
# Runs a program on a newer lavapipe, which has cooperative matrices (8 x 8), in a folder of Debian's next release.
#
#   lavapipe-coop.sh setup             makes the folder: about 700 MB and two minutes; needs root, debootstrap and apt
#   lavapipe-coop.sh PROGRAM [ARG...]  runs a program of this machine in it; test programs lie in target/release/deps
#
# For example, the suite on every WGSL kernel:
#   cargo test --release --test wgpu --no-run && scripts/vulkan/lavapipe-coop.sh target/release/deps/wgpu-* wgsl-coop
#
# LAVAPIPE_COOP_ROOT is the folder (target/lavapipe-coop). Variables VARLEN_FA_*, RUST_* are passed on.
set -euo pipefail

root=${LAVAPIPE_COOP_ROOT:-$(dirname "$0")/../../target/lavapipe-coop}

if [ $# -eq 0 ]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 2
fi

if [ "$1" = setup ]; then
  if [ ! -e "$root/etc/debian_version" ]; then
    command -v debootstrap >/dev/null || apt-get install -y -qq --no-install-recommends debootstrap
    mkdir -p "$root"
    debootstrap --variant=minbase --include=ca-certificates trixie "$root"
  fi
  mirror=$(awk '/^deb/ { print $2; exit }' "$root/etc/apt/sources.list")
  echo "deb $mirror trixie-backports main" >"$root/etc/apt/sources.list.d/backports.list"
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  chroot "$root" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive chroot "$root" \
    apt-get install -y -qq --no-install-recommends -t trixie-backports libvulkan1 mesa-vulkan-drivers
  chroot "$root" dpkg-query -W mesa-vulkan-drivers
  exit
fi

[ -e "$root/usr/share/vulkan/icd.d/lvp_icd.json" ] || {
  echo "$0: no lavapipe in $root; run $0 setup" >&2
  exit 2
}
program=$1
shift
install -D "$program" "$root/program"
mapfile -t passed < <(env | grep -E '^(VARLEN_FA|RUST)_')
exec chroot "$root" env "${passed[@]}" VK_ICD_FILENAMES=/usr/share/vulkan/icd.d/lvp_icd.json /program "$@"
