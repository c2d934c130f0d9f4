"""Random sequences of ops, as source: what `Life.build` and `Life.insert` take."""

from random import Random
from typing import Any

PLAIN = ("GELU()", "GELU('none')", "QGELU()", "ReLU()", "SReLU()", "SiLU()", "Sigmoid()", "Tanh()")
RARE = ("ReLU6()", "Hardswish()", "Mish()", "LeakyReLU(0.1)", "ClippedGELU(1.5)", "XIELU()")
GATED = ("GEGLU", "QGEGLU", "ReGLU", "SReGLU", "SwiGLU", "GLU", "ClampedSwiGLU", "SiTUGLU")
NORMS = ("RMSNorm", "LayerNorm")
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
QUANTIZED_WIDTHS = (32, 64, 128)
"""Widths that every recipe takes."""
NOTHING = 0.02
"""How often a width is 0."""
CHANNELS = ("a", "b")
SCALES = ("-0.5", "1.0", "2.0", "np.float32(1.5)", "torch.tensor(0.5, device='cpu')")
FACTORS = (0.5, -0.75, 0.22, 2, 1.0)
"""Of scaled residuals."""
SUMS = "Add", "ScaledAdd", "WeightedAdd"
OF_TORCH = ("nn.GELU()", "nn.Softplus()", "nn.SiLU()")
ACTIVATIONS = ("gelu", "geglu", "qgelu", "qgeglu", "relu", "reglu", "srelu", "sreglu", "silu") + (
    "swiglu", "glu", "clamped_swiglu", "situglu", "gelu_python", "mish", "linear",
)  # fmt: skip
FLAGS = ("zero_centered_gamma", "checkpoint", "delay_wgrad_compute", "fuse_wgrad_accumulation")
RETURNS = ("return_bias", "return_layernorm_output")

WRONG: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("GELU", "approximate", ("fats", 3, None)),
    ("SwiGLU", "glu_interleave_size", (-1, 0, 2.0, "2")),
    ("GEGLU", "gate_second", ("yes", 2, None)),
    ("RMSNorm", "eps", (-1.0, "1e-5", float("nan"))),
    ("LayerNorm", "eps", (None, "1e-5", float("inf"))),
    ("LayerNorm", "normalized_shape", (-1, "8", 2.5, (4, "8"), ())),
    ("Dropout", "p", (-0.1, 1.5, "0.5", None)),
    ("Linear", "in_features", (-1, "8", 1.5)),
    ("BasicLinear", "out_features", (-1, "8", True)),
    ("Linear", "bias", (None, "no")),
    ("ConstantScale", "scale", ("2", None, True)),
    ("LeakyReLU", "negative_slope", ("0.1", None)),
    ("Tee", "name", (3, ("a",))),
    ("Sequential", "planner", ("fast", 1)),
    ("Sequential", "backends", ("cpu", ("cpus",), 3)),
    ("Sequential", "recompute", ("no", 2)),
    ("recipe.DelayedScaling", "amax_history_len", (0, 1.5, "16", True)),
    ("recipe.DelayedScaling", "margin", ("1", 0.5, 1000)),
    ("recipe.DelayedScaling", "fp8_format", ("E4M3", 8)),
    ("recipe.Float8CurrentScaling", "backward_override", ("plain", 1)),
)
"""Arguments that are refused."""


class Draft:
    """Draws ops one after another, keeping the width and the channels that there are.

    widths: what a Linear may have as out_features. more: arguments of every Linear. lazy: leave
    sizes out. scaled: draw scaled residuals too. transposed: draw transposed layers too.
    """

    def __init__(
        self,
        random: Random,
        widths: tuple[int, ...] = WIDTHS,
        more: str = "",
        lazy: bool = False,
        scaled: bool = False,
        transposed: bool = False,
    ) -> None:
        self.random, self.sizes, self.more, self.lazy = random, widths, more, lazy
        self.scaled, self.transposed = scaled, transposed
        self.widths: dict[str, int] = {}
        self.extra: set[str] = set()
        """Names that an Add has read without a Tee: no Tee may come after it."""

    def sequence(self, width: int, count: int, depth: int = 1, keep: bool = False) -> list[str]:
        """Source of `count` ops that take `width`; with `keep` the last brings it back."""
        found, start = [], width
        for _ in range(count):
            source, width = self.op(width, depth)
            found.append(source)
        if keep and width != start:
            found.append(self.linear(width, start))
        return found

    def op(self, width: int, depth: int) -> tuple[str, int]:
        """Source of one op that takes `width`, and the width that it gives."""
        one = self.random.choice
        kinds = ["plain", "norm", "linear", "linear", "bias", "tee", "add"] * 2
        kinds += ["l2", "scale", "dropout", "still"] + ["residual"] * 3 * (depth > 0)
        kinds += ["layer scale"] + ["module"] * (depth == 2 and width > 0 and not self.lazy)
        kinds += ["wave", "offset", "offset"]
        kinds += ["add", "residual"] * 2 * (self.scaled and depth > 0)
        kinds += ["gated"] * 4 * (width % 2 == 0 and width // 2 >= min(self.sizes))
        kind = one(kinds)
        if kind == "gated":
            block = one([None, None, *(n for n in (1, 2) if width % (2 * n) == 0)])
            more = one(("", "", "", ", gate_second=True", ", round_gate=True"))
            return f"{one(GATED)}(glu_interleave_size={block}{more})", width // 2
        if kind == "linear":
            out = 0 if self.random.random() < NOTHING else one(self.sizes)
            return self.linear(width, out), out
        if kind == "module":
            if one((True, False)):
                return f"LayerNormMLP({width}, {one(self.sizes)}, {self.mlp()})", width
            return one((*OF_TORCH, f"nn.Linear({width}, {width})")), width
        return self.of_same_width(kind, width, depth), width

    def linear(self, width: int, out: int) -> str:
        """Source of a linear layer."""
        short = self.lazy and self.random.random() < 0.5
        sizes = f"out_features={out}" if short else f"{width}, {out}"
        bias = self.random.choice((", bias=True", ", bias=False", None))
        if self.transposed and self.random.random() < 0.4:
            return f"TransposedLinear({sizes}{bias or ''})"
        if bias is None:
            return f"BasicLinear({sizes}{self.more})"
        return f"Linear({sizes}{bias}{self.more})"

    def mlp(self) -> str:
        """Arguments of a LayerNormMLP, but for its sizes."""
        one = self.random.choice
        flags = [f"{name}=True" for name in FLAGS[:3] if self.random.random() < 0.2]
        more = [f"activation={one(ACTIVATIONS)!r}", f"normalization={one(NORMS)!r}", "eps=0.1"]
        return ", ".join([*more, f"bias={one((True, True, False))}", *flags])

    def of_same_width(self, kind: str, width: int, depth: int) -> str:
        """Source of an op that keeps the width."""
        one = self.random.choice
        if kind == "plain":
            return one((*PLAIN, *PLAIN, *RARE))
        if kind in ("layer scale", "offset"):
            return f"{'LayerScale' if kind == 'layer scale' else 'Offset'}({width})"
        if kind == "wave":
            return f"Wave({one(SCALES)})"
        if kind == "norm":
            affine, zero = one((True, True, False)), one((True, False))
            more = f"elementwise_affine={affine}, zero_centered_gamma={zero}"
            size = "" if self.lazy else one((f"{width}, ", f"np.int64({width}), "))
            norm = one(NORMS)
            eps = one((0.1, 0.1, None)) if affine and norm == "RMSNorm" else 0.1
            return f"{norm}({size}eps={eps}, {more})"
        if kind == "bias":
            return f"Bias({width})"
        if kind == "l2":
            return "L2Normalization(eps=0.1)"
        if kind == "scale":
            return f"ConstantScale({one(SCALES)})"
        if kind == "dropout":
            return f"Dropout({one((0.0, 0.4, 1.0))})"
        if kind == "residual":
            lazy, self.lazy = self.lazy, False  # neighbours do not tell sizes across its bounds
            inner = self.sequence(width, self.random.randint(0, 3), depth - 1, keep=True)
            self.lazy = lazy
            return f"Residual({', '.join([*inner, *self.factors()])})"
        return self.wire(kind, width) if kind in ("tee", "add") else "Identity()"

    def wire(self, kind: str, width: int) -> str:
        """A Tee under a new name, or an Add of any name whose width fits."""
        one = self.random.choice
        free = [name for name in CHANNELS if name not in self.widths]
        if kind == "tee":
            name = one([None, *(name for name in free if name not in self.extra)])
            if name is None:
                return "Tee()"
            self.widths[name] = width
            return f"Tee({name!r}, to_caller={one((False, False, True))})"
        name = self.read(width)
        if self.lazy and self.widths.get(name or "") != width:
            return "Identity()"  # an extra input's size may not be known yet
        return self.sum_of(name, width)

    def read(self, width: int) -> str | None:
        """Any name whose width fits; None for an extra input without one."""
        free = [name for name in CHANNELS if name not in self.widths]
        fitting = [name for name, other in self.widths.items() if other == width]
        name = self.random.choice([None, *free, *fitting, *fitting])
        if name in free and not self.lazy:
            self.extra.add(name)
        return name

    def factors(self) -> list[str]:
        """Arguments of a Residual."""
        if not self.scaled:
            return []
        names = [n for n in ("scale", "residual_scale") if self.random.random() < 0.4]
        return [f"{name}={self.random.choice(FACTORS)}" for name in names]

    def sum_of(self, name: str | None, width: int) -> str:
        """Source of a sum with what a name stands for."""
        if not self.scaled:
            return "Add()" if name is None else f"Add({name!r})"
        last = {"Add": "", "ScaledAdd": f", {self.random.choice(FACTORS)}"}
        kind = self.random.choice(SUMS)
        return f"{kind}({name!r}{last.get(kind, f', {width}')})"


def of_torch(random: Random, widths: tuple[int, ...], width: int, count: int) -> list[str]:
    """Source of torch.nn's modules in a sequence that takes `width`; some stand there twice."""
    one = random.choice
    found: list[str] = []
    for _ in range(count):
        out = one(widths)
        norms = f"RMSNorm({width})", f"LayerNorm({width}, eps=0.1)", f"RMSNorm({width}, eps=0.1)"
        plain = "GELU()", "SiLU()", "GELU('tanh')", "Dropout(0.4)", "Tanh()", "LeakyReLU(0.2)"
        linear = f"Linear({width}, {out}, bias={one((True, False))})"
        source = one((linear, linear, one(norms), one(plain), one(plain), "Identity()"))
        width = out if source == linear else width
        found.append(source)
    return found
