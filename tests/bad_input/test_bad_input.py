"""Wrong constructions, calls and settings: the error names the op, what came, what was expected.

The tables are `*.txt`; `tests/wrong_uses.py` says how they read. After each row everything is as it
was, and what is there works: the setup's `use()` gives the bits that it gave before.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_uses import FOLDER, Row, State, names, rows, run

import opsgraph as og

SECTIONS: dict[str, list[Row]] = {}
for path in sorted(FOLDER.glob("*.txt")):
    for row in rows(path.stem):
        SECTIONS.setdefault(f"{path.stem}: {row.section}", []).append(row)


def test_the_tables_are_long_and_have_no_row_twice() -> None:
    every = [row for section in SECTIONS.values() for row in section]
    assert len(every) >= 600
    assert len({(row.setup, row.code) for row in every}) == len(every)


@pytest.mark.parametrize(
    "code, error, text, problem",
    [
        ("m(x)", "OpError", "input: got", "it raises nothing"),
        ("m(None)", "PlanError", "input: got", "expected a PlanError"),
        ("m(None)", "OpError", "input: got None, expected", "and no more"),
        ("m(None)", "OpError", "input: ... got 3 ...", "expected got 3"),
        ("m[0].weight.detach().zero_(); m(None)", "OpError", "input: ...", "has changed a module"),
        ("torch.rand(1), m(None)", "OpError", "input: ...", "drawn random numbers"),
        ("m[0].eps = 3; m(None)", "OpError", "input: ...", None),
    ],
)
def test_what_the_tables_would_show(code: str, error: str, text: str, problem: str | None) -> None:
    setup = "m = og.Sequential(ops.RMSNorm(8)); x = torch.ones(2, 8); use = lambda: m(x)"
    parts = tuple(part.strip() for part in text.split("...") if part.strip())
    found = _problem(Row("", setup, code, error, parts, "..." not in text))
    assert found is None if problem is None else problem in str(found)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("section", SECTIONS)
def test_a_wrong_use_is_an_error_that_says_what_was_wrong(section: str) -> None:
    found = {row.code: problem for row in SECTIONS[section] if (problem := _problem(row))}
    assert not found, "".join(f"\n{code}\n    {problem}" for code, problem in found.items())


def _problem(row: Row) -> str | None:
    """What is wrong about a row, or None."""
    torch.manual_seed(0)
    environment: dict[str, Any] = names()
    run(row.setup, environment)
    use = environment.get("use")
    before = _leaves(use()) if use else []
    state, random = State(environment), torch.get_rng_state()
    try:
        run(row.code, environment)
    except Exception as error:
        if problem := _other(row, error):
            return problem
    else:
        return "it raises nothing"
    if not row.assigns and state.look() != state.seen:
        return "it has changed a module or a tensor"
    if use and "Linear(" not in row.code and not torch.equal(torch.get_rng_state(), random):
        return "it has drawn random numbers"
    if use:
        state.restore()
        after = _leaves(use())
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            return "the module has other results afterwards"
    return None


def _other(row: Row, error: BaseException) -> str | None:
    """Why an error is not the one of the table, or None."""
    shown = f"{type(error).__name__}: {error}"
    if row.error not in [kind.__name__ for kind in type(error).__mro__]:
        return f"got {shown}, expected a {row.error}"
    text, place = str(error), 0
    for part in row.parts:
        place = text.find(part, place)
        if place < 0:
            return f"got {shown}, expected {part}"
        place += len(part)
    if isinstance(error, og.OpsgraphError) and row.whole and text.splitlines()[0] != row.parts[0]:
        return f"got {shown}, expected {row.parts[0]} and no more"
    return None


def _leaves(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [v.detach().clone() for v in values if isinstance(v, Tensor)]
