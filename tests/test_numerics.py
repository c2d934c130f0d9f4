"""Errors in units in the last place, by `benchmarks.numerics`: the measure, and its numbers."""

import json
import math

import pytest
import torch

from benchmarks import numerics
from benchmarks.numerics_cases import COMPOSED, ELEMENTWISE, MOVING, ROWS, Elementwise
from opsgraph import ops
from opsgraph.kernels.cpu import build

BEYOND = 0.5
"""Units by which the largest error of ours may be beyond eager's."""
needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def test_errors_are_counted_in_units_of_the_last_place() -> None:
    exact = torch.tensor([1.0, 1.0, 0.75, 2.0**-130, 3e38, 4e38, 0.0], dtype=torch.float64)
    found = torch.tensor([1.0, 1 + 2**-23, 0.75, 0.0, math.inf, math.inf, math.nan])
    found[2] = 0.75 + 2**-24
    off = numerics.error_of(found, exact, exact)
    assert off.tolist() == [0.0, 1.0, 1.0, 2.0**19, math.inf, 0.0, math.inf]


def test_every_op_is_measured_or_said_not_to_be() -> None:
    measured = {name.partition(",")[0] for name in (*ELEMENTWISE, *ROWS)}
    assert measured | {*COMPOSED, *MOVING} == {*ops.__all__}
    assert {*COMPOSED.values()} <= measured


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_limits_at_infinities(dtype: str, name: str) -> None:
    assert numerics.limits(ELEMENTWISE[name], numerics.DTYPES[dtype], "cpu") == []


def check(name: str, dtype: str, rows: int) -> None:
    case, kind = {**ELEMENTWISE, **ROWS}[name], numerics.DTYPES[dtype]
    if isinstance(case, Elementwise):
        errors = numerics.elementwise(case, kind, "cpu", numerics.MANTISSAS)
    else:
        errors = numerics.on_rows(case, kind, "cpu", rows)
    for result, error in errors.items():
        excess, ours, eager, at = error.excess
        assert excess <= BEYOND, f"{name} {result}: {ours} units, eager {eager}, at 2^{at}"


EVERYDAY = ("SiLU", "GELU, exact", "Tanh", "Mish", "XIELU", "LayerNorm")


@needs_compiler
@pytest.mark.parametrize("name", EVERYDAY)
def test_fp32_is_about_as_exact_as_eager(name: str) -> None:
    check(name, "fp32", 32)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWS])
def test_all_are_about_as_exact_as_eager(name: str, dtype: str) -> None:
    check(name, dtype, 64)


def test_the_record_has_every_op() -> None:
    for found in json.loads((numerics.RESULTS / "numerics.json").read_text()).values():
        assert {*found["ops"]} == {*ELEMENTWISE, *ROWS}
