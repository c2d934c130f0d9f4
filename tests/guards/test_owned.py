"""A result takes a tensor's memory only where nobody else can see it."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from opsgraph.guards import owned
from opsgraph.guards.owned import in_place_of
from opsgraph.guards.watching import watching

pytestmark = pytest.mark.skipif(not owned.counted, reason="this PyTorch does not count owners")

HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda x: [x],
    "a view": lambda x: x[1:],
    "an alias": lambda x: x.detach(),
    "a storage": lambda x: x.untyped_storage(),
    "a numpy array": lambda x: x.numpy(),
    "a graph": lambda x: (torch.ones(3, 4, requires_grad=True) * x).grad_fn,
}


def fresh() -> Tensor:
    return torch.full((3, 4), 2.0)


def test_memory_of_one_variable_is_taken() -> None:
    x = fresh()
    address = x.data_ptr()
    assert in_place_of(x).data_ptr() == address
    y = in_place_of(fresh()[1:])
    assert y.shape == (2, 4)


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_another_refers_to_is_not(name: str) -> None:
    x = fresh()
    address = x.data_ptr()
    held = HOLDERS[name](x)
    made = in_place_of(x)
    assert made.data_ptr() != address
    assert (made.shape, made.dtype, made.device) == (x.shape, x.dtype, x.device)
    del held, made
    ours = name != "a numpy array"  # which leaves its mark
    assert (in_place_of(x).data_ptr() == address) == ours


def test_memory_of_other_libraries_and_other_layouts_are_not() -> None:
    x = torch.from_numpy(numpy.ones((3, 4), numpy.float32))
    address = x.data_ptr()
    assert in_place_of(x).data_ptr() != address
    y = fresh().t()
    address = y.data_ptr()
    made = in_place_of(y)
    assert made.data_ptr() != address
    assert made.is_contiguous()


def test_a_recorder_is_told_and_gets_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Recorder:
        def in_place(self, made: Tensor, over: Tensor) -> None:
            told.append((made.data_ptr(), over.data_ptr()))

    x = fresh()
    address = x.data_ptr()
    monkeypatch.setattr(watching, "recorder", Recorder())
    made = in_place_of(x)
    assert told == [(made.data_ptr(), address)]
    assert made.data_ptr() != address
