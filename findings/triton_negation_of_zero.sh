#!/usr/bin/env bash
# Triton 3.8: the negation of 0.0 is -0.0; up to 3.7 it was 0.0.
#
# Packages: triton 3.7.1 and 3.8.0, numpy 2.4.1; no GPU (compiled ahead of time for sm_90), no PyTorch.
# Seen: 3.7.1 computes `-x` as `0 - x`, in the interpreter and in PTX (`sub.f32`), which loses the
#   sign of a zero. 3.8.0 turns the sign, in both: there is no `sub.f32`.
# Expected: what 3.8.0 does, as IEEE 754, NumPy, PyTorch and CUDA C++. A kernel that has to give the
#   same bits with all versions needs `x * -1.0`.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/negation.py" <<'PYTHON'
import os
import re
import sys

import numpy as np
import triton
import triton.language as tl


@triton.jit
def negate(address, N: tl.constexpr):
    y = address.to(tl.pointer_type(tl.float32)) + tl.arange(0, N)
    tl.store(y, -tl.load(y))


if os.environ.get("TRITON_INTERPRET") == "1":
    y = np.array([0.0, 1.0], np.float32)
    negate[(1,)](y.ctypes.data, N=2)
    print(f"triton {triton.__version__}, interpreted: {y[0]}, {y[1]}")
    raise SystemExit(bool(np.signbit(y[0])) != (sys.argv[1] == "-0.0") or bool(y[1] != -1))

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(fn=negate, signature={"address": "i64", "N": "constexpr"}, constexprs={(1,): 128})
text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
subtracts = "sub.f32" in text
print(f"triton {triton.__version__}, PTX: {'0 - x' if subtracts else 'no subtraction'}")
raise SystemExit(subtracts != (sys.argv[1] == "0.0"))
PYTHON
python3 -m venv "$folder/venv"
export TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1
for case in "3.7.1=0.0" "3.8.0=-0.0"; do
	"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
		"triton==${case%%=*}" numpy==2.4.1
	for interpret in 1 0; do
		TRITON_INTERPRET=$interpret "$folder/venv/bin/python" "$folder/negation.py" "${case#*=}" ||
			{ echo changed; exit 1; }
	done
done
echo "as described: 3.8.0 keeps the sign of a zero"
