#!/usr/bin/env bash
# Triton 3.7: the warps of a three-dimensional tile go to another dimension than in 3.6.
#
# Packages: triton 3.6.0 and 3.7.1; no GPU (compiled ahead of time for sm_90), no PyTorch. Two
#   minutes, most of it to install.
# Seen: a tile [2, 4, 512] of bf16, addressed as rows of 2 x 512 values, loaded by 8 warps. Two warps
#   cover the 512. The other factor of four goes to the first dimension first in 3.6.0,
#   warpsPerCTA = [2, 2, 2], and all to the second in 3.7.1, [1, 4, 2].
# Expected: the same layout, or a line in the release notes. A sum over the first dimension stays in
#   a thread with the latter layout, and goes through shared memory with the former.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/layout.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(x, y, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    chunk = tl.arange(0, C)[:, None, None]
    row = tl.arange(0, R)[None, :, None]
    col = tl.arange(0, K)[None, None, :]
    at = row * (C * K) + chunk * K + col
    tl.store(y + at, tl.load(x + at) + 1.0)


sizes = {"C": 2, "R": 4, "K": 512}
source = ASTSource(
    fn=copy,
    signature={"x": "*bf16", "y": "*bf16", **dict.fromkeys(sizes, "constexpr")},
    constexprs={(copy.arg_names.index(name),): size for name, size in sizes.items()},
    attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
found = set(re.findall(r"warpsPerCTA = (\[[^]]*\])", made.asm["ttgir"]))
print(f"triton {triton.__version__}: {', '.join(sorted(found))}")
raise SystemExit(found != {sys.argv[1]})
PYTHON
python3 -m venv "$folder/venv"
export TRITON_CACHE_DIR="$folder/cache"
for case in "3.6.0=[2, 2, 2]" "3.7.1=[1, 4, 2]"; do
	"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "triton==${case%%=*}"
	"$folder/venv/bin/python" "$folder/layout.py" "${case#*=}" || { echo changed; exit 1; }
done
echo "as described: the warps went to another dimension"
