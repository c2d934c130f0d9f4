"""A fault of lives: they took a backward of values as they were for one in FP8."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 64, backends=("cpu", "aten", "reference"))
life.build(
    64, "Linear(64, 64, bias=False)", "BasicLinear(64, 128)", "SwiGLU(gate_second=True)",
    "Residual(Add(), SwiGLU(glu_interleave_size=2), Linear(32, 32), Linear(32, 64))",
    "Residual(Identity(), SwiGLU(), Linear(32, 64))", "Bias(64)",
)  # fmt: skip
life.insert(6, "L2Normalization(eps=0.1)")
life.call(lead=(16,), recipes=("blocks", "exact backward"))
