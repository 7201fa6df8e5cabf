#!/usr/bin/env bash
# Make sure that the tests find a GPU driver and the model. Installs what is missing with apt where it may;
# otherwise says what is missing and how to get it.
#
# Vulkan in software (lavapipe) is enough: every GPU test runs on it.
#   KVSIEVE_ALLOW_NO_GPU=1         go on without a driver (GPU tests then report that they did not run)
#   KVSIEVE_ALLOW_MISSING_MODEL=1  go on without the model
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf 'prepare: %s\n' "$*" >&2; }

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

have_loader() {
    case "$(uname -s)" in Linux) ;; *) return 0 ;; esac
    # Read to the end: a search that stops at the first hit breaks the pipe, which pipefail takes for a failure.
    local libraries
    libraries="$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null)" || return 1
    [[ "$libraries" == *libvulkan.so.1* ]]
}

have_driver() {
    # Metal and DX12 come with the system.
    case "$(uname -s)" in Linux) ;; *) return 0 ;; esac
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    local folder
    for folder in /usr/share /usr/local/share /etc "${XDG_DATA_HOME:-$HOME/.local/share}"; do
        compgen -G "$folder/vulkan/icd.d/*.json" >/dev/null && return 0
    done
    return 1
}

if ! { have_loader && have_driver; }; then
    if ! { install libvulkan1 mesa-vulkan-drivers && have_loader && have_driver; }; then
        say "no Vulkan driver, and it could not be installed from here."
        say "  Debian and Ubuntu: apt install libvulkan1 mesa-vulkan-drivers (as root)"
        say "  to test without a GPU: KVSIEVE_ALLOW_NO_GPU=1"
        [ "${KVSIEVE_ALLOW_NO_GPU:-0}" = 1 ] || exit 1
    fi
fi

python="${PYTHON:-python3}"
if command -v "$python" >/dev/null 2>&1 && ! "$python" -m pip --version >/dev/null 2>&1; then
    install python3-pip || true
fi
if ! "$root/scripts/fetch-model.sh"; then
    say "no model; to test without it: KVSIEVE_ALLOW_MISSING_MODEL=1"
    [ "${KVSIEVE_ALLOW_MISSING_MODEL:-0}" = 1 ] || exit 1
fi
