"""Lines are enough to do what generated functions do: run one by one they give the same bits."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import GELU, Add, Dropout, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.plan.lines import Line, literal, value
from opsgraph.plan.program import Argument
from opsgraph.replay.interpreter import run_line


def run(lines: Sequence[Line], ops: Any, variables: dict[str, Any]) -> Any:
    """What the function of these lines returns, without its source."""
    for line in lines:
        result = run_line(line, ops, variables)
    return result


NETS = {
    "llama": lambda: [RMSNorm(64), Linear(64, 256, bias=False), SwiGLU(), Linear(128, 64)],
    "gpt": lambda: [LayerNorm(64), Linear(64, 128), GELU(), Linear(128, 64)],
    "residual": lambda: [Tee("r"), RMSNorm(64), Linear(64, 64), Dropout(0.1), Add("r")],
    "tee": lambda: [Linear(64, 64), Tee(), GELU()],
}


OPTIONS = (
    {},
    {"checkpoint": True},
    {"backends": ("reference",)},
    {"delay_wgrad_compute": True, "recompute": False},
)


def cases() -> Iterator[Any]:
    for net in NETS:
        for options in OPTIONS:
            for cast in (False, True):
                yield pytest.param(net, options, cast, id=f"{net}-{[*options]}-{cast}")


@pytest.mark.parametrize("net, options, cast", list(cases()))
def test_lines_give_the_same_bits(net: str, options: dict[str, Any], cast: bool) -> None:
    torch.manual_seed(0)
    module = og.Sequential(*NETS[net](), **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        plan = module.plan()
    x, ops = torch.randn(6, 64), module._stages[0].ops
    weights = module._stages[0].weights()
    names = [argument.name for argument in plan.specs.inputs]
    torch.manual_seed(1)
    outputs, saved = plan.functions.forward.call(ops, x, *weights)
    torch.manual_seed(1)
    again, kept = run(
        plan.functions.forward.lines, ops, dict(zip(names, (x, *weights), strict=True))
    )
    assert_same(outputs, again)
    assert_same(saved, kept)
    ends = [torch.randn_like(y) for y in outputs]
    parameters = plan.backward_source.partition("(")[2].partition(")")[0].split(", ")
    expected = plan.functions.backward.call(ops, *ends, list(saved))
    variables = dict(zip(parameters, (ops, *ends, list(kept)), strict=True))
    gradients = run(plan.functions.backward.lines, ops, variables)
    assert_same(expected, gradients)


def assert_same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_lines_as_text() -> None:
    moved = value("x1")._replace(moved=True)
    call = Line("F.bwd", (value("dx"), moved), ("dx", ("db", "_")), note="1 cpu")
    assert str(call) == "dx, (db, _,) = F.bwd(dx, [x1])"
    assert call.reads == ["dx", "x1"]
    assert call.makes == ["dx", "db"]
    assert call.overwrites == []
    last = call._replace(dead=("x1",))
    assert last.overwrites == ["x1"]
    assert [text.strip() for text in last.text()] == [
        "x1 = [x1]",
        f"{'    dx, (db, _,) = F.bwd(dx, x1)':<70}  # 1 cpu".strip(),
        "del x1",
    ]
    assert str(Line("bind", (value("saved"),), ("x0",))) == "(x0,) = saved"
    assert str(Line("bind", (value("saved"),), ("x0", "x1"))) == "x0, x1 = saved"
    assert str(Line("cast", (value("x0"), literal(torch.bfloat16)), "x1")) == (
        "x1 = x0.to(torch.bfloat16)"
    )
    assert value("x0") is value("x0")
    view = Argument("view", "x0")
    assert str(Line("return", ((view,), ()))) == "return (x0.view_as(x0),), ()"
