"""Which lines of a pass are replayed, and which stay in Python: ops and fusers of others."""

from typing import Any

import pytest
import torch
from replays import INNER, ROWS, WIDTH, build, compare, leaves, random, step, told
from torch import Tensor, nn

import opsgraph as og
from benchmarks.memory import fresh_memory
from opsgraph.fusers.cpu import products
from opsgraph.kernels.cpu import build as library
from opsgraph.kernels.cpu import memory
from opsgraph.ops import GELU, BasicLinear, Bias, Linear, Residual, RMSNorm, SwiGLU

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")

X = random(ROWS, WIDTH)


class Doubles(og.Op):
    """2 x, and counts its calls."""

    calls = [0, 0]

    def fwd(self, x: Tensor) -> Any:
        Doubles.calls[0] += 1
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> Any:
        Doubles.calls[1] += 1
        return 2 * dy, ()


def around(op: og.Op) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(
        RMSNorm(WIDTH), Linear(WIDTH, WIDTH, bias=False), op, SwiGLU(),
        Linear(WIDTH // 2, WIDTH, bias=False),
    )  # fmt: skip


def steps(module: Any, count: int = 5) -> list[Any]:
    return [leaves(step(module, X + k)) for k in range(count)]


def test_a_users_op_runs_in_python_at_every_step_and_its_neighbours_replay() -> None:
    module = compare(lambda: around(Doubles()), steps)
    Doubles.calls[:] = 0, 0
    steps(module, 7)
    assert Doubles.calls == [7, 7]
    texts = told(module.plan(True, X))
    assert texts["forward"] == [
        "0, 1: 2 launches in one native call",
        "2 Doubles.fwd in Python: it is no function of opsgraph's",
        "3, 4: 2 launches in one native call",
    ]
    assert texts["backward"][1] == "2 Doubles.bwd in Python: it is no function of opsgraph's"
    assert all("in one native call" in texts["backward"][k] for k in (0, 2))


class Halves(og.Op):
    """x / 2, without a backward of its own."""

    def fwd(self, x: Tensor) -> Any:
        return x / 2, ()


class Scales(og.Op):
    """A parameter, and saved values: y, and a view of x."""

    saves = ("whole", "part")

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((WIDTH,), 1.5))

    def fwd(self, x: Tensor, gain: Tensor) -> Any:
        y = x * gain
        return y, (y, x[:2])

    def bwd(self, dy: Tensor, whole: Tensor, part: Tensor, gain: Tensor) -> Any:
        return dy * gain + part.sum() * 0, ((dy * whole / gain).sum(0),)


class Turns(og.Op):
    """2 x, in another memory layout at every third call."""

    calls = 0

    def fwd(self, x: Tensor) -> Any:
        self.calls += 1
        y = 2 * x
        return (y if self.calls % 3 else y.t().contiguous().t()), ()

    def bwd(self, dy: Tensor) -> Any:
        self.calls += 1
        dx = 2 * dy
        return (dx if self.calls % 3 else dx.t().contiguous().t()), ()


class Sometimes(og.Op):
    """x itself at first, 3 x later."""

    calls = 0

    def fwd(self, x: Tensor) -> Any:
        self.calls += 1
        return (x if self.calls < 4 else 3 * x), ()

    def bwd(self, dy: Tensor) -> Any:
        return (dy if self.calls < 4 else 3 * dy), ()


def largest(x: Tensor) -> float:
    return 1.0 if x.is_meta else x.abs().max().item()


class Reads(og.Op):
    """x, divided by a number that it reads from x."""

    def fwd(self, x: Tensor) -> Any:
        return x / (1 + largest(x)), ()

    def bwd(self, dy: Tensor, x: Tensor) -> Any:
        return dy / (1 + largest(x)), ()


class Expands(og.Op):
    """The mean of each row in all of its places, as a view at first."""

    calls = 0

    def fwd(self, x: Tensor) -> Any:
        self.calls += 1
        y = x.mean(1, keepdim=True).expand_as(x)
        return (y if self.calls < 4 else y + x), ()

    def bwd(self, dy: Tensor) -> Any:
        dx = dy.mean(1, keepdim=True).expand_as(dy)
        return (dx if self.calls < 4 else dx + dy), ()


@pytest.mark.parametrize("kind", [Halves, Scales, Turns, Sometimes, Reads, Expands])
def test_ops_that_do_as_they_please(kind: type[og.Op]) -> None:
    module = compare(lambda: around(kind()), lambda m: steps(m, 8))
    texts = told(module.plan(True, X))["forward"]
    assert f"2 {kind.__name__}.fwd in Python: it is no function of opsgraph's" in texts
    assert any("native call" in text for text in texts)


@pytest.mark.parametrize("kind", [Sometimes, Turns, Scales, Expands])
def test_what_ops_share_with_their_input_is_read_by_others_too(kind: type[og.Op]) -> None:
    def make() -> og.Sequential:
        torch.manual_seed(0)
        inner = Residual(kind(), RMSNorm(WIDTH), Linear(WIDTH, WIDTH, bias=False))
        return og.Sequential(Linear(WIDTH, WIDTH, bias=False), inner, RMSNorm(WIDTH), GELU())

    compare(make, lambda m: steps(m, 8))


class Counted(og.Fuser):
    """A fuser of somebody else's."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias)
    calls = 0

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        Counted.calls += 1
        return nn.functional.linear(x, fc_weight, bias_bias), ()


def test_a_users_fuser_runs_in_python_at_every_step() -> None:
    def make() -> og.Sequential:
        torch.manual_seed(0)
        return og.Sequential(RMSNorm(WIDTH), Linear(WIDTH, INNER), GELU(), Linear(INNER, WIDTH))

    with og.register(Counted):
        module = compare(make, steps)
        Counted.calls = 0
        steps(module, 6)
        texts = told(module.plan(True, X))["forward"]
    assert Counted.calls == 12
    why = "in Python: it is no function of opsgraph's"
    assert texts == [
        "0: 1 launches in one native call", f"1-2 Counted.fwd {why}",
        "3: 1 launches in one native call", f"4-5 Counted.fwd {why}",
    ]  # fmt: skip


def test_a_kernel_that_overwrites_what_it_alone_holds_stays_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.use_deterministic_algorithms(False)  # filling memory is an op that is not replayed
    monkeypatch.setattr(memory, "LEAST", 1)
    monkeypatch.setattr(products, "_one_pass", lambda x: False)
    with fresh_memory():
        module = compare(lambda: build("llama"), steps)
        texts = told(module.plan(True, X))["backward"]
    assert texts == [
        "2-3 ActivationProductBackward.bwd in Python: it overwrites what nobody else holds",
        "0-1: 4 launches in one native call",
    ]


def test_a_pass_of_which_nothing_is_known_is_recorded_no_more() -> None:
    module = og.Sequential(Doubles(), Halves())
    for _ in range(4):
        step(module, X)
    plan = module.plan(True, X)
    why = "in Python: it is no function of opsgraph's"
    assert told(plan) == {
        "forward": [f"0 Doubles.fwd {why}", f"1 Halves.fwd {why}"],
        "backward": [f"1 Halves_vjp {why}", f"0 Doubles.bwd {why}"],
    }


class Calls(og.Op):
    """x plus what another module makes of it, which is recorded and replayed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = [build("gpt")]

    def fwd(self, x: Tensor) -> Any:
        with torch.no_grad():
            return x + (0 if x.is_meta else self.inner[0](x)), ()

    def bwd(self, dy: Tensor) -> Any:
        with torch.no_grad():
            return dy + (0 if dy.is_meta else self.inner[0](dy)), ()


def test_a_module_inside_of_an_op() -> None:
    module = compare(lambda: around(Calls()), lambda m: steps(m, 8))
    texts = told(module.plan(True, X))
    assert texts["forward"] == [
        "0, 1: 2 launches in one native call",
        "2 Calls.fwd in Python: it is no function of opsgraph's",
        "3, 4: 2 launches in one native call",
    ]
    inner = module[2].inner[0]
    assert "native call" in told(inner.plan(False, X))["forward"][0]
