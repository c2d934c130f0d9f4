"""Random sequences of ops, as source: what `Life.build` and `Life.insert` take."""

from random import Random

PLAIN = ("GELU()", "GELU('none')", "QGELU()", "ReLU()", "SReLU()", "SiLU()")
GATED = ("GEGLU", "QGEGLU", "ReGLU", "SReGLU", "SwiGLU", "GLU", "ClampedSwiGLU", "SiTUGLU")
NORMS = ("RMSNorm", "LayerNorm")
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
QUANTIZED_WIDTHS = (32, 64, 128)
"""Widths that every recipe takes."""
CHANNELS = ("a", "b")


class Draft:
    """Draws ops one after another, keeping the width and the channels that there are.

    widths: what a Linear may have as out_features.
    """

    def __init__(self, random: Random, widths: tuple[int, ...] = WIDTHS) -> None:
        self.random, self.sizes = random, widths
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
            found.append(f"Linear({width}, {start})")
        return found

    def op(self, width: int, depth: int) -> tuple[str, int]:
        """Source of one op that takes `width`, and the width that it gives."""
        one = self.random.choice
        kinds = ["plain", "norm", "linear", "linear", "bias", "tee", "add"] * 2
        kinds += ["l2", "scale", "dropout", "still"] + ["residual"] * 3 * (depth > 0)
        kinds += ["gated"] * 4 * (width % 2 == 0 and width // 2 >= min(self.sizes))
        kind = one(kinds)
        if kind == "gated":
            block = one([None, None, *(n for n in (1, 2) if width % (2 * n) == 0)])
            return f"{one(GATED)}(glu_interleave_size={block})", width // 2
        if kind == "linear":
            out, bias = one(self.sizes), one((True, False))
            return f"Linear({width}, {out}, bias={bias})", out
        return self.of_same_width(kind, width, depth), width

    def of_same_width(self, kind: str, width: int, depth: int) -> str:
        """Source of an op that keeps the width."""
        one = self.random.choice
        if kind == "plain":
            return one(PLAIN)
        if kind == "norm":
            affine, zero = one((True, True, False)), one((True, False))
            more = f"elementwise_affine={affine}, zero_centered_gamma={zero}"
            return f"{one(NORMS)}({width}, eps=0.1, {more})"
        if kind == "bias":
            return f"Bias({width})"
        if kind == "l2":
            return "L2Normalization(eps=0.1)"
        if kind == "scale":
            return f"ConstantScale({one((-0.5, 1.0, 2.0))})"
        if kind == "dropout":
            return f"Dropout({one((0.0, 0.4, 1.0))})"
        if kind == "residual":
            inner = self.sequence(width, self.random.randint(0, 3), depth - 1, keep=True)
            return f"Residual({', '.join(inner)})"
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
        fitting = [name for name, other in self.widths.items() if other == width]
        name = one([None, *free, *fitting, *fitting])
        if name is None:
            return "Add()"
        if name in free:
            self.extra.add(name)
        return f"Add({name!r})"
