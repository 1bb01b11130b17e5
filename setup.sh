# To be sourced by run_all.sh and run_tests.sh: leaves in $python an interpreter that has everything the project needs.
#
# Makes .venv from requirements.txt, once; later calls only compare a stamp. Settings by environment:
#   APPROX_PYTHON=<interpreter>   use this existing environment, and install nothing
#   PIP_EXTRA_INDEX_URL=<index>   on a machine without GPU: an index of CPU builds of torch, which are much smaller
# shellcheck shell=bash
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$root/.venv"
needed_mb=4096

fail() {
    echo "set-up: $*" >&2
    exit 2
}

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# One line naming the packages of requirements.in that an existing environment lacks; other versions are only warned of.
check_environment() {
    "$1" - "$root" <<'PYTHON'
import re, sys
from importlib import metadata
from pathlib import Path

root = Path(sys.argv[1])
lines = [line for line in (root / "requirements.in").read_text().splitlines() if re.match(r"\w", line)]
pins = dict(line.split("==") for line in (root / "requirements.txt").read_text().splitlines() if "==" in line)
pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
lacking, other = [], []
for name in (re.match(r"[\w.-]+", line).group() for line in lines):
    tested = pins.get(re.sub(r"[-_.]+", "-", name).lower())
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        lacking.append(name)
    else:
        if tested and version.split("+")[0] != tested:
            other.append(f"{name} {version} ({tested})")
if lacking:
    sys.exit(f"set-up: {sys.executable} lacks {', '.join(lacking)}; install them, or unset APPROX_PYTHON")
if other:
    print(f"set-up: other versions than those tested: {', '.join(other)}", file=sys.stderr)
PYTHON
}

find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and found is only $(python3 --version 2>/dev/null || echo none); install python3.11"
}

stamp_of() { { cat "$root/requirements.txt" "$root/pyproject.toml" && "$1" --version && echo "$root"; } | sha256sum; }

up_to_date() {
    [ -x "$venv/bin/python" ] && [ -f "$venv/stamp" ] && [ "$(stamp_of "$venv/bin/python" 2>&1)" = "$(cat "$venv/stamp")" ]
}

# Runs pip; where that fails, one line says why.
install() {
    local log="$venv/set-up.log"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 && return
    if grep -qE 'NewConnectionError|ConnectTimeout|NameResolution|ProxyError|Connection (refused|reset)|Network is unreach' "$log"; then
        fail "the package index cannot be reached; check the network, or pip's index-url (details: $log)"
    fi
    fail "pip failed: $({ grep '^ERROR' "$log" || cat "$log"; } | tail -n 1) (details: $log)"
}

make_environment() {
    local base free_mb fresh=()
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python's venv is missing; on Debian and Ubuntu: apt install $("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    free_mb=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge "$needed_mb" ] || fail "$needed_mb MB of disk are needed in $root, and only $free_mb MB are free"
    # An interrupted installation may have left packages half written, and an upgrade may have removed the Python that
    # the environment was made with: begin anew.
    if [ -f "$venv/unfinished" ] || { [ -L "$venv/bin/python" ] && [ ! -e "$venv/bin/python" ]; }; then fresh=(--clear); fi
    echo "set-up 1/3: virtual environment in .venv"
    "$base" -m venv "${fresh[@]}" "$venv" || fail "cannot make a virtual environment in $venv"
    touch "$venv/unfinished" && rm -f "$venv/stamp"
    : >"$venv/set-up.log"
    echo "set-up 2/3: $(grep -c '==' "$root/requirements.txt") packages (some minutes)"
    install -r "$root/requirements.txt"
    echo "set-up 3/3: this project"
    install --no-deps -e "$root"
    # JupyterLab would ask at every first start whether it may fetch news.
    mkdir -p "$venv/etc/jupyter/labconfig"
    echo '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}' \
        >"$venv/etc/jupyter/labconfig/page_config.json"
    stamp_of "$venv/bin/python" >"$venv/stamp"
    rm "$venv/unfinished"
}

if [ -n "${APPROX_PYTHON:-}" ]; then
    command -v "$APPROX_PYTHON" >/dev/null || fail "APPROX_PYTHON=$APPROX_PYTHON is not an interpreter"
    recent "$APPROX_PYTHON" || fail "APPROX_PYTHON=$APPROX_PYTHON is older than Python 3.11"
    check_environment "$APPROX_PYTHON" || exit 2
    python=$(command -v "$APPROX_PYTHON")
else
    if ! up_to_date; then
        exec 9<>"$root/requirements.txt" # only to lock it: one set-up at a time
        flock -n 9 || { echo "set-up: waiting for another one" && flock 9; }
        up_to_date || make_environment
        exec 9>&-
    fi
    python="$venv/bin/python"
fi
# Before whatever else is called lib on the user's path.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
