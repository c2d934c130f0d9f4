"""Uses at the edge: ops alone, numbers that overflow, and what has to be refused."""

import copy
import gc
import linecache
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...base import config
from ...base.errors import OpError, OpsgraphError, PlanError
from ...features.examples import Plans
from ...kernels.triton import interpreting
from ...layernorm_mlp import LayerNormMLP
from ...op import Op
from ...precision.autocast import autocast
from ...run import table
from ...run.sequential import Sequential
from .. import formulas
from .answers import by_formulas
from .backwards import Backwards, accumulated, delayed
from .changes import Impossible, evaluated
from .compare import Wrong, check

LIMITS = (ops.GELU, ops.QGELU, ops.SiLU, ops.ReLU, ops.SReLU) + (
    ops.GEGLU, ops.QGEGLU, ops.SwiGLU, ops.ReGLU, ops.SReGLU, ops.Bias, ops.ConstantScale,
    ops.LayerScale, ops.RMSNorm, ops.LayerNorm, ops.BasicLinear, ops.Linear,
    ops.TransposedLinear,
)  # fmt: skip
"""Ops whose results from numbers that are not finite are said; see docs/reliability.md."""
CHECK = "OPSGRAPH_CHECK"
FAR = torch.float32, torch.bfloat16
LEVELS = (5e4, 1e6, 3e38)
"""What each element of a row may be that is all one value."""
BREAKS: dict[str, Callable[[Any, int], Any]] = {
    "insert": lambda held, index: held.insert(index, "GELU()"),
    "extend": lambda held, _: held.extend([ops.GELU(), "GELU()"]),
    "set": lambda held, index: held.__setitem__(index, 3),
    "append": lambda held, _: held.append(ops.GELU),
    "pop": lambda held, _: held.pop(len(held)),
}
"""Edits of a list of ops that cannot be."""


class Edges(Backwards):
    """`Backwards`, and what is rarely done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sources = _sources()
        """The functions that were generated before."""
        self.tables = weakref.WeakSet(table._tables.values())
        """The tables of plans that there were before."""
        self.checks = os.environ.get(CHECK)
        """What the environment said before."""

    def alone(
        self,
        index: int,
        value: str = "inf",
        gradient: bool = False,
        recipe: str | None = None,
        seed: int = 0,
    ) -> None:
        """Call a copy of one op by itself, with a number at the edge.

        value: "inf", "-inf", "nan", "huge" for a number near the largest, "level" for rows of one
        value, or "far" for a row whose squares overflow, which a norm on a CPU minds no more than
        another. gradient: it is in the gradient that comes in, and not in the input. Where
        formulas give a finite number the result has to be finite, and nowhere else; under a recipe
        it has to show somewhere. Rows of one value are to LayerNorm what zeros are.
        """
        op = copy.deepcopy(self._bare(index, value, gradient, recipe))
        width = 8 if op.in_width is None else op.in_width
        if not (width and getattr(op, "out_features", width)):
            raise Impossible  # there is no number
        largest, level, far = torch.finfo(self.dtype).max / 2, value == "level", value == "far"
        huge = math.copysign(largest, seed % 2 - 0.5)
        number = huge if value in ("huge", "level", "far") else float(value)
        x = self._random((32, width), seed)
        if level:
            x = torch.full_like(x, min(LEVELS[seed % len(LEVELS)], largest))
        elif far:
            x[1] *= 1e25
        elif not gradient:
            x[1, seed % width] = number
        named: dict[str, Tensor] = {"input": x.requires_grad_(), **dict(op.named_parameters())}
        wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in named.items()}
        if level:
            wide["input"] = torch.zeros_like(wide["input"], requires_grad=True)
        exact = formulas.FORMULAS[type(op)](op, wide["input"], wide.get)
        dy = self._random(exact.shape, seed + 1)
        if gradient:
            dy[1, seed % dy.size(1)] = number
        with nullcontext() if recipe is None else autocast(recipe=self.recipes[recipe]):
            y = op(x)
        expected, found = _gradients(exact, wide, dy.double()), _gradients(y, named, dy)
        pairs = {"output": (y.detach(), exact.detach())}
        pairs |= {f"gradient of {n}": (found[n], expected[n]) for n in expected}
        for what, (got, right) in pairs.items():
            if (level and what != "gradient of input") or (far and what == "output"):
                check(what, got, right, self.dtype, lambda: None)
            else:
                _same_edges(what, got, right, recipe is not None)

    def _bare(self, index: int, value: str, gradient: bool, recipe: str | None) -> Any:
        """An op whose results from such a number are said."""
        op = self._at(index)
        special = delayed(self.module) | accumulated(self.module)
        level, huge = value == "level", value == "huge"
        if type(op) not in LIMITS or self.hooks or special:
            raise Impossible
        if (gradient and (huge or level)) or (level and type(op) is not ops.LayerNorm):
            raise Impossible
        if huge and (isinstance(op, ops.BasicLinear) or recipe is not None):
            raise Impossible  # a sum that overflows is one
        if value == "far":
            on_cpu = self.device == "cpu" and not interpreting()
            fits = isinstance(op, ops.RMSNorm | ops.LayerNorm) and self.dtype in FAR
            if gradient or recipe is not None or not (on_cpu and fits):
                raise Impossible
        if huge and self.dtype == torch.float64:
            raise Impossible  # formulas in fp64 overflow as well
        if huge and isinstance(op, ops.LayerNorm) and (self.device == "cuda" or interpreting()):
            raise Impossible  # Triton's kernel may give NaN; see docs/reliability.md
        return op

    def misfit(self, name: str, more: int) -> None:
        """Call with a parameter of another length, which has to be an error, and put it back."""
        self._changed(values=False)
        owner, leaf, old = self._parameter(name)
        shape = [size + more for size in old.shape]
        unread = name == "fc2_bias" and self.module.return_bias
        if not isinstance(owner, Op | LayerNormMLP):
            raise Impossible
        if unread or any(size < 1 for size in shape) or self._owned(old) > 1:
            raise Impossible
        setattr(owner, leaf, nn.Parameter(self._values(shape, 1)))
        try:
            x = self._random((3, self.width), 0)
            extras = self._extras(x)
            try:
                self.module(x, *extras)
            except (OpError, PlanError, TypeError):
                return
            raise Wrong(f"{name} of shape {shape} was taken")
        finally:
            setattr(owner, leaf, old)

    def misuse(self, kind: str) -> None:
        """Call with what is no input, which has to be an error that says so."""
        if not isinstance(self._at(0), Op | LayerNormMLP):
            raise Impossible  # torch.nn's modules have errors of their own
        x = self._random((3, self.width), 0)
        extras = self._extras(x)
        wrong: dict[str, list[Any]] = {
            "none": [None, *extras],
            "list": [x.tolist(), *extras],
            "integers": [x.long(), *extras],
            "width": [self._random((3, self.width + 1), 0), *extras],
            "surplus": [x, *extras, x],
            "none surplus": [x, *extras, None],
        }
        if isinstance(self.module, LayerNormMLP) and kind.endswith("surplus"):
            raise Impossible
        if kind == "width" and all(p.dim() == 0 for p in self.module.parameters()):
            raise Impossible  # any width is right
        try:
            self.module(*wrong[kind])
        except OpError:
            return
        raise Wrong(f"{kind} was taken")

    def wrong(self, name: str, argument: str, value: Any) -> None:
        """Make what takes no such argument, which has to be an error that says so."""
        try:
            evaluated(name)(**{argument: value})
        except OpsgraphError:
            return
        raise Wrong(f"{name}({argument}={value!r}) was taken")

    def broken(self, index: int, kind: str) -> None:
        """Edit a list of ops, or that of a Residual, in a way that raises: it stays as it was."""
        held = self._list()
        if 0 <= index < len(held) and isinstance(held[index], ops.Residual):
            held = held[index].ops
        before = list(held._modules.items())
        try:
            BREAKS[kind](held, min(index, len(held)))
        except Exception:
            if list(held._modules.items()) != before:
                raise Wrong(f"{kind} left a part of what it was to do") from None
            return
        raise Wrong(f"{kind} of what is no op was taken")

    def inspect(self) -> None:
        """Print the plan of a call in training.

        No matrix product runs again in the backward, but where checkpoint=True asks for it, and no
        gradient is made for a parameter that is frozen.
        """
        x = self._random((4, self.width), 0)
        try:
            found = self.module.plan(x=x)
        except OpsgraphError:
            raise Impossible from None  # ops that do not fit, or none
        asked, made = getattr(self.module, "checkpoint", False), 0
        plans = found if isinstance(found, Plans) else (found,)
        for plan in plans:
            if not str(plan).startswith(("forward", "prepare")):
                raise Wrong(f"a plan begins with {str(plan)[:40]!r}")
            again = [i for step in plan.backward for held in step.again.values() for i in held]
            if not asked and any(plan.kinds[i].endswith("Linear") for i in again):
                raise Wrong("a matrix product runs again in the backward")
            results = plan.backward_source.rpartition("return (")[2].rstrip(",)\n").split(", ")
            made += sum(name != "None" for name in results)
        trained = sum(self._owned(p) for p in self.module.parameters() if p.requires_grad)
        inputs = sum(isinstance(module, formulas.ADDS) for module in self.module.modules())
        if made > trained + inputs + len(plans):
            raise Wrong(f"{made} gradients are made, of {trained} parameters and {inputs} sums")

    def verify(self, on: bool) -> None:
        """Set OPSGRAPH_CHECK, which compares every fused step with the reference ops."""
        self._set_checks("1" if on else "0")

    def _set_checks(self, text: str | None) -> None:
        if os.environ.get(CHECK) != text:
            os.environ.pop(CHECK, None)
            os.environ |= {} if text is None else {CHECK: text}
            config.touch()

    def end(self) -> None:
        """Take out what was registered and set, and let go of what waits.

        A hook holds its life; through an output, whose node no collector sees, its modules stayed.
        """
        super().end()
        for held in (self.pending, self.delayed, self.hooks, self.told):
            held.clear()
        self._set_checks(self.checks)

    def leave(self) -> None:
        """Drop the module, which has to go with all that was generated for it."""
        self.end()
        modules = [weakref.ref(module) for module in self.module.modules()]
        self.module = self.original = None
        _collect()
        if left := sum(module() is not None for module in modules):
            raise Wrong(f"{left} modules are left")
        if new := _sources() - self.sources:
            whose = "; ".join(_held(self.tables)) or "no table is left"
            raise Wrong(
                f"{len(new)} functions that were generated are left: {sorted(new)}; {whose}"
            )

    # -- how --

    def _ops(self) -> list[Any]:
        return list(self.module) if isinstance(self.module, Sequential) else []

    def _extras(self, x: Tensor) -> list[Tensor]:
        """Extra inputs beside x, as far as formulas get with ops that may not fit."""
        shapes: list[torch.Size] = []
        with suppress(RuntimeError, AssertionError):
            by_formulas(self.module, torch.float64, [x], shapes.append)
        return [self._random(shape, 0) for shape in shapes]

    def _fits(self, lead: tuple[int, ...], x: Tensor) -> bool:
        """Whether the ops fit each other, after edits; if not, a call has to say so."""
        if lead in self.shapes:
            return True
        shapes: list[torch.Size] = []
        try:
            by_formulas(self.module, torch.float64, [x.detach()], shapes.append)
        except (RuntimeError, AssertionError):
            pass
        else:
            self.shapes[lead] = shapes
            return True
        try:
            self.module(x, *(self._random(s, 0) for s in shapes))
        except (OpError, PlanError, TypeError):
            return False
        except RuntimeError:
            if all(isinstance(op, Op) for op in self._ops()):
                raise  # torch.nn's modules have errors of their own
            return False
        raise Wrong("a sequence whose widths do not fit was run")


def _collect() -> None:
    """Collect all garbage: what a node of autograd holds is seen as such when the node has gone.

    No collector looks into nodes. A plan is a cycle, so it takes another collection.
    """
    for _ in range(10):
        if not gc.collect():
            return


def _sources() -> set[str]:
    """The functions of plans that there are; those that launch a kernel are kept for all plans."""
    plans = (name for name in linecache.cache if name.startswith("<opsgraph plan"))
    return {name for name in plans if not name.endswith("launched>")}


def _held(before: Collection[Any]) -> Iterator[str]:
    """Of each table of plans that is left: its ops, whether it was there before, what holds it.

    A life plans in the tables of other modules of its structure, so what an earlier life of its
    process has left behind may first show in a later one.
    """
    left = [*table._tables.values()]
    for one in left:
        names = ", ".join(type(op).__name__ for op in one.run.ops)
        whose = "an earlier life" if one in before else "this life"
        level, seen, kinds = [one], {id(one), id(left)}, set[str]()
        for _ in range(4):  # a module, the dict of its stages, a list of them, a stage
            found = [x for x in gc.get_referrers(*level) if not isinstance(x, FrameType)]
            level = [x for x in found if id(x) not in seen and x is not level]
            seen.update(map(id, level))
            kinds |= {type(x).__name__ for x in level}
        yield f"a table of {names}, of {whose}, is held by {', '.join(sorted(kinds)) or 'nothing'}"


def _gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Of the leaves that require one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], dy), strict=True))


def _same_edges(what: str, found: Tensor, exact: Tensor, somewhere: bool) -> None:
    """somewhere: an overflow need not show where it came to be."""
    lost, shown = ~exact.isfinite(), ~found.isfinite()
    if somewhere:
        if lost.any() and not shown.any():
            raise Wrong(f"{what}: got finite numbers, expected an overflow to show")
        return
    if (lost & ~shown).any():
        raise Wrong(f"{what}: got a finite number, expected none")
    if (shown & (exact.abs() < torch.finfo(found.dtype).max / 16)).any():
        raise Wrong(f"{what}: got a number that is not finite, expected one that is")
