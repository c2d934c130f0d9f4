#!/usr/bin/env bash
# Triton's Gluon: a partition of warps takes an argument that is None, but no variable that is None.
#
# Packages: triton 3.6.0 and 3.9.0; no GPU (compiled ahead of time for sm_90), no PyTorch.
# Seen: a kernel's argument that was given as None is handed on to a function that is called, and
#   through `gl.warp_specialize` to one that a group of warps runs; there `added is not None` leaves the
#   code out. A variable that the kernel sets to None can be handed to a called function as well.
#   Handed through `gl.warp_specialize` it ends compiling in an AttributeError about None having no
#   `type`, though both are None.
# Expected: that both forms, or neither, take it.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/none.py" <<'PYTHON'
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource


@gluon.jit
def _store(x, added, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = x + gl.arange(0, 128, layout)
    y = gl.load(at) + value
    if added is not None:
        y += gl.load(added + gl.arange(0, 128, layout))
    gl.store(at, y)


@gluon.jit
def _nothing(x):
    pass


@gluon.jit
def kernel(x, y, WAY: gl.constexpr):
    local = None
    if WAY == "argument called":
        _store(x, y, 1.0)
    elif WAY == "variable called":
        _store(x, local, 1.0)
    elif WAY == "argument of a partition":
        gl.warp_specialize([(_store, (x, y, 1.0)), (_nothing, (x,))], [4], [24])
    else:
        gl.warp_specialize([(_store, (x, local, 1.0)), (_nothing, (x,))], [4], [24])


found = {}
WAYS = "argument called", "variable called", "argument of a partition", "variable of a partition"
for way in WAYS:
    types = {"x": "*fp32", "y": "constexpr", "WAY": "constexpr"}
    source = GluonASTSource(kernel, types, {(1,): None, (2,): way}, {})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        found[way] = "compiles"
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        about = "None has no type" if "no attribute 'type'" in str(error).replace("\\", "") else str(error)
        found[way] = f"{type(error).__name__}: {about}"
print(f"triton {triton.__version__}: {found}", flush=True)
expected = dict.fromkeys(WAYS, "compiles") | {WAYS[-1]: "CompilationError: None has no type"}
raise SystemExit(found != expected)
PYTHON
for version in 3.6.0 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
  TRITON_ALWAYS_COMPILE=1 TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/none.py" \
    2>"$folder/$version.txt" || { tail -n 3 "$folder/$version.txt"; echo changed; exit 1; }
done
echo "as described: a variable that is None goes into no partition"
