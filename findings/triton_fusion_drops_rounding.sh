#!/usr/bin/env bash
# Triton: with floating-point fusion, its default, a rounding to bfloat16 between a product and a sum
# is gone.
#
# Package: triton 3.7.1; no GPU (compiled ahead of time for sm_90), no PyTorch.
# Seen: `(a * b).to(tl.bfloat16).to(tl.float32) + c` of bfloat16 a, b and c, stored as bfloat16, is one
#   `fma.rn.bf16`, which rounds once. With enable_fp_fusion=False it is `mul.rn.bf16` and
#   `add.rn.bf16`, which round twice, as the source says.
# Expected: a cast that is written out is kept. A kernel that has to give the bits of two bfloat16
#   operations must be compiled without fusion.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/fusion.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def affine(a, b, c, y):
    at = tl.arange(0, 128)
    product = tl.load(a + at).to(tl.float32) * tl.load(b + at).to(tl.float32)
    rounded = product.to(tl.bfloat16).to(tl.float32)
    tl.store(y + at, (rounded + tl.load(c + at).to(tl.float32)).to(tl.bfloat16))


found = {}
for fusion in (True, False):
    source = ASTSource(fn=affine, signature=dict.fromkeys("abcy", "*bf16"))
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion}
    )
    found[fusion] = sorted(set(re.findall(r"(?:fma|mul|add)\.rn\.bf16", made.asm["ptx"])))
    print(f"triton {triton.__version__}, enable_fp_fusion={fusion}: {found[fusion]}")
raise SystemExit(found != {True: ["fma.rn.bf16"], False: ["add.rn.bf16", "mul.rn.bf16"]})
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check triton==3.7.1
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/fusion.py" || { echo changed; exit 1; }
echo "as described: fusion drops the rounding"
