#!/usr/bin/env bash
# Triton's Gluon: the TMA copies have no name that Triton 3.7 and 3.9 both take.
#
# Packages: triton 3.7.1, 3.8.0 and 3.9.0; no GPU (compiled ahead of time for sm_90), no PyTorch.
# Seen: a kernel that copies a tile into shared memory and out again compiles with
#   `async_copy_global_to_shared` and `async_copy_shared_to_global` in 3.7.1, with `async_load` and
#   `async_store` in 3.9.0. In 3.7.1 the new names are not there; in 3.9.0 the old ones are, and
#   raise when a kernel is compiled, so `hasattr` does not tell. 3.8.0 takes both.
# Expected: a warning for some releases before a name goes. A kernel for several releases has to look
#   for the new names first.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/copies.py" <<'PYTHON'
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

NAMES = {
    "old": ("async_copy_global_to_shared", "async_copy_shared_to_global"),
    "new": ("async_load", "async_store"),
}
found = {}
for age, (into, out) in NAMES.items():
    if not hasattr(tma, into):
        found[age] = "absent"
        continue
    copy_in, copy_out = getattr(tma, into), getattr(tma, out)

    @gluon.jit
    def kernel(x, y):
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        source = tma.make_tensor_descriptor(x, [64, 64], [64, 1], [64, 64], layout)
        target = tma.make_tensor_descriptor(y, [64, 64], [64, 1], [64, 64], layout)
        tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
        bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bar, count=1)
        mbarrier.expect(bar, source.block_type.nbytes)
        copy_in(source, [0, 0], bar, tile)
        mbarrier.wait(bar, 0)
        copy_out(target, [0, 0], tile)
        tma.store_wait(0)

    source = GluonASTSource(kernel, {"x": "*bf16", "y": "*bf16"}, {})
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        found[age] = "compiles" if "cp.async.bulk.tensor" in made.asm["ptx"] else "no copy"
    except Exception as error:
        text = " ".join(str(error).split()) + " ".join(str(error.__cause__).split())
        found[age] = "removed" if "has been removed" in text else text[-300:]
print(f"triton {triton.__version__}: {found}")
EXPECTED = {
    "3.7": {"old": "compiles", "new": "absent"},
    "3.8": {"old": "compiles", "new": "compiles"},
    "3.9": {"old": "removed", "new": "compiles"},
}
raise SystemExit(found != EXPECTED[triton.__version__[:3]])
PYTHON
for version in 3.7.1 3.8.0 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version"
  TRITON_ALWAYS_COMPILE=1 TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/copies.py" \
    2>"$folder/$version.txt" || { tail -n 3 "$folder/$version.txt"; echo changed; exit 1; }
done
echo "as described: no name for 3.7 and 3.9"
