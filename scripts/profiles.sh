#!/usr/bin/env bash
# Learn of SmolLM2 what some policies go by, into models/smollm2.profile.safetensors: about six minutes on two cores.
#
#   scripts/profiles.sh [options of `kvsieve calibrate`]
#
# The text is docstrings of Python's standard library, which the evaluation's text is no part of. A run that was cut off goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
scripts/fetch-model.sh
printf 'building the program; the first time this takes some minutes\n'
cargo build --release -p kvsieve-cli
"$CARGO_TARGET_DIR/release/kvsieve" calibrate --out models/smollm2.profile.safetensors "$@"
printf 'models/smollm2.profile.safetensors: use it with --profile\n'
