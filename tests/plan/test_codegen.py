"""Rules of generated functions, of plans of all kinds; their texts are in `texts`."""

from collections.abc import Iterator

import pytest
import torch

import opsgraph as og
from opsgraph.ops import GELU, Linear, Tee
from opsgraph.plan.lines import Line
from tests.plan.sources import NETS, Call

CALLS = [
    Call(net, options, recipe, cast)
    for net in NETS
    for options in ("plain", "checkpoint", "delayed")
    for recipe in ("none", "delayed", "mxfp8")
    for cast in (False, True)
]
DEFINITIONS = ("autocast", "load")


def functions(call: Call) -> Iterator[tuple[Line, ...]]:
    plan = call.plan()
    yield plan.functions.forward.lines
    yield plan.functions.backward.lines


def defines(line: Line) -> bool:
    """Whether a line is a cast or a load, of what no step makes; not a cast of a gradient."""
    return line.note in DEFINITIONS and line.function != "cast unless None"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_casts_and_loads_stand_once_beside_their_first_reader(call: Call) -> None:
    for lines in functions(call):
        names = [line.results for line in lines if defines(line)]
        assert len(set(names)) == len(names)
        for k, line in enumerate(lines):
            if defines(line):
                reader = next(other for other in lines[k:] if not defines(other))
                again = reader.note.endswith("again")
                assert again or line.results in reader.reads, f"{line} stands before {reader}"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_what_the_caller_holds_is_neither_let_go_nor_overwritten(call: Call) -> None:
    plan = call.plan()
    arguments = {argument.name for argument in plan.specs.inputs}
    parts = {name for line in plan.functions.prepare.lines for name in line.makes}
    for line in (*plan.functions.forward.lines, *plan.functions.backward.lines):
        assert arguments.isdisjoint(line.overwrites)
        assert arguments.intersection(line.dead) <= parts
    last = {n: line for line in plan.functions.backward.lines[2:] for n in line.reads if n in parts}
    assert all(name in line.dead for name, line in last.items()), "parts are held by nobody else"


def test_what_is_saved_is_what_the_backward_reads() -> None:
    for call in CALLS:
        plan = call.plan()
        if not plan.specs.saved:
            continue
        taken, clear, *rest = plan.functions.backward.lines
        assert (str(clear), taken.reads) == ("saved.clear()", ["saved"])
        assert taken.makes == [saved.name for saved in plan.specs.saved]
        assert set(taken.makes) <= {name for line in rest for name in line.reads}


def test_the_caller_gets_views_of_what_it_has_and_of_what_it_gets_twice() -> None:
    x = torch.randn(3, 8)
    plan = og.Sequential(Tee(), Linear(8, 8), backends=("reference",)).plan(x=x)
    assert "x0.view_as(x0)" in str(plan.functions.forward.lines[-1])
    plan = og.Sequential(GELU(), Tee(), backends=("reference",)).plan(x=x)
    assert str(plan.functions.forward.lines[-1]).startswith(
        "return (x1.view_as(x1), x1.view_as(x1),)"
    )
