#!/usr/bin/env bash
# Measure attention beside ggml's, candle's and the machine's limits. Arguments go to the program (--help lists
# them). Installs what ggml's build needs with apt where it may; otherwise says what is missing.
set -euo pipefail
# There, so that cargo finds .cargo/config.toml, which has ggml compiled for this machine.
cd "$(dirname "${BASH_SOURCE[0]}")/../benches/peers"

say() { printf 'bench-peers: %s\n' "$*" >&2; }

# Installs Debian packages; fails without a word where it cannot.
install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    local become=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null || return 1
        become=(sudo -n)
    fi
    say "installing $*"
    "${become[@]}" apt-get update -qq >&2 || return 1
    "${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

have_cmake() { command -v cmake >/dev/null 2>&1; }

have_compiler() { command -v c++ >/dev/null 2>&1 && command -v cc >/dev/null 2>&1; }

# bindgen reads ggml's headers with it, and takes the compiler's own headers from the program clang.
have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    # Read to the end: a search that stops at the first hit breaks the pipe, which pipefail takes for a failure.
    local libraries
    libraries="$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null || true)"
    grep -q 'libclang[-.0-9]*\.so' <<<"$libraries" && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang-[0-9]*.so*' >/dev/null && return 0
    [ -d /Library/Developer/CommandLineTools ]
}

missing=()
have_cmake || missing+=(cmake)
have_compiler || missing+=(g++)
have_libclang || missing+=(clang libclang-dev)
if [ ${#missing[@]} -gt 0 ]; then
    install "${missing[@]}" || true
    if ! { have_cmake && have_compiler && have_libclang; }; then
        say "ggml's build needs what is not here and could not be installed from here: ${missing[*]}"
        say "  Debian and Ubuntu: apt install ${missing[*]} (as root)"
        exit 1
    fi
fi

say "building; the first time this takes some minutes, most of them ggml's"
exec cargo run --release --locked -- "$@"
