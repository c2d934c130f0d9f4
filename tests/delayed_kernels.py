"""Delayed scaling by kernels and by formulas: the update and the noting of amaxes, bit by bit."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsgraph.guards.launching import Launch
from opsgraph.kernels.reference import quantize

FORWARD, BACKWARD = "amax_forward", "amax_backward"
COLUMNS = {FORWARD: slice(0, 2), BACKWARD: slice(2, 3)}
LIMITS = (448.0, 57344.0)
EDGES = [0.0, -1.0, math.inf, math.nan, 1e-44, 2e-38, 3e38, 448.0]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cpu().view(torch.int32) for tensor in tensors]


def state(length: int, generator: torch.Generator, device: str) -> list[Tensor]:
    """Scale, amaxes of a forward and of a backward, history: some values at the edge."""

    def some(*shape: int) -> Tensor:
        values = torch.exp(20 * torch.randn(shape, generator=generator))
        edges = torch.tensor(EDGES)[torch.randint(len(EDGES), shape, generator=generator)]
        rare = torch.rand(shape, generator=generator) < (0.3 if len(shape) < 2 else 0.3 / shape[0])
        return torch.where(rare, edges, values)

    buffers = [some(3).nan_to_num(1.0).abs(), some(2), some(1), some(length, 3)]
    return [buffer.to(device) for buffer in buffers]


def expected(
    buffers: list[Tensor], margin: float, algorithm: str, names: tuple[str, ...],
    reduced: dict[str, Tensor],
) -> list[Tensor]:  # fmt: skip
    """By the formulas, on the CPU."""
    scale, *amaxes, history = [buffer.clone() for buffer in buffers]
    for name in names:
        columns, limit = COLUMNS[name], LIMITS[name == BACKWARD]
        amax = reduced.get(name, amaxes[name == BACKWARD])
        before = torch.cat((amax[None], history[1:, columns]))
        rolled, new = quantize.delayed_update(before, scale[columns], limit, margin, algorithm)
        history[:, columns] = torch.where(amax < 0, history[:, columns], rolled)
        scale[columns] = torch.where(amax < 0, scale[columns], new)
        amaxes[name == BACKWARD].fill_(-1.0)
    return [scale, *amaxes, history]


UPDATES: dict[Any, list[Any]] = {
    "is_reduced": [False, True],
    "names": [(BACKWARD,), (FORWARD,), (BACKWARD, FORWARD)],
    ("margin", "algorithm"): [(0, "max"), (-20, "max"), (1.5, "most_recent")],
    "length": [1, 2, 16, 1024, 1025, 2500],
}


def check_update(
    updating: Callable[..., Launch], length: int, margin: float, algorithm: str,
    names: tuple[str, ...], is_reduced: bool, device: str,
) -> None:  # fmt: skip
    """Of some states."""
    generator = torch.Generator().manual_seed(length)
    states = [state(length, generator, device) for _ in range(6 if length < 100 else 2)]
    others: dict[str, Any] = {name: [state(1, generator, "cpu")[2 - (name == FORWARD)]
              for _ in states] for name in names} if is_reduced else {}  # fmt: skip
    found = None
    want = [
        expected([b.cpu() for b in buffers], margin, algorithm, names,
                 {name: values[k] for name, values in others.items()})
        for k, buffers in enumerate(states)
    ]  # fmt: skip
    if is_reduced:
        found = torch.cat([value for name in names for value in others[name]]).to(device)
    table = torch.tensor([[b.data_ptr() for b in buffers] for buffers in states], device=device)
    latest = algorithm == "most_recent"
    before = [bits([buffers[0].clone()]) for buffers in states]
    fixed = quantize.new_scales(len(states) * (1 + (FORWARD in names)), table.device)
    update = updating(table, length, LIMITS, margin, latest, names, is_reduced)
    update(table, fixed, *([found] if found is not None else []))
    for k, buffers in enumerate(states):
        assert all(map(torch.equal, bits(buffers), bits(want[k])))
        assert torch.equal(*bits([fixed[k].clone(), buffers[0]]))
        if FORWARD in names:
            assert torch.equal(*bits([fixed[len(states) + k].clone()]), before[k][0])
        assert all(view.data_ptr() % 16 == 0 for view in fixed[k].unbind())


def check_noting(raise_to: Callable[..., None], count: int, device: str) -> None:
    """`torch.maximum` in place, of any addresses, a NaN included; one may be there twice."""
    pairs = [(a, b) for a in (-1.0, *EDGES) for b in EDGES][::3][:count]
    held, new = (torch.tensor(values, device=device) for values in zip(*pairs, strict=True))
    expected = torch.maximum(held, new)
    raise_to(held.unbind(), new.unbind())
    torch.testing.assert_close(held, expected, rtol=0, atol=0, equal_nan=True)
    for values in ((1.0, 3.0), (3.0, 1.0)):
        held = torch.tensor(-1.0, device=device)
        raise_to([held] * 2, torch.tensor(values, device=device).unbind())
        assert held == 3.0
