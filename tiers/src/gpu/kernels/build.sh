#!/usr/bin/env bash
# Makes kvd.ptx of kvd.cu, the same bytes wherever it runs, and shows that it assembles; by hand, whenever kvd.cu has changed. Nothing of CUDA need be installed.
#
#   tiers/src/gpu/kernels/build.sh
#
# The compiler is NVRTC, which comes as a package of PyPI that is pinned here with its hash; it is put into the target folder. Its version says who can load the result:
# NVRTC 12.0 writes PTX ISA 8.0, which every driver of CUDA 12.0 and later loads (525 and on); that of CUDA 13 writes 9.x, which drivers of CUDA 12 refuse. Its target
# sm_70 is compiled by the driver for whatever GPU it finds, from 7.0 on: 13.x compilers no longer have that target, but their drivers still take such PTX. The nvcc of
# CUDA 12 is not on PyPI at all. Nothing newer is needed: the kernels use no instruction that 7.0 has not.
#
# ptxas is that of 12.9, the last that knows all of 7.0 to 12.0. It must find no spill and no stack.
set -euo pipefail
cd "$(dirname "$0")"
home=${CARGO_TARGET_DIR:-$(cd ../../../.. && pwd)/target}/kernels
mkdir -p "$home"
cat >"$home/requirements.txt" <<'END'
nvidia-cuda-nvrtc-cu12==12.0.140 --hash=sha256:8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071
nvidia-cuda-nvcc-cu12==12.9.86 --hash=sha256:5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0
END
if ! cmp -s "$home/requirements.txt" "$home/installed.txt"; then
    python3 -m venv --clear "$home/venv"
    "$home/venv/bin/pip" install -q --disable-pip-version-check --require-hashes --no-deps -r "$home/requirements.txt"
    cp "$home/requirements.txt" "$home/installed.txt"
fi
packages=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia

LD_LIBRARY_PATH=$packages/cuda_nvrtc/lib "$home/venv/bin/python" - kvd.cu "$home/kvd.ptx" <<'END'
import ctypes
import sys
import zlib

nvrtc = ctypes.CDLL("libnvrtc.so.12")
program = ctypes.c_void_p()


def text(size, get):
    length = ctypes.c_size_t()
    assert size(program, ctypes.byref(length)) == 0
    out = ctypes.create_string_buffer(length.value)
    assert get(program, out) == 0
    return out.value.decode()


source = open(sys.argv[1], "rb").read()
assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kvd.cu", 0, None, None) == 0
options = (ctypes.c_char_p * 2)(b"--gpu-architecture=compute_70", b"--std=c++14")
failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
if failed or log:
    sys.exit(log or f"NVRTC: error {failed}")
ptx = text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
# By this line a test sees whether kvd.cu has changed since.
ptx = f"// Made by build.sh, not by hand.\n// kvd.cu: CRC-32 {zlib.crc32(source):08x}, {len(source)} bytes\n{ptx}"
open(sys.argv[2], "w").write(ptx.rstrip("\n") + "\n")
END

chmod +x "$packages/cuda_nvcc/bin/ptxas" # wheels forget that
for arch in 70 75 80 86 89 90 100 120; do
    "$packages/cuda_nvcc/bin/ptxas" -v -arch=sm_$arch "$home/kvd.ptx" -o "$home/kvd.$arch.cubin" 2>"$home/ptxas.$arch"
    sed -n "s/.*entry function '\(.*\)' for '\(.*\)'/\2 \1:/p; s/.*\(Used [0-9]* registers\).*/    \1/p; s/^ *\([0-9]* bytes stack.*\)/    \1/p" "$home/ptxas.$arch"
    if grep -E '[1-9][0-9]* bytes (stack|spill)' "$home/ptxas.$arch"; then
        echo "a kernel for sm_$arch has memory of its own in HBM: make it smaller, or let it have more registers" >&2
        exit 1
    fi
done
mv "$home/kvd.ptx" kvd.ptx
