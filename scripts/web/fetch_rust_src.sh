#!/usr/bin/env bash
# Fetches the sources of Rust's standard library, of the version of `rustc`, into DIR/library:
# Debian's package rust-src of trixie-backports, for machines that rustup cannot reach. Nothing is
# installed, and apt's own lists are left alone.
#
#   fetch_rust_src.sh DIR
set -euo pipefail
dir=${1:?usage: fetch_rust_src.sh DIR}

version=$(rustc --version | cut -d' ' -f2)
if [ "$(cat "$dir/version" 2>/dev/null)" = "$version" ]; then exit 0; fi
for tool in apt-get apt-cache dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "error: $tool is missing: this takes Debian's tools" >&2; exit 1; }
done
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || { echo "error: $keyring is missing (package debian-archive-keyring)" >&2; exit 1; }

rm -rf "$dir"
mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial"
dir=$(cd "$dir" && pwd)
echo "deb [signed-by=$keyring] http://deb.debian.org/debian trixie-backports main" >"$dir/apt/sources.list"
apt=(-q=2 -o Dir::Etc::SourceList="$dir/apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$dir/apt/lists"
  -o Dir::Cache="$dir/apt" -o Dir::Cache::Archives="$dir/apt/archives" -o APT::Sandbox::User=root)

apt-get "${apt[@]}" update
package=$(apt-cache "${apt[@]}" madison rust-src | awk -F' *[|] *' -v version="$version" 'index($2, version "+") == 1 { print $2; exit }')
[ -n "$package" ] || { echo "error: trixie-backports has no rust-src $version" >&2; exit 1; }
echo "fetching rust-src $package (45 MB)"
(cd "$dir/apt" && apt-get "${apt[@]}" download "rust-src=$package")
dpkg-deb --fsys-tarfile "$dir"/apt/rust-src_*.deb | tar -x -C "$dir" --strip-components=4 "./usr/src/rustc-$version/library"
rm -rf "$dir/apt"
echo "$version" >"$dir/version"
