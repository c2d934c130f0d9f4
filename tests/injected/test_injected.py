"""Faults that are put in: what fails says so, nothing of the caller's changes, all works later.

Each case at the first call, the second, which is recorded, and the fourth, which is replayed.
`tests/kernels/test_cpu_build.py` and `test_choices.py` have compilers, caches and disks that fail.
"""

import copy
import ctypes
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_uses import State

import opsgraph as og
from opsgraph.kernels.cpu import activations, build, memory, norms, quantize
from opsgraph.ops import Dropout, Linear, RMSNorm, SwiGLU
from opsgraph.quantizers import TensorQuantizer
from opsgraph.recipe import CustomRecipe, DelayedScaling
from opsgraph.replay import record

WIDTH, ROWS = 16, 6


class InjectedError(Exception):
    """What is put in."""


class Where:
    """Where the next fault is, and how many steps come before it."""

    def __init__(self) -> None:
        self.at: str | None = None
        self.left = 0

    def fail(self, at: str, make: Callable[[str], Exception] = InjectedError) -> None:
        if at == self.at:
            if not self.left:
                raise make(f"in {at}")
            self.left -= 1


WHERE = Where()


@pytest.fixture(autouse=True)
def _none_before() -> Iterator[None]:
    WHERE.at, WHERE.left = None, 0
    yield
    WHERE.at = None


class Doubled(og.Op):
    """`y = 2 * x`"""

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return 2 * dy, ()


class Faulty(og.Fuser):
    """Doubles, or fails."""

    backend = "cpu"
    pattern = {"a": Doubled}

    def reject(self, a: Doubled) -> str | None:
        WHERE.fail("reject")
        return None

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        WHERE.fail("fwd")
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        WHERE.fail("bwd")
        return 2 * dy, ()


_serial = count(1)


def _module(eps: float = 1e-5) -> og.Sequential:
    torch.manual_seed(0)
    layers = (
        RMSNorm(WIDTH, eps),
        Linear(WIDTH, 2 * WIDTH),
        SwiGLU(),
        Doubled(),
        Linear(WIDTH, WIDTH),
    )
    return og.Sequential(*layers)


def _step(module: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients, which are left nowhere."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return [y, *torch.autograd.grad(y.sum(), [leaf, *module.parameters()])]


def _fails(state: State, module: Any, x: Tensor, expected: list[Tensor], step: str) -> None:
    """A step fails and changes nothing; the next one is as those before."""
    with pytest.raises(InjectedError, match=f"in {step}") as caught:
        _step(module, x)
    assert step in "".join(traceback.format_tb(caught.value.__traceback__))
    WHERE.at = None
    assert state.look() == state.seen
    assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, _step(module, x), expected))


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("at", ["reject", "fwd", "bwd"])
def test_a_fuser_that_raises(at: str, calls: int) -> None:
    x = torch.randn(ROWS, WIDTH)
    expected = _step(_module(), x)
    with og.register(Faulty):
        module = _module()
        for _ in range(calls):
            _step(module, x)
        if at == "reject":
            module.recompute = False  # it plans again
            expected = [*expected]
        state = State({"m": module, "x": x})
        WHERE.at = at
        _fails(state, module, x, expected, at)
        assert "Faulty" in str(module.plan())


class Weighed(og.Op):
    """`y = x * weight`, made again where the next op's backward wants it; each part may fail."""

    params = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((WIDTH,), 0.7))

    def fwd(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[()]]:
        WHERE.fail("fwd")
        return x * weight, ()

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        WHERE.fail("dgrad")
        return dy * weight

    def wgrad(self, dy: Tensor, x: Tensor) -> Tensor:
        WHERE.fail("wgrad")
        return (dy * x).flatten(0, -2).sum(0)

    def again(self, x: Tensor, weight: Tensor) -> Tensor:
        WHERE.fail("again")
        return x * weight


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("at", ["fwd", "dgrad", "wgrad", "again"])
def test_an_op_that_raises(at: str, calls: int) -> None:
    """In each function that an op of a user's may have."""
    x = torch.randn(ROWS, WIDTH)
    torch.manual_seed(0)
    module = og.Sequential(Weighed(), Linear(WIDTH, WIDTH), recompute=True)
    expected = _step(copy.deepcopy(module), x)
    for _ in range(calls):
        _step(module, x)
    state = State({"m": module, "x": x})
    WHERE.at = at
    _fails(state, module, x, expected, at)


class FaultyQuantizer(TensorQuantizer):
    """Quantizes, or fails."""

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Any:
        WHERE.fail("copy")
        return super().copy(x, scale, col)


RECIPE = CustomRecipe(lambda role: FaultyQuantizer(torch.float8_e4m3fn))


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("before", range(6))
def test_a_quantizer_that_raises(before: int, calls: int) -> None:
    """Of weights, activations and gradients: a step quantizes six tensors."""
    torch.manual_seed(0)
    x, module = torch.randn(32, 32), og.Sequential(Linear(32, 32), Linear(32, 32))
    with og.autocast(recipe=RECIPE):
        for _ in range(calls):
            _step(module, x)
        expected = _step(module, x) if calls else None
        state = State({"m": module, "x": x})
        WHERE.at, WHERE.left = "copy", before
        with pytest.raises(InjectedError, match="in copy"):
            _step(module, x)
        WHERE.at = None
        assert state.look() == state.seen
        after = _step(module, x)
        again = _step(module, x) if expected is None else expected
    assert all(map(torch.equal, after, again))


class Spoilt(Faulty):
    """Makes NaN of all."""

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return torch.full_like(x, torch.nan), ()


def test_nan_of_a_kernel_reaches_the_caller() -> None:
    """It is a value like others; a check of every step finds whose it is."""
    x, module = torch.randn(ROWS, WIDTH), _module()
    expected = _step(module, x)
    with og.register(Spoilt):
        for _ in range(4):
            assert module(x).isnan().all()
    assert all(map(torch.equal, _step(module, x), expected))


def test_nan_of_a_kernel_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    with og.register(Spoilt), pytest.raises(Exception, match="Spoilt"):
        _module()(torch.randn(ROWS, WIDTH))


class Memory:
    """Allocations of kernels and of replays, of which one fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = self.counted(memory.empty)
        for module in (memory, activations, norms, quantize):
            monkeypatch.setattr(module, "empty", empty)
        strided = record.empty_strided
        monkeypatch.setattr(record, "empty_strided", lambda device: self.counted(strided(device)))
        monkeypatch.setattr(torch, "empty", self.counted(torch.empty))

    def counted(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any, **options: Any) -> Tensor:
            WHERE.fail("allocation", torch.OutOfMemoryError)
            return allocate(*arguments, **options)

        return counted


def _each_allocation_fails(module: Any, step: Callable[[], list[Tensor]]) -> int:
    """Has each allocation of a step fail in turn. Returns how many there were."""
    expected = step()
    for number in range(100):
        state = State({"m": module})
        WHERE.at, WHERE.left = "allocation", number
        try:
            found = step()
        except torch.OutOfMemoryError:
            WHERE.at = None
            assert state.look() == state.seen
        else:
            WHERE.at = None
            assert all(map(torch.equal, found, expected))
            return number
        assert all(map(torch.equal, step(), expected))
    raise AssertionError("a step allocates without end")


@pytest.mark.parametrize("calls", [0, 3])
def test_an_allocation_that_fails(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a step in turn, in the forward and in the backward."""
    Memory(monkeypatch)
    # Equal modules share what is replayed, whose allocations no one would count.
    x, module = torch.randn(ROWS, WIDTH), _module(1e-5 + 1e-8 * next(_serial))
    for _ in range(calls):
        _step(module, x)
    assert _each_allocation_fails(module, lambda: _step(module, x)) >= 2


def test_an_allocation_that_fails_under_delayed_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and histories of amaxes are those of before, and the next step has the same bits."""
    Memory(monkeypatch)
    torch.manual_seed(0)
    recipe = DelayedScaling(amax_history_len=2)
    norm = RMSNorm(32, 1e-5 + 1e-8 * next(_serial))
    x, module = torch.randn(32, 32), og.Sequential(norm, Linear(32, 64), SwiGLU(), Linear(32, 32))
    recipe.prepare(module)

    def step() -> list[Tensor]:
        with og.autocast(recipe=recipe):
            return _step(module, x)

    for _ in range(6):
        step()  # the same x: scales stay as they are
    scaling = {k: v.clone() for k, v in module.state_dict().items() if "scaling" in k}
    expected, failed = step(), 0
    for number in range(40):
        WHERE.at, WHERE.left = "allocation", number
        try:
            step()
        except torch.OutOfMemoryError:
            failed += 1
        WHERE.at = None
        assert all(map(torch.equal, step(), expected))
    after = module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in scaling.items())
    assert failed


def test_random_numbers_are_drawn_once_for_a_step_that_fails() -> None:
    """Those that the failed call drew are gone, as in PyTorch; no call draws another number."""
    with og.register(Faulty):
        module = og.Sequential(Dropout(0.5), Doubled())
        x = torch.randn(ROWS, WIDTH)
        for _ in range(4):
            module(x)
        torch.manual_seed(0)
        module(x)
        once = torch.get_rng_state()
        torch.manual_seed(0)
        WHERE.at = "fwd"
        with pytest.raises(InjectedError):
            module(x)
        assert torch.equal(torch.get_rng_state(), once)


def test_a_compiler_that_writes_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says that all is well: what cannot be loaded is a reason, then and the next time."""
    if build.why_not() is not None:
        pytest.skip(str(build.why_not()))
    whole = build.library("norms")._name
    compiler = tmp_path / "compiler"
    script = 'while [ "$1" != -o ]; do shift; done; head -c 5000 '
    compiler.write_text(f'#!/bin/sh\n{script}"{whole}" > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for _ in range(2):
        with pytest.raises(build.BuildError, match="wrote 5000 bytes, a part of a library"):
            build._load("norms")
    compiler.write_text(f'#!/bin/sh\n{script.replace("-c 5000", "-c 999999999")}"{whole}" > "$2"\n')
    assert isinstance(build._load("norms"), ctypes.CDLL)
