"""Importing the package."""

import gc
import subprocess
import sys


def test_garbage_is_collected_after_the_import_if_it_was_before() -> None:
    assert gc.isenabled()
    code = "import gc; gc.disable(); import opsgraph; assert not gc.isenabled()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_imports_no_compiler() -> None:
    """`torch._dynamo` takes seconds. The first call makes a plan, the second one is recorded."""
    code = """
import sys, torch, opsgraph as og
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
    subprocess.run([sys.executable, "-c", code], check=True)
