#!/usr/bin/env bash
# Triton's Gluon: a product of tensor cores that is unfinished at the end of a loop makes all wait.
#
# Packages: triton 3.6.0 and 3.8.0, with the ptxas that they bring; no GPU (compiled ahead of time for
#   sm_90), no PyTorch.
# Seen: a loop with two accumulators, in which each product of 64 x 64 x 128 in FP8 (four instructions)
#   is read while the other one goes on. Where both are started and finished within the loop, the machine
#   code has one wait for each product. Where one is handed to the next round, as `is_async` and
#   `warpgroup_mma_wait(1, ...)` allow, it has a wait after each of all instructions, so that nothing runs
#   beside them. The results are right. Nothing is said: ptxas tells of it, as C7514, only with -v.
# Expected: as many waits as the kernel has, or a warning.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/carried.py" <<'PYTHON'
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def _start(a, b, part):
    return warpgroup_mma(a, b, warpgroup_mma_init(part), use_acc=False, is_async=True)


@gluon.jit
def kernel(y, steps, CARRIED: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    a = gl.allocate_shared_memory(gl.float8e4nv, [64, 128], shared)
    b = gl.allocate_shared_memory(gl.float8e4nv, [64, 128], shared).permute((1, 0))
    total = gl.zeros((64, 64), gl.float32, layout)
    even = gl.zeros((64, 64), gl.float32, layout)
    odd = gl.zeros((64, 64), gl.float32, layout)
    if CARRIED:
        first = _start(a, b, even)
        for _ in range(steps):
            second = _start(a, b, odd)
            even = warpgroup_mma_wait(1, deps=[first])
            total += even
            first = _start(a, b, even)
            odd = warpgroup_mma_wait(1, deps=[second])
            total += odd
        total += warpgroup_mma_wait(0, deps=[first])
    else:
        for _ in range(steps):
            first = _start(a, b, even)
            second = _start(a, b, odd)
            even = warpgroup_mma_wait(1, deps=[first])
            total += even
            odd = warpgroup_mma_wait(0, deps=[second])
            total += odd
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 64, gl.SliceLayout(0, layout))
    gl.store(y + rows[:, None] * 64 + cols[None, :], total)


def machine_code(carried):
    types = {"y": "*fp32", "steps": "i32", "CARRIED": "constexpr"}
    source = GluonASTSource(kernel, types, {(2,): carried}, {})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile() as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


found = {}
for carried in (False, True):
    code = machine_code(carried)
    products, waits = (len(re.findall(name, code)) for name in ("QGMMA", r"WARPGROUP\.DEPBAR"))
    found["carried" if carried else "in the loop"] = products, waits
print(f"triton {triton.__version__}: products and waits: {found}", flush=True)
raise SystemExit(found != {"in the loop": (8, 2), "carried": (12, 12)})
PYTHON
for version in 3.6.0 3.8.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
  TRITON_CACHE_DIR="$folder/cache$version" "$folder/$version/bin/python" "$folder/carried.py" \
    2>"$folder/$version.txt" || { tail -n 3 "$folder/$version.txt"; echo changed; exit 1; }
done
echo "as described: a product that is unfinished at a loop's end has all products wait"
