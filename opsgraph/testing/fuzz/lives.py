"""Drawing a life, living it, and shrinking one that fails to a script."""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple

from .changes import RECIPES, Impossible
from .drafts import QUANTIZED_WIDTHS, WIDTHS, Draft
from .life import Life

LEADS = ((4,), (), (1,), (5,), (0,), (2, 3), (2, 0), (16,), (32,), (33,))
LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded")
FUSED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "aten", "reference")}
DTYPES = ("float32", "float32", "bfloat16", "float16", "float64")
ATTRIBUTES = (
    ("eps", (0.1, 0.5)),
    ("p", (0.0, 0.3, 1.0)),
    ("approximate", ("tanh", "none")),
    ("scale", (-0.5, 2.0, 3.0)),
    ("zero_centered_gamma", (True, False)),
    ("glu_interleave_size", (None, 1)),
    ("to_caller", (True, False)),
)


class Step(NamedTuple):
    """A call of a method of `Life`."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        args = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"life.{self.method}({', '.join(args)})"


class Lived(NamedTuple):
    """How a life went: the step that failed, if one did, and what it raised."""

    steps: int
    error: BaseException | None


class Plot:
    """The start of a life and its steps, all drawn from one seed."""

    def __init__(self, seed: int, length: int = 20, device: str = "cpu") -> None:
        self.random = Random(seed)
        one = self.random.choice
        self.quantized = self.random.random() < 0.3
        widths = QUANTIZED_WIDTHS if self.quantized else WIDTHS
        self.draft = Draft(self.random, widths)
        dtype = one(("float32", "bfloat16")) if self.quantized else one(DTYPES)
        planner = one(("greedy", "greedy", "optimal"))
        self.backends = FUSED[device], ("reference",)
        options = {"planner": planner, "backends": one((None, None, None, *self.backends))}
        self.start = Step("__init__", (dtype, seed % 97), {"device": device, **options})
        self.width = one(widths)
        sources = self.draft.sequence(self.width, self.random.randint(1, 8), depth=2)
        self.steps = [Step("build", (self.width, *sources), {}), self.call()]
        while len(self.steps) < length:
            self.steps.append(self.step(sources))

    def step(self, sources: Sequence[str]) -> Step:
        """Any step but the first."""
        one, index = self.random.choice, self.random.randrange(len(sources) + 1)
        name = f"{index}.{one(('weight', 'bias'))}"
        seed = self.random.randrange(1000)
        choices: tuple[Callable[[], Step], ...] = (
            *[self.call] * 14,
            lambda: Step("finish", (self.random.randrange(3),), {"thread": one((True, False))}),
            lambda: Step("finish", (0,), {}),
            lambda: Step("replace", (name, seed), {}),
            lambda: Step("assign_data", (name, seed), {}),
            lambda: Step("change", (name, seed), {}),
            lambda: Step("freeze", (name, one((True, True, False))), {}),
            lambda: Step("tie", (name, f"{self.random.randrange(len(sources))}.weight"), {}),
            lambda: Step("to", (one(("float32", "bfloat16")),), {}),
            lambda: Step("train", (one((True, False)),), {}),
            lambda: Step("copy", (), {}),
            lambda: Step("pickle", (), {}),
            lambda: Step("load", (seed, one((True, False))), {}),
            lambda: Step("register", (), {}),
            lambda: Step("unregister", (), {}),
            lambda: Step("zero_grad", (one((True, False)),), {}),
            lambda: Step("option", one((("planner", "greedy"), ("planner", "optimal"))), {}),
            lambda: Step("option", ("backends", one((None, *self.backends))), {}),
            lambda: self.attribute(index),
            lambda: Step("insert", (index, self.same_width()), {}),
            lambda: Step("remove", (index,), {}),
        )
        return one(choices)()

    def attribute(self, index: int) -> Step:
        """Set an attribute of an op to one of its values."""
        name, values = self.random.choice(ATTRIBUTES)
        return Step("set", (index, name, self.random.choice(values)), {})

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
        options["layout"] = one(LAYOUTS)
        options["mode"] = one(("training", "training", "training", "no_grad", "inference"))
        options["backward"] = one(("now", "now", "twice", "later", "never"))
        options["input_grad"] = chance() < 0.7
        options["thread"] = chance() < 0.15
        if options["mode"] == "training" and chance() < 0.2:
            # A reentrant one has the recipe of the last call without grad; see docs/reliability.md.
            held = "recipes" in options or options["backward"] == "later"
            reentrant = options["input_grad"] and chance() < 0.4 and not held
            options["checkpointed"] = "reentrant" if reentrant else "saved"
        return Step("call", (), {k: v for k, v in options.items() if v not in (False, "plain")})


def live(start: Step, steps: Sequence[Step]) -> Lived:
    """Take the steps; those that are impossible are left out."""
    taken = 0
    life = Life(*start.args, **start.kwargs)
    try:
        for step in steps:
            try:
                getattr(life, step.method)(*step.args, **step.kwargs)
                taken += 1
            except Impossible:
                continue
    except Exception as error:
        return Lived(taken, error)
    finally:
        life.end()
    return Lived(taken, None)


def shrink(
    start: Step, steps: Sequence[Step], alike: Callable[[BaseException], bool]
) -> list[Step]:
    """Fewer steps and arguments after which a life still fails in a like way."""

    def fails(candidate: Sequence[Step]) -> bool:
        error = live(start, candidate).error
        return error is not None and alike(error)

    left = list(steps)
    size = max(1, len(left) // 2)
    while True:
        at = 0
        while at < len(left):
            fewer = left[:at] + left[at + size :]
            if fewer and fewer[0].method == "build" and fails(fewer):
                left = fewer
            else:
                at += size
        if size == 1:
            break
        size //= 2
    for at, step in enumerate(left):
        left[at] = _plainer(step, partial(_fails_with, fails, left, at))
    return left


def _fails_with(
    fails: Callable[[Sequence[Step]], bool], steps: list[Step], at: int, step: Step
) -> bool:
    return fails([*steps[:at], step, *steps[at + 1 :]])


def _plainer(step: Step, fails: Callable[[Step], bool]) -> Step:
    """A step without the arguments and the ops that the failure does not need."""
    for name in list(step.kwargs):
        plainer = step._replace(kwargs={k: v for k, v in step.kwargs.items() if k != name})
        step = plainer if fails(plainer) else step
    if step.method == "build":
        at = 1
        while at < len(step.args):
            plainer = step._replace(args=step.args[:at] + step.args[at + 1 :])
            if len(plainer.args) > 1 and fails(plainer):
                step = plainer
            else:
                at += 1
    return step


def script(start: Step, steps: Sequence[Step]) -> str:
    """A life as a program that runs by itself."""
    options = {k: v for k, v in start.kwargs.items() if v not in (None, "greedy", "cpu")}
    made = str(start._replace(kwargs=options)).removeprefix("life.__init__")
    lines = ["from opsgraph.testing.fuzz import Life", "", f"life = Life{made}", *map(str, steps)]
    return "\n".join(lines) + "\n"
