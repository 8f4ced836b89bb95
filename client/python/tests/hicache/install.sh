#!/bin/bash
# usage: install.sh VENV -- an environment with the real SGLang 0.5.23, for `pytest -m slow tests/hicache`.
# CPU only: SGLang comes without its dependencies (GPU kernels), what its storage interface imports is pinned with hashes.
set -eu
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
wheel=sglang==0.5.23
hash=00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937
start=$(date +%s)
python3 -m venv "$venv"
"$venv/bin/pip" -q install uv==0.13.9
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --require-hashes -r "$here/requirements.txt"
echo "$wheel --hash=sha256:$hash" >"$venv/sglang.txt"
"$venv/bin/pip" -q install --no-deps --only-binary :all: --require-hashes -r "$venv/sglang.txt"
echo "packages in $(($(date +%s) - start)) s, $(du -s --block-size=1M "$venv" | cut -f1) MiB"
(cd "$here/../.." && VIRTUAL_ENV="$venv" "$venv/bin/maturin" develop -q --release)
echo "with kvd built: $(($(date +%s) - start)) s"
