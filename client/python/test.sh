#!/usr/bin/env bash
# What ./test does for the Python package, a step a call; a person may call them too. Needs python3 (3.11 or later).
#
#   client/python/test.sh home     a virtual environment with pinned, hashed tools; says why and exits 3 where there can be none
#   client/python/test.sh build    daemon, kvctl and the wheel, for development; installs the wheel there
#   client/python/test.sh lints    ruff, mypy, and whether the stubs are what was compiled
#   client/python/test.sh suites   the names of the suites that need no engine: core, and folders of tests/
#   client/python/test.sh suite core    one of them; further words go to pytest
#   client/python/test.sh engine vllm   a suite with an environment of its own, tests/<engine>/run.sh
#
# The environment and the wheel are in the target folder; nothing is installed anywhere else.
set -euo pipefail
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-$(cd ../.. && pwd)/target}
home=$target/python/home
wheels=$target/python/wheels
export CARGO_TARGET_DIR=$target KVD_BIN=$target/debug/kvd
usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

home() {
    if ! python3 -c "$usable" 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y -qq python3 python3-venv >/dev/null 2>&1 || true # what it lacks is said below
    fi
    python3 -c "$usable" 2>/dev/null || { echo "no python3 of 3.11 or later with venv"; exit 3; }
    if cmp -s tests/requirements.txt "$home/requirements.txt"; then return; fi
    python3 -m venv --clear "$home"
    local log=$home/pip.log
    if ! "$home/bin/pip" install -q --disable-pip-version-check --require-hashes -r tests/requirements.txt >"$log" 2>&1; then
        if grep -q HASHES "$log"; then cat "$log"; exit 1; fi # not what was pinned: no reason to skip
        echo "no Python packages to be had: $(grep -m 1 ERROR "$log" || tail -n 1 "$log")"
        exit 3
    fi
    cp tests/requirements.txt "$home/requirements.txt"
}

build() {
    (cd ../.. && cargo build --locked --workspace --bins)
    rm -rf "$wheels"
    "$home/bin/maturin" build --locked --out "$wheels"
    "$home/bin/pip" install -q --disable-pip-version-check --no-deps --force-reinstall "$wheels"/*.whl
}

lints() {
    "$home/bin/ruff" check .
    "$home/bin/ruff" format --check .
    # engines' own modules are not installed here: what derives from them derives from Any
    "$home/bin/mypy" --allow-subclassing-any --no-warn-return-any --ignore-missing-imports kvd
    "$home/bin/mypy" tests/*.py
    (cd "$home" && bin/python -m mypy.stubtest kvd._kvd) # of the wheel, not of the folder beside
}

suites() {
    echo core
    local folder
    for folder in tests/*/; do
        if compgen -G "$folder/test_*.py" >/dev/null && [ ! -e "$folder/run.sh" ]; then basename "$folder"; fi
    done
}

suite() { # name, words for pytest
    local here=$PWD what
    what=("$here"/tests/test_*.py)
    # a process each: some stand in for another engine's modules
    if [ "$1" != core ]; then what=("$here/tests/$1"); fi
    cd "$home" # where no folder called kvd hides the package that was installed
    bin/pytest -c "$here/pyproject.toml" --rootdir "$here" -rs -m "not vllm and not sglang" "${what[@]}" "${@:2}" || [ $? -eq 5 ] # 5: all it found was skipped, and has said why
}

engine() { # name
    KVD_WHEEL=$(ls "$wheels"/*.whl) "tests/$1/run.sh"
}

case "${1:-}" in
home | build | lints | suites | suite | engine) "$@" ;;
*) sed -n '2,12s/^# \{0,1\}//p' "$(basename "$0")"; exit 2 ;;
esac
