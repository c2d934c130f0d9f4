"""Constants in generated source are exact, whatever they are; what could change is refused."""

import enum
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops


class Color(enum.Enum):
    RED = 1


class Kind(str, enum.Enum):
    PLAIN = "plain"


class Point(NamedTuple):
    x: float


class Mutable:
    """Says that it compares by what it holds, which may change."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mutable)

    __hash__ = None  # type: ignore[assignment]


class Notes(og.Op):
    """Notes what its functions were given."""

    constants = ("what",)

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what
        self.seen: tuple[Any, ...] = ()

    def fwd(self, x: Tensor, what: Any) -> Any:
        NOTED.append(what)
        return 2 * x, ()

    def bwd(self, dy: Tensor, what: Any) -> Any:
        NOTED.append(what)
        return 2 * dy, ()

    def out(self, x: og.Spec) -> og.Spec:
        return x


NOTED: list[Any] = []


def double(x: Any) -> Any:
    return 2 * x


def noted(what: Any) -> list[Any]:
    """A constant as `fwd` and `bwd` get it."""
    NOTED.clear()
    og.Sequential(Notes(what))(torch.ones(2, 3, requires_grad=True)).sum().backward()
    return list(NOTED)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return type(one) is type(other) and all(map(same, one, other))
    if type(one) is float:
        equal = one.hex() == other.hex()
        return equal and math.copysign(1, one) == math.copysign(1, other)
    if type(one) is type(other) is complex:
        return same(one.real, other.real) and same(one.imag, other.imag)
    return type(one) is type(other) and bool(one == other)


EXACT = (
    True, 1, 10**40, 1 << 20_000, 0.1, 5e-324, -0.0, math.inf, -math.inf, math.nan, 1j,
    -1j, complex(-0.0, 1), complex(0, math.inf), "it's \n\ud800 \\", b"\x00", None, ..., (), (1,),
    (1, (2.0, "a")), (math.inf, (None,)), torch.bfloat16, torch.device("cpu"),
    torch.device("cuda", 1), torch.strided, torch.channels_last, torch.Size((2, 3)), Color.RED,
    (Color.RED, 1), Kind.PLAIN, [1, math.inf], {"a": [1]}, {1}, bytearray(b"a"), (1, [2]),
    Point(-0.0), frozenset({1}), range(3), nn.functional.silu, double, partial(double), Tensor, int,
    torch.ops.aten.add.Tensor, len, lambda x: x, "x0", "ops", np.float32,
)  # fmt: skip


@pytest.mark.parametrize("value", EXACT, ids=lambda value: str(type(value).__name__))
def test_constants_arrive_as_they_are(value: Any) -> None:
    found = noted(value)
    assert len(found) == 2
    assert all(same(value, other) for other in found)


@pytest.mark.parametrize(
    "given, value",
    [
        (np.int64(3), 3),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(1e-5), 1e-5),
        (np.bool_(True), True),
        (np.array(2.5), 2.5),
        (torch.tensor(1e-5, dtype=torch.float64), 1e-5),
        (torch.tensor(3), 3),
        ((np.float32(0.5), (torch.tensor(True),)), (0.5, (True,))),
        (np.str_("a"), "a"),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_torch_become_pythons(given: Any, value: Any) -> None:
    assert all(same(value, other) for other in noted(given))


@pytest.mark.parametrize(
    "build",
    [
        lambda f: ops.RMSNorm(f(8), eps=f(1e-5)),
        lambda f: ops.LayerNorm(f(8), eps=f(1e-5), zero_centered_gamma=f(True)),
        lambda f: ops.L2Normalization(eps=f(1e-6)),
        lambda f: ops.ClampedSwiGLU(limit=f(0.5)),
        lambda f: ops.SwiGLU(f(2)),
        lambda f: ops.ConstantScale(f(0.1)),
        lambda f: og.LayerNormMLP(f(8), f(16), eps=f(1e-5), activation="swiglu", device="cpu"),
    ],
)
@pytest.mark.parametrize("wrap", [np.array, torch.tensor, lambda v: np.asarray(v)[()]])
def test_ops_take_numbers_of_numpy_and_torch(build: Any, wrap: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    expected = build(lambda v: v)
    torch.manual_seed(0)
    found = build(lambda v: wrap(np.float64(v)) if isinstance(v, float) else wrap(v))
    x = torch.randn(3, 8)
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize(
    "value",
    [
        np.ones(2), [np.ones(2)], {"a": torch.ones(2)}, (1, [torch.ones(2)]), Mutable(),
        torch.ones(2), torch.ones(1, 1),
        nn.Parameter(torch.tensor(1.0)), torch.empty((), device="meta"), nn.SiLU(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_can_change_unnoticed_is_refused(value: Any) -> None:
    message = r"0:Notes: got what = .*, a \w+, expected a (constant that|parameter)"

    class Held(Notes):
        def __init__(self) -> None:
            super().__init__(None)
            object.__setattr__(self, "what", value)

    Held.__name__ = "Notes"
    with pytest.raises(og.OpError, match=message):
        og.Sequential(Held())


def test_a_constant_that_is_not_there_is_refused() -> None:
    class Without(Notes):
        constants = ("what", "other")

    with pytest.raises(og.PlanError, match="0:Without: got no 'other', which its constants name"):
        og.Sequential(Without(1))


def renamed(factor: int) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return factor * x

    return function


@pytest.mark.parametrize(
    "values",
    [
        (1, 1.0, True),
        (0.0, -0.0),
        (0.1, np.float32(0.1)),
        ((1,), (1.0,), (True,)),
        (Point(0.0), Point(-0.0), (0.0,)),
        (frozenset({1}), frozenset({True})),
        (renamed(2), renamed(3)),
        ("1", 1),
        (Kind.PLAIN, "plain"),
        (1j, complex(-0.0, 1)),
    ],
)
def test_equal_but_different_constants_share_no_plan(values: tuple[Any, ...]) -> None:
    modules = [og.Sequential(Notes(value)) for value in values]
    for module, value in zip(modules, values, strict=True):
        NOTED.clear()
        module(torch.ones(2, 3))
        expected = value.item() if isinstance(value, np.generic) else value
        assert same(expected, NOTED[0])
    assert len({id(module._stages[0].table) for module in modules}) == len(modules)


@pytest.mark.parametrize("value", [math.nan, 0.5, ("a", 1), double, torch.float16])
def test_equal_constants_share_their_plans(value: Any) -> None:
    tables = {id(m._stages[0].table) for m in [og.Sequential(Notes(value)) for _ in range(3)]}
    assert len(tables) == 1


def test_two_functions_of_one_name_stand_beside_each_other() -> None:
    functions = renamed(2), renamed(3), renamed(4)
    module = og.Sequential(*map(Notes, functions))
    NOTED.clear()
    module(torch.ones(2, 3))
    assert tuple(NOTED) == functions
    module[1].what = functions[0]
    NOTED.clear()
    module(torch.ones(2, 3))
    assert tuple(NOTED) == (functions[0], functions[0], functions[2])


def test_a_fuser_is_given_constants_as_they_are() -> None:
    class Both(og.Fuser):
        backend, pattern = "aten", dict(a=Notes, b=Notes)

        def fwd(self, x: Tensor, a_what: Any, b_what: Any) -> Any:
            NOTED.extend((a_what, b_what))
            return 4 * x, ()

    NOTED.clear()
    with og.register(Both), torch.no_grad():
        og.Sequential(Notes(double), Notes(-math.inf))(torch.ones(2, 3))
    assert [double, -math.inf] == NOTED


def test_a_constant_that_a_property_computes() -> None:
    class Computed(Notes):
        constants = ("what", "half")

        @property
        def half(self) -> Any:
            return np.float32(self.what / 2)

        def fwd(self, x: Tensor, half: float) -> Any:
            return x * half, ()

        def bwd(self, dy: Tensor, half: float) -> Any:
            return dy * half, ()

    module = og.Sequential(Computed(3))
    assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 1.5))
