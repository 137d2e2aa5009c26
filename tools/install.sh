#!/usr/bin/env bash
# Make the virtual environment $1 (default .venv) with Cortex, all its extras and the tools for tests and checks.
# PYTHON names the interpreter; by default the first on the PATH that is 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
# The one place besides pyproject.toml that names torch's version: it is installed first, from another index.
torch=torch==2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

say() { echo "cortex: $*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "needs Python 3.11 or newer; name it with PYTHON=/path/to/python"
    return 1
}

# Debian and Ubuntu keep venv's half (ensurepip) in a package of its own.
install_venv_module() {
    local version
    version=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "python -m venv does not work here; on Debian or Ubuntu: apt-get install $version"
        return 1
    fi
    say "installing $version"
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$version" >&2
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --quiet --progress-bar off "$@"
}

# Whether the index of torch's CPU builds answers, found out within seconds.
cpu_index_answers() {
    # urllib's time-out leaves the name's look-up out.
    timeout 6 "$venv/bin/python" - "$cpu_index/torch/" <<'PYTHON' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
PYTHON
}

# A machine without a GPU takes the CPU build: a tenth of the size of the one with CUDA.
install_torch() {
    if [ ! -e /dev/nvidiactl ] && cpu_index_answers; then
        say "installing $torch (CPU build)"
        pip_install -i "$cpu_index" "$torch" && return
        say "that did not work; taking what pip finds"
    else
        say "installing $torch"
    fi
    pip_install "$torch"
}

python=$(find_python)
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv" >/dev/null; then
        install_venv_module "$python"
        "$python" -m venv --clear "$venv"
    fi
fi
install_torch
say "installing Cortex and what it needs (a minute or two)"
echo "$torch" >"$venv/constraints.txt"
pip_install --constraint "$venv/constraints.txt" --editable '.[all,test,check,manifests]'
say "$venv is ready"
