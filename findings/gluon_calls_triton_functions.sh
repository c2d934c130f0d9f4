#!/usr/bin/env bash
# Triton's Gluon: a kernel calls functions of Triton's language, but for those that make a tensor.
#
# Packages: triton 3.7.1 and 3.9.0; no GPU (compiled ahead of time for sm_90), no PyTorch.
# Seen: a Gluon kernel that hands a tensor to a `triton.jit` function compiles where the function
#   computes by elements, reduces, or reshapes: results take their layouts from the operands. Where it
#   makes a tensor, by `tl.arange`, `tl.zeros`, or even `tl.full([], ...)`, a scalar, which has no
#   layout, compiling ends in a TypeError of Python's about a missing argument `layout`.
# Expected: that a kernel of one language calls functions of the other either always or never, or an
#   error that says which operation is not for Gluon. A literal in the place of the scalar compiles.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/calls.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource


@triton.jit
def elements(x):
    return tl.where(x > 20.0, x, x / (1.0 + tl.exp(-x)))


@triton.jit
def reduced(x):
    return x - tl.sum(x, 0)


@triton.jit
def reshaped(x):
    return tl.reshape(tl.reshape(x, [2, 64]), [128])


@triton.jit
def literal(x):
    return x + 2.0


@triton.jit
def scalar(x):
    return x + tl.full([], 2.0, tl.float32)


@triton.jit
def zeros(x):
    return x + tl.zeros([128], tl.float32)


@triton.jit
def ramp(x):
    return x + tl.arange(0, 128).to(tl.float32)


@gluon.jit
def kernel(x, FUNCTION: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = x + gl.arange(0, 128, layout)
    y = FUNCTION(gl.load(at))
    gl.store(at, gl.convert_layout(y, layout))


found = {}
for function in (elements, reduced, reshaped, literal, scalar, zeros, ramp):
    types, target = {"x": "*fp32", "FUNCTION": "constexpr"}, GPUTarget("cuda", 90, 32)
    source = GluonASTSource(kernel, types, {(1,): function}, {})
    name = function.fn.__name__
    try:
        triton.compile(source, target=target, options={"num_warps": 4})
        found[name] = "compiles"
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        about = "layout" if "argument: 'layout'" in str(error) else str(error)
        found[name] = f"{type(error).__name__}: {about}"
print(f"triton {triton.__version__}: {found}", flush=True)
refused = dict.fromkeys(("scalar", "zeros", "ramp"), "TypeError: layout")
expected = dict.fromkeys(("elements", "reduced", "reshaped", "literal"), "compiles") | refused
raise SystemExit(found != expected)
PYTHON
for version in 3.7.1 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
  TRITON_ALWAYS_COMPILE=1 TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/calls.py" \
    2>"$folder/$version.txt" || { tail -n 3 "$folder/$version.txt"; echo changed; exit 1; }
done
echo "as described: what makes a tensor has no layout"
