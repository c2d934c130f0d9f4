"""Random sequences of ops against the fp64 formulas, and what must hold of any plan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import LAYOUTS, Case, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_bytes import saved_bytes
from torch import nn

import opsgraph as og
from opsgraph import ops

Build = Callable[[], nn.Module]


class Draft(NamedTuple):
    """A sequence to be built: repeatable, and readable when Hypothesis prints it."""

    modules: tuple[Any, ...]
    """`(class, arguments)`, or `("residual", modules)`."""
    width: int

    def build(self) -> list[nn.Module]:
        return _build(self.modules)


def _build(modules: tuple[Any, ...]) -> list[nn.Module]:
    return [
        ops.Residual(*_build(arguments)) if kind == "residual" else kind(**dict(arguments))
        for kind, arguments in modules
    ]


PLAIN = (ops.GELU, ops.QGELU, ops.ReLU, ops.SReLU, ops.SiLU)
GATED = (
    ops.GEGLU,
    ops.QGEGLU,
    ops.ReGLU,
    ops.SReGLU,
    ops.SwiGLU,
    ops.GLU,
    ops.ClampedSwiGLU,
    ops.SiTUGLU,
)
NORMS = (ops.RMSNorm, ops.LayerNorm)
CHANNELS = ("a", "b")


class Drawing:
    """Draws ops one after another, keeping the width and the channels that there are."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.widths: dict[str, int] = {}
        self.extra: set[str] = set()
        """Names that an Add has read without a Tee: no Tee may come after it."""

    def one(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def ops(self, width: int, count: int, depth: int, keep: bool) -> tuple[list[Any], int]:
        """Ops from one width on; with `keep` the last brings it back."""
        found, start = [], width
        for _ in range(count):
            entry, width = self.op(width, depth)
            found.append(entry)
        if keep and width != start:
            found.append((ops.Linear, (("in_features", width), ("out_features", start))))
        return found, start if keep else width

    def op(self, width: int, depth: int) -> tuple[Any, int]:
        kinds = ["plain", "norm", "linear", "bias", "tee", "add"] * 2
        kinds += ["linear", "l2", "scale", "dropout", "still"] + ["residual"] * 2 * (depth > 0)
        kinds += ["gated"] * (4 if width % 2 == 0 else 0)
        kind = self.one(*kinds)
        if kind == "plain":
            return (self.one(*PLAIN), ()), width
        if kind == "gated":
            gate = self.one(*GATED)
            blocks = [n for n in (1, 2) if width % (2 * n) == 0]
            block = self.one(None, None, *blocks)
            more = (("gate_second", self.one(False, True)), ("round_gate", self.one(False, True)))
            return (gate, (("glu_interleave_size", block), *more)), width // 2
        if kind == "norm":
            affine = self.one(True, True, False)
            more = (("elementwise_affine", affine), ("zero_centered_gamma", self.one(True, False)))
            return (self.one(*NORMS), (("normalized_shape", width), ("eps", 0.1), *more)), width
        if kind == "l2":
            return (ops.L2Normalization, (("eps", 0.1),)), width
        if kind == "linear":
            out = self.one(1, 3, 4, 8, 12)
            sizes = (("in_features", width), ("out_features", out))
            if self.one(True, False):
                return (ops.BasicLinear, sizes), out
            return (ops.Linear, (*sizes, ("bias", self.one(True, False)))), out
        if kind == "bias":
            return (ops.Bias, (("width", width),)), width
        if kind == "scale":
            return (ops.ConstantScale, (("scale", self.one(-0.5, 1.0, 2.0)),)), width
        if kind == "dropout":
            return (ops.Dropout, (("p", self.one(0.0, 0.4, 1.0)),)), width
        if kind == "still":
            return (ops.Identity, ()), width
        if kind == "residual":
            count = self.draw(st.integers(0, 3))
            inner, _ = self.ops(width, count, depth - 1, keep=True)
            return ("residual", tuple(inner)), width
        return self.wire(kind, width), width

    def wire(self, kind: str, width: int) -> Any:
        """A Tee under a new name, or an Add of any name whose width fits."""
        free = [name for name in CHANNELS if name not in self.widths]
        if kind == "tee":
            name = self.one(None, *(name for name in free if name not in self.extra))
            if name is None:
                return (self.one(ops.Tee, ops.MakeExtraOutput), ())
            self.widths[name] = width
            return (ops.Tee, (("name", name), ("to_caller", self.one(False, False, True))))
        fitting = [name for name, w in self.widths.items() if w == width]
        name = self.one(None, *free, *fitting, *fitting)
        if name is None:
            return (self.one(ops.Add, ops.AddExtraInput), ())
        if name in free:
            self.extra.add(name)
        return (ops.Add, (("name", name),))


@st.composite
def drafts(draw: Any, longest: int = 8) -> Draft:
    width = draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12)))
    count = draw(st.integers(1, longest))
    modules, _ = Drawing(draw).ops(width, count, depth=2, keep=False)
    return Draft(tuple(modules), width)


LEADS = ((), (1,), (5,), (0,), (2, 3), (2, 0), (2, 1, 2))
FROZEN = ((), (), ("weight",), ("bias",), ("weight", "bias"), ("0.", "2."))

cases = dict(
    draft=drafts(),
    lead=st.sampled_from(LEADS),
    layout=st.sampled_from(LAYOUTS),
    gradient_layout=st.sampled_from(LAYOUTS),
    frozen=st.sampled_from(FROZEN),
    input_grad=st.booleans(),
    planner=st.sampled_from(("greedy", "optimal")),
)


def case_of(
    draft: Draft, lead: tuple[int, ...], device: str, dtype: torch.dtype, **settings: Any
) -> Case:
    return Case(draft.build, (*lead, draft.width), dtype, device, **settings)


def check_formulas(device: str, draft: Draft, lead: tuple[int, ...], **settings: Any) -> None:
    case_of(draft, lead, device, torch.float64, **settings).check(rounded=True)


def check_fp32(device: str, draft: Draft, lead: tuple[int, ...], **settings: Any) -> None:
    case_of(draft, lead, device, torch.float32, **settings).check(gemm=True, rounded=True)


def check_plans(device: str, draft: Draft, lead: tuple[int, ...], **settings: Any) -> None:
    """All plans agree, optimal costs no more than greedy, and what is saved is what it says."""
    case = case_of(draft, lead, device, torch.float32, **settings)
    found = case.run()
    for backends in (("reference",), None):
        for planner in ("greedy", "optimal"):
            other = og.Sequential(*case.module, backends=backends, planner=planner)
            for name, value in case.run(other).items():
                assert_close(value, found[name].double(), name, rounded=True)
            check_plan(case, other)


def check_plan(case: Case, module: og.Sequential) -> None:
    (stage,) = module._stages
    with torch.enable_grad():
        inputs = list(case.inputs.values())
        key = stage.key(inputs[0], inputs[1:], stage.weights())
    plan = stage.plans[key]
    if plan.costs:
        assert plan.costs["optimal"] <= plan.costs["greedy"]
    rows = case.x.numel() // case.x.shape[-1]
    if rows:
        counted = saved_bytes(lambda: module(*inputs))
        assert counted == plan.saved_bytes_per_row * rows, plan


@settings(max_examples=300)
@given(**cases)
def test_formulas(**case: Any) -> None:
    check_formulas("cpu", **case)


@settings(max_examples=150)
@given(**cases)
def test_fp32(**case: Any) -> None:
    check_fp32("cpu", **case)


@settings(max_examples=150)
@given(**cases)
def test_plans(**case: Any) -> None:
    check_plans("cpu", **case)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_formulas, check_fp32, check_plans])
def test_long(check: Callable[..., None]) -> None:
    @settings(max_examples=1500)
    @given(**{**cases, "draft": drafts(16)})
    def test(**case: Any) -> None:
        check("cpu", **case)

    test()


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_formulas, check_fp32, check_plans])
def test_on_a_gpu(check: Callable[..., None]) -> None:
    @settings(max_examples=200)
    @given(**cases)
    def test(**case: Any) -> None:
        check("cuda", **case)

    test()
