#!/usr/bin/env bash
# Ask a real model a question about a real document, once with its full KV cache and once per policy and
# budget, and print the comparison.
#
#   DOCUMENT=file QUESTION="..." scripts/demo.sh
#
# The default document is Python's own language documentation; the model is SmolLM2-135M (94 MB, fetched).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
python="${PYTHON:-python3}"

scripts/fetch-model.sh
document="${DOCUMENT:-}"
question="${QUESTION:-}"
if [ -z "$document" ]; then
    document="$CARGO_TARGET_DIR/pydoc-topics.txt"
    mkdir -p "$CARGO_TARGET_DIR"
    "$python" scripts/pydoc-text.py "$document"
fi
if [ -z "$question" ]; then
    question="In one sentence: what does the assert statement do?"
fi
[ -r "$document" ] || { printf 'demo: cannot read the document "%s"; set DOCUMENT=file\n' "$document" >&2; exit 1; }

printf 'building the program; the first time this takes some minutes\n'
cargo build --release -p kvsieve-cli
"$CARGO_TARGET_DIR/release/kvsieve" run --model smollm2 --document "$document" --tokens 4500 \
    --question "$question" --recipe snapkv --recipe streaming --budget 25% --budget 10% --compare
