"""Drawing a life: its start and its steps, all from one seed."""

from collections.abc import Callable, Sequence
from inspect import signature
from random import Random
from typing import Any

from .drafts import (
    ACTIVATIONS,
    FLAGS,
    GATED,
    NORMS,
    NOTHING,
    PLAIN,
    QUANTIZED_WIDTHS,
    RARE,
    RETURNS,
    WIDTHS,
    WRONG,
    Draft,
    of_torch,
)
from .edges import BREAKS
from .life import Life
from .lives import Step
from .own import FUSERS
from .scaled import KINDS
from .states import RECIPES

LEADS = ((4,), (), (1,), (5,), (0,), (2, 3), (2, 0), (16,), (32,), (33,))
LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded", "level")
SIZES = (1.0, 1.0, 1.0, 1e-2, 10.0)
BACKENDS = {
    "cpu": (("cpu", "reference"), ("cpu", "aten", "reference")),
    "cuda": (("triton", "aten", "reference"), ("triton", "reference")),
    "interpreter": (("triton", "cublaslt", "reference"), ("triton", "reference")),
}
MISUSES = ("none", "list", "surplus", "none surplus")
DTYPES = ("float32", "float32", "bfloat16", "float16", "float64")
ATTRIBUTES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("eps", (0.1, 0.5)),
    ("p", (0.0, 0.3, 1.0)),
    ("approximate", ("tanh", "none")),
    ("scale", (-0.5, 2.0, 3.0)),
    ("zero_centered_gamma", (True, False)),
    ("glu_interleave_size", (None, 1)),
    ("to_caller", (True, False)),
    ("gate_second", (True, False)),
    ("negative_slope", (0.3,)),
    ("limit", (0.5, 2.0)),
)
OF_MLP: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("eps", (0.1, 0.5)),
    ("activation", ACTIVATIONS),
    ("normalization", ("RMSNorm", "LayerNorm")),
    *((name, (True, False)) for name in (*FLAGS[:3], *RETURNS)),
)
OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("planner", ("greedy", "optimal")),
    ("recompute", (True, False)),
    ("checkpoint", (True, False)),
    ("delay_wgrad_compute", (True, False)),
)
TRANSFORMS = ("vjp", "jvp", "dual", "functional", "vmap", "trace")
TWINS = ("at once", "saved", "reentrant", "bare")
SCALED = 150_000_000
"""From this seed on lives draw scaled residuals and transposed layers; those before stay as they
were."""
MORE = 3
"""How often steps follow that belong together."""
PRODUCTS = 2
"""How many linear layers with an activation a life calls aside: their ends are those of tiles."""
WAYS = ("calls",) * 4 + ("aside",) * 4 + ("layer",) * 3 + (
    "fuse", "wires", "noise", "inspect", "rare",
)  # fmt: skip
ASIDE = (1, 8, 16, 40, 66)
GROUP_CALLS = ("plain", "plain", "no grad", "copied", "loaded", "pickled", "saved", "frozen")
ROWS, FEATURES = (16, 48, 144), (32, 64, 160)
LAYER_CALLS = ("plain", "plain", "again", "no grad", "copied", "loaded", "pickled") + (
    "saved", "bare", "nested", "thread",
)  # fmt: skip
VANISHING = ("SiLU()", "GELU()", "GELU('none')", "QGELU()", "SwiGLU()", "GEGLU()", "QGEGLU()")
EDGES = ("inf", "-inf", "nan", "huge", "level")
_DEFAULTS = {name: p.default for name, p in signature(Life.call).parameters.items()}


class Plot:
    """The start of a life and its steps.

    device: "cpu", "cuda" or "interpreter": a CPU on which Triton's kernels are interpreted.
    """

    def __init__(self, seed: int, length: int = 24, device: str = "cpu") -> None:
        self.random = Random(seed)
        one, chance = self.random.choice, self.random.random
        self.quantized = chance() < 0.3
        widths = QUANTIZED_WIDTHS if self.quantized else WIDTHS
        main = ", accumulate_into_main_grad=True" * (chance() < 0.15)
        self.scaled = seed >= SCALED
        self.draft = Draft(self.random, widths, main, chance() < 0.1, self.scaled)
        dtype = one(("float32", "bfloat16")) if self.quantized else one(DTYPES)
        self.narrow = self.quantized or dtype in ("float16", "bfloat16")
        """Whether values of another size than 1 are rounded too much."""
        self.backends, self.wired = BACKENDS[device], False
        options: dict[str, Any] = {name: one(values) for name, values in OPTIONS if chance() < 0.2}
        self.transposed = self.scaled and "delay_wgrad_compute" not in options
        self.draft.transposed = self.transposed and not main
        backends = one((None, None, *self.backends, ("reference",)))
        options |= {"backends": backends} if backends else {}
        self.width = 0 if chance() < NOTHING else one(widths)
        self.is_mlp = chance() < 0.15
        sources: Sequence[str] = ()
        meta = {"meta": True} if chance() < 0.05 and not self.draft.lazy else {}
        count = self.random.randint(1, 8) if chance() < 0.9 else self.random.randint(9, 14)
        if self.is_mlp:
            self.width = self.width or one(widths)
            built, options = self.mlp(one(widths), meta), {}
        elif chance() < 0.08:
            self.width = self.width or one(widths)
            sources = of_torch(self.random, widths, self.width, count)
            built = Step("from_torch", (self.width, *sources), {})
        elif chance() < 0.005:
            kinds = one(("plain", "scale", "l2")), "plain"
            sources = [self.draft.of_same_width(kind, self.width, 0) for kind in kinds]
            times = (30, 100) if device == "interpreter" else (300, 1200)  # minutes there
            built = Step("build", (self.width, *sources), {"times": one(times)})
            length = 6
        else:
            sources = self.draft.sequence(self.width, count, depth=2)
            built = Step("build", (self.width, *sources), meta)
        place = {} if device == "interpreter" else {"device": device}
        self.start = Step("__init__", (dtype, seed % 97), {**place, **options})
        self.steps = [built, self.call()]
        while len(self.steps) < length:
            self.steps.append(self.step(len(sources)))
        leaves = chance() < 0.05
        self.random = self.draft.random = Random(f"{seed}, later")  # the draws above stay so
        for _ in range(MORE):
            self.steps += self.more(len(sources))
        self.random = Random(f"{seed}, products")
        self.steps += [self.product() for _ in range(PRODUCTS)]
        self.random = Random(f"{seed}, groups")
        self.steps += [self.groups()] * self.scaled
        if leaves and not any("compiled" in step.kwargs for step in self.steps):
            self.steps.append(Step("leave", (), {}))  # compiled graphs outlive their modules

    def mlp(self, ffn: int, more: dict[str, Any]) -> Step:
        """Make a LayerNormMLP."""
        one, chance = self.random.choice, self.random.random
        flags: dict[str, Any] = {name: True for name in (*FLAGS, *RETURNS) if chance() < 0.2} | more
        flags["bias"] = chance() < 0.7
        flags["normalization"] = one(NORMS)
        return Step("mlp", (self.width, ffn), {"activation": one(ACTIVATIONS), "eps": 0.1, **flags})

    def parameter(self, count: int) -> str:
        """A parameter's name."""
        one, index = self.random.choice, self.random.randrange(max(1, count))
        if self.is_mlp:
            return one(("layer_norm_", "fc1_", "fc2_")) + one(("weight", "bias"))
        inside = one(("", "", "", "ops.0.", "ops.1."))
        return f"{index}.{inside}{one(('weight', 'weight', 'bias', 'fc1_weight'))}"

    def step(self, count: int) -> Step:
        """Any step but the first; count: of ops."""
        one, draw = self.random.choice, self.random.randrange
        index, seed, name = draw(count + 1), draw(1000), self.parameter(count)
        recipe = one([*RECIPES])
        choices: tuple[Callable[[], Step], ...] = (
            *[self.call] * 18,
            lambda: Step("finish", (draw(3),), {"thread": one((True, False))}),
            lambda: Step("finish", (0,), {}),
            lambda: Step("backward_dw", (), {}),
            lambda: Step("main_grads", tuple(one((True, False)) for _ in range(3)), {}),
            lambda: Step("listen", (), {}),
            lambda: Step("replace", (name, seed), {}),
            lambda: Step("assign_data", (name, seed), {}),
            lambda: Step("change", (name, seed), {}),
            lambda: Step("freeze", (name, one((True, True, False))), {}),
            lambda: Step("tie", (name, self.parameter(count)), {}),
            lambda: Step("tie_like", (name, seed), {}),
            lambda: Step("bias", (index, seed, one((True, False))), {}),
            lambda: Step("misfit", (name, one((1, -1, 2))), {}),
            lambda: Step("misuse", (one(MISUSES),), {}),
            lambda: Step("to", (one(("float32", "bfloat16")),), {}),
            lambda: Step("train", (one((True, False)),), {}),
            lambda: Step("copy", (one((True, False, False)),), {}),
            lambda: Step("pickle", (), {}),
            lambda: Step("average", (seed,), {}),
            lambda: Step("load", (seed, one((True, False)), one((True, False))), {}),
            lambda: Step("prepare", (recipe,), {}) if self.quantized else self.call(),
            lambda: Step("resume", (), {}),
            lambda: Step("reset", (), {}) if self.quantized else self.call(),
            lambda: Step("restart", (), {}) if self.quantized else self.call(),
            lambda: Step("transform", (one(TRANSFORMS), one(LEADS), seed), {}),
            lambda: Step("twin", (one(TWINS), recipe if self.quantized else None, seed), {}),
            lambda: self.alone(index, recipe, seed),
            lambda: self.alone(index, recipe, seed),
            lambda: self.wrong(),
            lambda: Step("broken", (index, one([*BREAKS])), {}),
            lambda: Step("verify", (one((True, False)),), {}),
            lambda: Step("hook", (index,), {}),
            lambda: Step("unhook", (), {}),
            lambda: Step("register", (), {}),
            lambda: Step("unregister", (), {}),
            lambda: Step("zero_grad", (one((True, False)),), {}),
            lambda: self.option(),
            lambda: Step("option", ("backends", one((None, *self.backends))), {}),
            lambda: self.attribute(index),
            lambda: self.attribute(index),
            lambda: Step("insert", (index, self.same_width()), {}),
            lambda: Step("append_inside", (index, self.same_width()), {}),
            lambda: Step("remove", (index,), {}),
        )
        return one(choices)()

    def more(self, count: int) -> list[Step]:
        """Steps that belong together: calls of one kind, a layer, or ops and the fuser for them."""
        one, draw = self.random.choice, self.random.randrange
        index, seed = draw(count + 1), draw(1000)
        way = one(WAYS)
        if way == "calls":
            options = self.call().kwargs
            options |= {"quiet": True} if draw(3) == 0 else {}
            options |= {"layout": one(("sliced", "padded"))} if draw(3) == 0 else {}
            steps = []
            for _ in range(one((2, 3, 4))):
                steps += [Step("call", (), options | {"seed": draw(1000)}), self.step(count)]
            return steps
        if way == "layer":
            sizes = one(ROWS), one(FEATURES), one(FEATURES)
            calls = [one(LAYER_CALLS) for _ in range(one((1, 3, 5)))]
            kind = one((*KINDS, *["delayed"] * 6))  # which remembers the most
            return [Step("layer", (kind, sizes, *calls), {"seed": seed})]
        if way == "fuse":
            mode = Step("train", (one((True, False)),), {})
            return [Step("fuse", (one([*FUSERS]),), {}), mode, self.call(), self.call()]
        if way == "aside":
            return [*(self.aside() for _ in range(5)), self.edge()]
        if way == "wires":
            if self.wired:
                return [self.call()]  # a name has one Tee
            self.wired = True
            inner = self.same_width(), self.same_width()
            sources = "Tee('w')", inner[0], "Add('w')", inner[1], "Add('w')"
            return [*(Step("insert", (0, s), {}) for s in sources[::-1]), self.call(), self.call()]
        if way == "noise":
            return [Step("insert", (index, "Noise()"), {}), self.call(), self.call()]
        if way == "inspect":
            return [Step("inspect", (), {})]
        if self.is_mlp and self.quantized:
            return [Step("microbatch", (one([*RECIPES]), seed), {})]
        return [Step("overlap", (seed,), {})] if draw(4) + seed % 10 == 0 else [self.call()]

    def edge(self) -> Step:
        """Another op than the module's by itself, with a number at the edge."""
        one, seed = self.random.choice, self.random.randrange(1000)
        norm = one((True, False))
        source = one(("RMSNorm(16, eps=0.1)", "LayerNorm(16, eps=0.1)") if norm else VANISHING)
        value = "far" if norm else one(("inf", "-inf"))
        alone = "alone", (0, value, False, None, seed)
        return Step("aside", (16, source), {"between": (alone,), "seed": seed})

    def aside(self) -> Step:
        """A call of a few ops that stand beside each other in models."""
        one = self.random.choice
        draft = Draft(self.random, ASIDE, scaled=self.scaled, transposed=self.transposed)
        width = one(ASIDE)
        sources = draft.sequence(width, one((1, 1, 2, 3)), depth=1)
        options = self.call().kwargs
        options = {name: options[name] for name in ("autocast", "wide", "mode") if name in options}
        options |= {"lead": one(LEADS), "layout": one((*LAYOUTS[1:], "sliced", "padded", "padded"))}
        if one((True, False)):
            changes = (self.change(len(sources)) for _ in range(one((1, 2, 3))))
            options["between"] = tuple((step.method, step.args) for step in changes)
        return Step("aside", (width, *sources), options | {"seed": self.random.randrange(1000)})

    def product(self) -> Step:
        """A call of a linear layer and an activation, whose depth fills no tile.

        Its rows are those of a wider tensor with NaN behind them, or zeros but for the first.
        """
        one = self.random.choice
        width, out = one(ASIDE[-2:]), one(ASIDE[1:])
        act = one((*PLAIN, *PLAIN, *RARE, *(f"{name}()" for name in GATED)))
        linear = one(("Linear", "TransposedLinear")) if self.transposed else "Linear"
        sources = f"{linear}({width}, {out}, bias={one((True, False))})", act
        options = {"lead": one(LEADS), "layout": one(("sliced", "padded"))}
        if one((True, False, False)):
            options["mode"] = one(("no_grad", "inference"))
        return Step("aside", (width, *sources), options | {"seed": self.random.randrange(1000)})

    def groups(self) -> Step:
        """Experts, of which some have no rows."""
        one, draw = self.random.choice, self.random.randrange
        kind = one(("GroupedLinear", "TransposedGroupedLinear", "TransposedGroupedLinear"))
        single = f"single_grouped_weight={one((True, False))}, bias={one((True, False))}"
        sizes = [one((0, 1, 4, 16, 33)) for _ in range(one((1, 2, 3, 5)))]
        source = f"{kind}({len(sizes)}, {one(ASIDE)}, {one(ASIDE)}, {single})"
        calls = [one(GROUP_CALLS) for _ in range(one((1, 2, 3)))]
        return Step("groups", (source, tuple(sizes), *calls), {"seed": draw(1000)})

    def change(self, count: int) -> Step:
        """A change between two calls that are alike."""
        one, seed, name = self.random.choice, self.random.randrange(1000), self.parameter(count)
        index = self.random.randrange(count)
        choices: tuple[Callable[[], Step], ...] = (
            lambda: Step("train", (one((True, False)),), {}),
            lambda: Step("bias", (index, seed, one((True, False)), one((True, False))), {}),
            lambda: Step("freeze", (name, one((True, False))), {}),
            lambda: Step("replace", (name, seed), {}),
            lambda: Step("change", (name, seed), {}),
            lambda: Step("tie_like", (name, seed), {}),
            lambda: Step("insert", (index, self.same_width()), {}),
            lambda: Step("inspect", (), {}),
            lambda: self.attribute(index),
        )
        return one(choices)()

    def alone(self, index: int, recipe: str, seed: int) -> Step:
        """Call an op by itself, with a number at the edge."""
        one = self.random.choice
        under = recipe if self.quantized and one((True, False)) else None
        value, gradient = one(EDGES), one((True, False, False))
        return Step("alone", (index, value, gradient, under, seed), {})

    def wrong(self) -> Step:
        """Give something an argument that it does not take."""
        name, argument, values = self.random.choice(WRONG)
        return Step("wrong", (name, argument, self.random.choice(values)), {})

    def option(self) -> Step:
        """Set an option of a Sequential to one of its values."""
        name, values = self.random.choice(OPTIONS)
        return Step("option", (name, self.random.choice(values)), {})

    def attribute(self, index: int) -> Step:
        """Set an attribute of an op, or of a LayerNormMLP, to one of its values."""
        more = (("residual_scale", (0.5, -2.0)),) * self.scaled
        name, values = self.random.choice(OF_MLP if self.is_mlp else (*ATTRIBUTES, *more))
        return Step("set", (0 if self.is_mlp else index, name, self.random.choice(values)), {})

    def same_width(self) -> str:
        """An op that fits anywhere."""
        kind = self.random.choice(("plain", "scale", "still", "l2", "dropout", "tee"))
        return "Tee()" if kind == "tee" else self.draft.of_same_width(kind, self.width, 0)

    def call(self) -> Step:
        """A call of the module with what may be around it."""
        one, chance = self.random.choice, self.random.random
        options: dict[str, Any] = {"lead": one(LEADS), "seed": self.random.randrange(1000)}
        if self.quantized:
            options["lead"] = one(((16,), (32,), (48,), (2, 16)))
            if chance() < 0.8:
                options["recipes"] = tuple(one([*RECIPES]) for _ in range(one((1, 1, 2))))
        elif chance() < 0.15:
            options["autocast"] = True
        elif self.narrow and chance() < 0.1:
            options["wide"] = True
        options["layout"] = one(LAYOUTS[: -1 if self.quantized else None])
        options["size"] = one(SIZES[: 3 if self.quantized else 4 if self.narrow else None])
        options["mode"] = one(("training", "training", "training", "no_grad", "inference"))
        options["backward"] = one(("now", "now", "twice", "later", "late", "never"))
        options["input_grad"] = chance() < 0.7
        options["inplace"] = chance() < 0.1
        options["thread"] = chance() < 0.15
        if options["mode"] == "training" and chance() < 0.2:
            # A reentrant one has the recipe of the last call without grad; see docs/reliability.md.
            held = "recipes" in options or options["backward"] == "later"
            reentrant = options["input_grad"] and chance() < 0.4 and not held
            options["checkpointed"] = "reentrant" if reentrant else "saved"
        if self.is_mlp and chance() < 0.3:
            options["first"] = chance() < 0.5
        elif chance() < 0.0005:
            options["compiled"] = one(("eager", "aot_eager"))
            options["thread"] = False  # where it ends, PyTorch 2.11 cannot compile a second time
            if "checkpointed" in options:  # PyTorch's own modules fail there, in some releases
                options["inplace"] = False
        return Step("call", (), {k: v for k, v in options.items() if v != _DEFAULTS[k]})
