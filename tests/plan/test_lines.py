"""Lines are enough to do what generated functions do: a replay of them gives the same bits."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import GELU, Add, Dropout, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.plan.lines import Line, literal, value
from opsgraph.plan.program import Argument


def replay(lines: Sequence[Line], ops: Any, variables: dict[str, Any]) -> Any:
    """What the function of these lines returns, without its source."""

    def there(argument: Any, dead: Sequence[str]) -> Any:
        if not isinstance(argument, Argument):
            return tuple(there(item, dead) for item in argument)
        if argument.category == "op":
            return ops[argument.value]
        if argument.category in ("literal", "object"):
            return argument.value
        found = variables[argument.text]
        if argument.category == "view":
            return found.view_as(found)
        if not argument.moved:
            return found
        return [variables.pop(argument.text) if argument.text in dead else found]

    def bind(names: Any, values: Any) -> None:
        if isinstance(names, str):
            variables[names] = values
        else:
            for name, item in zip(names, values, strict=True):
                bind(name, item)

    for line in lines:
        given = [there(argument, line.dead) for argument in line.arguments]
        words = {name: there(argument, ()) for name, argument in line.keywords}
        result = run(line, given, words)
        if line.function == "return":
            return result
        bind(line.results, result)
        for name in line.dead:
            variables.pop(name, None)
    raise AssertionError("it does not return")


def run(line: Line, given: list[Any], words: dict[str, Any]) -> Any:
    owner, _, name = line.function.rpartition(".")
    expressions = {
        "bind": lambda x: x,
        "cast": lambda x, dtype: x.to(dtype),
        "cast unless None": lambda x, dtype: None if x is None else x.to(dtype),
        "add": lambda x, y: x + y,
        "weigh": lambda op, *rest: op.weigh(*rest),
        "wgrad_by": lambda op, *rest: op.wgrad_by(*rest),
        "clear": lambda x: x.clear() or (),
        "return": lambda *results: results,
    }
    if line.function in expressions:
        return expressions[line.function](*given)
    return (getattr(line.target, name) if owner else line.target)(*given, **words)


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
def test_a_replay_gives_the_same_bits(net: str, options: dict[str, Any], cast: bool) -> None:
    torch.manual_seed(0)
    module = og.Sequential(*NETS[net](), **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        plan = module.plan()
    x, ops = torch.randn(6, 64), module._stages[0].ops
    weights = module._stages[0].weights()
    names = [argument.name for argument in plan.specs.inputs]
    torch.manual_seed(1)
    outputs, saved = plan.run_forward(ops, x, *weights)
    torch.manual_seed(1)
    again, kept = replay(plan.forward_lines, ops, dict(zip(names, (x, *weights), strict=True)))
    assert_same(outputs, again)
    assert_same(saved, kept)
    ends = [torch.randn_like(y) for y in outputs]
    parameters = plan.backward_source.partition("(")[2].partition(")")[0].split(", ")
    expected = plan.run_backward(ops, *ends, list(saved))
    variables = dict(zip(parameters, (ops, *ends, list(kept)), strict=True))
    (gradients,) = replay(plan.backward_lines, ops, variables)
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
    view = Argument("view", "x0")
    assert str(Line("return", ((view,), ()))) == "return (x0.view_as(x0),), ()"
