"""A fault of lives: of rows of nearly one value, results on the way are all rounded alike."""

from opsgraph.testing.fuzz import Life

ACT = "activation='qgeglu', normalization='RMSNorm', eps=0.1"
life = Life("bfloat16", 39)
life.build(
    1, "BasicLinear(1, 1)", f"LayerNormMLP(1, 4, {ACT}, bias=True, zero_centered_gamma=True)",
    f"LayerNormMLP(1, 6, {ACT}, bias=False)", "RMSNorm(1, eps=0.1)", "Bias(1)", "Residual()",
    "Linear(1, 4, bias=False)", "Residual(Linear(4, 12), Linear(12, 4, bias=False))",
    "ClampedSwiGLU(glu_interleave_size=2)", "ReGLU()", "Wave(np.float32(1.5))",
)  # fmt: skip
life.average(475)
life.call(size=0.01)
