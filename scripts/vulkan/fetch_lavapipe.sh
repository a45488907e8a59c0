#!/usr/bin/env bash
# Fetches a Mesa newer than the distribution's, whose lavapipe has cooperative matrices (8x8), with
# the C library and the Vulkan loader that it needs, into DIR: packages of Debian 13 and its
# backports, unpacked. Nothing is installed, no root is needed, and apt's own lists are left alone.
# DIR/run PROGRAM [ARGUMENTS] runs a program on it.
#
#   fetch_lavapipe.sh DIR
set -euo pipefail
dir=${1:?usage: fetch_lavapipe.sh DIR}
if [ -e "$dir/mesa-version" ]; then exit 0; fi

for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "error: $tool is missing: this takes Debian's tools" >&2; exit 1; }
done
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || { echo "error: $keyring is missing (package debian-archive-keyring)" >&2; exit 1; }

rm -rf "$dir"
mkdir -p "$dir"/apt/lists/partial "$dir"/apt/archives/partial "$dir/root"
dir=$(cd "$dir" && pwd)
for suite in trixie trixie-backports; do
  echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main"
done >"$dir/apt/sources.list"
# An empty system, so that everything that the driver needs is taken.
: >"$dir/apt/status"
apt=(-q=2 -o Dir::Etc::SourceList="$dir/apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$dir/apt/lists"
  -o Dir::State::Status="$dir/apt/status" -o Dir::Cache="$dir/apt" -o Dir::Cache::Archives="$dir/apt/archives"
  -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Debug::NoLocking=true)

apt-get "${apt[@]}" update
apt-get "${apt[@]}" -y --download-only -t trixie-backports install mesa-vulkan-drivers libvulkan1 >/dev/null
for package in "$dir"/apt/archives/*.deb; do
  dpkg-deb --extract "$package" "$dir/root"
done

# The C library must fit its own loader, so programs start through that.
cat >"$dir/run" <<'RUN'
#!/bin/sh
root=$(cd "$(dirname "$0")" && pwd)/root
icd=$(echo "$root"/usr/share/vulkan/icd.d/lvp_icd*.json)
program=$1
shift
VK_DRIVER_FILES=$icd VK_ICD_FILENAMES=$icd exec "$root/usr/lib64/ld-linux-x86-64.so.2" \
  --library-path "$root/usr/lib/x86_64-linux-gnu" "$program" "$@"
RUN
chmod +x "$dir/run"
version=$(dpkg-deb --field "$(echo "$dir"/apt/archives/mesa-vulkan-drivers_*.deb)" Version)
rm -rf "$dir/apt"
echo "$version" >"$dir/mesa-version"
echo "Mesa $version"
