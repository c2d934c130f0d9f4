"""A fault of lives: products in FP8 lay on the other side of a limit, and a square behind it."""

from opsgraph.testing.fuzz import Life

life = Life("bfloat16", 37, recompute=True, backends=("cpu", "aten", "reference"))
life.build(
    128, "Linear(128, 32, bias=False)", "Tee('a', to_caller=False)", "Residual()",
    "Residual(Linear(32, 64), BasicLinear(64, 64), SReGLU(glu_interleave_size=2))",
    "ClippedGELU(1.5)",
)  # fmt: skip
life.call(lead=(48,), seed=943, recipes=("exact backward",))
