#!/usr/bin/env bash
# The vLLM suite: real engines over a real daemon. Installs vLLM (install.sh), then the wheel; further words go to pytest.
#
#   KVD_WHEEL    the package, built; without it, it is built here
#   VLLM_VENV    where vLLM is or comes to be; without it, in the target folder
#
# Where there can be no vLLM it says SKIPPED, and why. Needs kvd and kvctl as built by cargo (KVD_BIN, or the target folder).
set -euo pipefail
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-$(cd ../../../.. && pwd)/target}
export CARGO_TARGET_DIR=$target KVD_BIN=${KVD_BIN:-$target/debug/kvd}
venv=${VLLM_VENV:-$target/python/vllm}

status=0
why=$(./install.sh "$venv") || status=$?
case $status in
0) ;;
3) echo "SKIPPED: vLLM: $why" && exit 0 ;;
*) echo "$why" && exit "$status" ;;
esac
wheel=${KVD_WHEEL:-}
if [ -z "$wheel" ]; then
    "$venv/bin/maturin" build -q --profile dev --manifest-path ../../Cargo.toml --out "$target/python/wheels"
    wheel=$(ls -t "$target"/python/wheels/*.whl | head -n 1)
fi
"$venv.tools/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --reinstall "$wheel"
run=("$venv/bin/python" -m pytest -q -rs --rootdir ../.. -p no:cacheprovider "$@")
"${run[@]}" .
# torch is here, too
"${run[@]}" ../pytorch
"${run[@]}" ../trtllm
