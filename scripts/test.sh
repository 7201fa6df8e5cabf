#!/usr/bin/env bash
# Run the checks, or some of them by name, and print what passed.
#
#   scripts/test.sh                  all
#   scripts/test.sh fmt clippy       these two
#
# A failing part does not stop the others; the exit status is 0 only if every part passed.
# Always the whole workspace and always the dev profile: dependencies are then checked once for clippy and docs, and
# compiled once for all tests. A selection of packages would choose other features for what they share, and build it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
logs="$CARGO_TARGET_DIR/test-logs"
mkdir -p "$logs"

# Vulkan's loader asks for it and complains on every test where there is no desktop.
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

part_fmt() {
    cargo fmt --all --check
    # The registry's macros declare these modules, where cargo fmt does not look.
    rustfmt --check --edition 2024 src/policy/{score,allocate,whole}/*.rs src/reduce/*.rs
    cargo fmt --manifest-path benches/peers/Cargo.toml --check
}

# What is built apart has a lock file of its own, which the library's dependencies are in too. Without the registry, by what is
# known of it here.
part_lock() {
    cd benches/peers
    cargo update --workspace --locked --quiet || cargo update --workspace --locked --quiet --offline
}

# Without the GPU and the test suite, then with everything.
part_clippy() {
    cargo clippy --workspace --all-targets --no-default-features -- -D warnings
    cargo clippy --workspace --all-targets --all-features -- -D warnings
}

# Of the library, the candle host and the program: unit, property, golden and conformance tests on every backend, the
# examples, the documentation's examples. With all features at once: without the GPU the same tests would only run a
# second time (clippy compiles both).
part_tests() {
    cargo test --workspace --all-features --no-fail-fast
}

# Libraries only: the program's page would overwrite the library's, which has the same name.
part_docs() {
    RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --lib --no-deps --all-features
}

all=(fmt lock clippy tests docs)
if [ $# -eq 0 ]; then
    scripts/prepare.sh
    set -- "${all[@]}"
fi

failed=()
report=()
total=(0 0 0)
for part in "$@"; do
    declare -F "part_$part" >/dev/null || {
        printf 'test: there is no part "%s"; parts: %s\n' "$part" "${all[*]}" >&2
        exit 2
    }
    printf '\n== %s\n' "$part"
    began=$SECONDS
    verdict=ok
    # In a process of its own: `set -e` does not reach into a function that stands in a condition.
    if ! bash -euo pipefail -c "$(declare -f "part_$part"); part_$part" 2>&1 | tee "$logs/$part.log"; then
        verdict=FAILED
        failed+=("$part")
    fi
    # Lines such as: test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; …
    read -r passed broken ignored < <(awk '/^test result:/ {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) == "passed;") p += $i
            if ($(i + 1) == "failed;") f += $i
            if ($(i + 1) == "ignored;") g += $i
        }
    } END { print p + 0, f + 0, g + 0 }' "$logs/$part.log")
    total=($((total[0] + passed)) $((total[1] + broken)) $((total[2] + ignored)))
    report+=("$(printf '%-12s %7d %7d %8d %6ds  %s' "$part" "$passed" "$broken" "$ignored" $((SECONDS - began)) "$verdict")")
done

printf '\n%-12s %7s %7s %8s %7s\n' part passed failed ignored time
printf '%s\n' "${report[@]}"
printf '%-12s %7d %7d %8d %6ds\n' all "${total[@]}" "$SECONDS"
for part in "$@"; do
    grep -hs '^NOT CHECKED' "$logs/$part.log" || true
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s (logs in %s)\n' "${failed[*]}" "$logs"
    exit 1
fi
