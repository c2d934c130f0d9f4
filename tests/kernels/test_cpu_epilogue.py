"""Activations in the epilogue of a product, against fp64; the way is given, never timed."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from formulas import FORMULAS

import opsgraph as og
from opsgraph import ops
from opsgraph.kernels.cpu import build, epilogue, gemm
from opsgraph.kernels.cpu.choices import Choices
from opsgraph.ops import GELU, GLU, Linear, SiLU, SwiGLU
from opsgraph.testing import assert_same

REASON = build.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [d for d in (torch.float32, torch.bfloat16) if gemm.onednn(d)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}


class Chooser:
    """A measurement that answers with a given way, and says what it was asked for."""

    def __init__(self) -> None:
        self.answer, self.asked = "epilogue", list[list[str]]()

    def __call__(self, candidates: Mapping[str, object]) -> str:
        if self.answer not in candidates:
            return next(iter(candidates))
        self.asked.append(list(candidates))
        return self.answer


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    made = Chooser()
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(gemm, "FEW", -1)
    monkeypatch.setattr(gemm, "choices", Choices(list, made))
    monkeypatch.setattr(gemm, "_chosen", {})
    monkeypatch.setattr(epilogue, "_chosen", {})
    torch.manual_seed(0)
    return made


def expected(op: og.Op, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pre = x.double() @ weight.double().t()
    pre = pre if bias is None else pre + bias.double()
    return FORMULAS[type(op)](op, pre, lambda name: None)


def close(found: Tensor, wanted: Tensor, depth: int) -> None:
    """Sums of depth terms, whose error grows with the root of that."""
    rtol, atol = TOLERANCES[found.dtype]
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol * max(1.0, depth**0.5))


def in_epilogue(kind: str) -> bool:
    return kind in ("silu", "gelu", "swiglu", "geglu", "glu")


@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "op", [op for kind in ops.activations.ACTIVATIONS.values() for op in kind.sample()], ids=str
)
def test_every_activation_in_the_epilogue_equals_fp64_and_others_are_the_passes(
    chooser: Chooser, op: og.Op, bias: bool, dtype: torch.dtype
) -> None:
    shape = op.kernel, getattr(op, "params", ()), getattr(op, "glu_interleave_size", None)
    gated = getattr(op, "gated", "glu" in op.kernel)
    width = 128 if gated else 64
    x, weight, b = torch.randn(37, 24), torch.randn(width, 24) / 5, torch.randn(width)
    x, weight, added = x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None
    y = epilogue.linear_activation(x, weight, added, *shape)
    if in_epilogue(op.kernel) and shape[2] is None:
        assert len(chooser.asked) == 1
        close(y, expected(op, x, weight, added), 24)
    else:
        assert not chooser.asked
        assert torch.equal(y, epilogue._by_pass(x, weight, added, *shape))


@each_dtype
@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 8, 8), (3, 1, 2), (65, 7, 130), (300, 5, 600)])
def test_odd_sizes_and_strides(chooser: Chooser, sizes: tuple[int, int, int], dtype) -> None:
    rows, depth, width = sizes
    x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth) / 5, torch.randn(width)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    first = epilogue.linear_activation(x, weight, bias, "swiglu")
    close(first, expected(SwiGLU(), x, weight, bias), depth)
    wide, by_columns = x.repeat(1, 2)[:, depth:], weight.t().contiguous().t()
    spread = bias.repeat_interleave(2)[::2]
    assert torch.equal(epilogue.linear_activation(wide, by_columns, spread, "swiglu"), first)


@each_dtype
@pytest.mark.parametrize("kind", epilogue.activations.KINDS)
def test_infinity_and_nan_are_as_in_the_pass(chooser: Chooser, kind: str, dtype) -> None:
    values = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 200.0, -200.0, 0.0)
    x, weight = torch.tensor(values, dtype=dtype)[:, None], torch.ones(2, 1, dtype=dtype)
    found = epilogue.linear_activation(x, weight, None, kind)
    wanted = epilogue._by_pass(x, weight, None, kind)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_measured_once_for_each_class(chooser: Chooser) -> None:
    x, weight, bias = torch.randn(100, 16), torch.randn(48, 16), torch.randn(48)
    for rows in (100, 65, 80):  # all of them are products of 128 rows
        epilogue.linear_activation(x[:rows], weight, None, "swiglu")
    assert chooser.asked == [["epilogue", "pass"]]
    for kind, added in (("swiglu", bias), ("glu", None)):
        epilogue.linear_activation(x, weight, added, kind)
    epilogue.linear_activation(x[:64], weight, None, "swiglu")
    assert len(chooser.asked) == 4


def test_both_ways_run_when_they_are_measured(chooser: Chooser, monkeypatch) -> None:
    """Without waiting for the lock that a measurement holds, for another one."""
    times = []

    def run_all(candidates) -> str:
        times.append([run().shape for run in candidates.values()])
        return next(iter(candidates))

    monkeypatch.setattr(gemm, "choices", Choices(list, run_all))
    epilogue.linear_activation(torch.randn(100, 16), torch.randn(48, 16), None, "swiglu")
    assert times[-1] == [(128, 24), (128, 24)]


def test_where_the_pass_is_faster_or_nothing_is_measured(chooser: Chooser, monkeypatch) -> None:
    x, weight = torch.randn(100, 16), torch.randn(48, 16)
    wanted = epilogue._by_pass(x, weight, None, "swiglu")
    chooser.answer = "pass"
    assert torch.equal(epilogue.linear_activation(x, weight, None, "swiglu"), wanted)
    assert len(chooser.asked) == 1
    chooser.answer = "epilogue"
    monkeypatch.setattr(gemm, "FEW", 100)
    found = epilogue.linear_activation(x, weight, None, "geglu")
    assert torch.equal(found, epilogue._by_pass(x, weight, None, "geglu"))
    monkeypatch.setattr(gemm, "FEW", -1)
    with FakeTensorMode() as mode:
        fake = epilogue.linear_activation(
            mode.from_tensor(x), mode.from_tensor(weight), None, "glu"
        )
        assert fake.shape == (100, 24)
    assert len(chooser.asked) == 1


@each_dtype
@pytest.mark.parametrize(
    "act", [SwiGLU(), GELU(), SiLU(), GLU(), SwiGLU(glu_interleave_size=4)], ids=str
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_plans_without_gradients_have_it(chooser: Chooser, act: og.Op, bias: bool, dtype) -> None:
    width = 48 if "glu" in act.kernel else 24
    module = og.Sequential(Linear(16, width, bias), act, Linear(24, 16, bias), dtype=dtype)
    reference = og.Sequential(*module, backends=("reference",))
    x = torch.randn(37, 16).to(dtype)
    with torch.no_grad():
        assert_same(module(x), reference(x), str(act))
    assert next(step.name for step in module.plan(False).forward) == "ActivationProduct"
    assert_same(module(x).detach(), reference(x).detach(), str(act))
    assert "ActivationProduct" not in [step.name for step in module.plan(True).forward]
