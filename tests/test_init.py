"""Importing the package, and what its first uses import."""

import gc
import subprocess
import sys

CODE = """
import gc, runpy, sys
gc.disable()
import torch, opsgraph as og
assert not gc.isenabled()
gc.enable()

sys.argv[1:] = ["doctor"]
try:
    runpy.run_module("opsgraph", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "triton" not in sys.modules

from opsgraph.ops import Linear, RMSNorm, SwiGLU
module = og.Sequential(RMSNorm(32), Linear(32, 64), SwiGLU(), Linear(32, 32))
x = torch.randn(16, 32, requires_grad=True)
for recipe in (None, og.recipe.DelayedScaling()):
    for _ in range(3):
        with og.autocast(enabled=recipe is not None, recipe=recipe):
            y = module(x)
        y.sum().backward()
assert "torch._dynamo" not in sys.modules
"""


def test_no_use_imports_more_than_it_needs() -> None:
    """One process for all, for a use imports what the next one has no need of.

    The import leaves the collection of garbage as it was. `python -m opsgraph doctor` takes no
    Triton. `torch._dynamo` takes seconds: training, whose first call makes a plan and whose second
    one is recorded, does without.
    """
    assert gc.isenabled()
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions\n")
