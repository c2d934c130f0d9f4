"""A step of GroupedLinear, SwiGLU, GroupedLinear beside `torch._grouped_mm`, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from benchmarks import device_time
from benchmarks.calls import LIMITS, WARM, attempt, verify
from benchmarks.gpu_parts import DEVICE, Case, Options, Task, free, synchronize
from benchmarks.timing import alternate
from opsgraph.ops import GroupedLinear, SwiGLU

OURS, EAGER, COMPILED = "opsgraph", "torch._grouped_mm", "torch._grouped_mm, compiled"
SINGLE = "opsgraph, single_grouped_weight"
"""A parameter for each layer, as PyTorch's module has; otherwise it is one for each group."""
MULTIPLE = 16
"""Rows of a group: `torch._grouped_mm` takes offsets of multiples of 16 bytes."""


class Groups(NamedTuple):
    """A case of the benchmark."""

    count: int
    rows: int
    hidden: int
    ffn: int
    uneven: bool

    @property
    def name(self) -> str:
        """`8 groups, 16384x2048x5632, uneven`."""
        told = f"{self.count} groups, {self.rows}x{self.hidden}x{self.ffn}"
        return told + (", uneven" if self.uneven else "")

    def sizes(self) -> list[int]:
        """Rows of each group; uneven ones fall off exponentially in an order without a rule."""
        share = self.rows // self.count
        if not self.uneven:
            return [share] * self.count
        generator = torch.Generator().manual_seed(self.count)
        parts = -torch.rand(self.count, generator=generator).clamp(1e-3).log()
        sizes = (parts / parts.sum() * self.rows / MULTIPLE).int() * MULTIPLE
        sizes[int(sizes.argmax())] += self.rows - int(sizes.sum())
        found: list[int] = sizes.tolist()
        return found


CASES = (
    Groups(8, 16384, 2048, 5632, False),
    Groups(8, 16384, 2048, 5632, True),
    Groups(64, 32768, 2048, 1024, True),
    Groups(128, 16384, 2048, 768, True),
)


Called = tuple[nn.Module, tuple[Tensor, ...]]
"""A module and its extra inputs."""


class TorchGrouped(nn.Module):
    """The same in PyTorch: parameters `[groups, out, in]`."""

    def __init__(self, fc1: Tensor, fc2: Tensor) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Parameter(fc1), nn.Parameter(fc2)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """offsets: int32, where each group ends."""
        both = torch._grouped_mm(x, self.fc1.transpose(-2, -1), offs=offsets)
        gate, value = both.chunk(2, -1)
        return torch._grouped_mm(F.silu(gate) * value, self.fc2.transpose(-2, -1), offs=offsets)


def step(module: nn.Module, x: Tensor, dy: Tensor, *extra: Tensor) -> Tensor | None:
    """Forward and backward, fresh gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x, *extra).backward(dy)
    return x.grad


def modules(
    groups: Groups,
) -> tuple[dict[str, Called], dict[str, str]]:
    """By name, the module and its extra inputs; and why others are not there."""
    place: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    count, _, hidden, ffn, _ = groups
    fc1 = torch.randn(count, 2 * ffn, hidden, **place) / hidden**0.5
    fc2 = torch.randn(count, hidden, ffn, **place) / ffn**0.5
    sizes = torch.tensor(groups.sizes(), device=DEVICE)
    found: dict[str, Called] = {}
    for name in (OURS, SINGLE):
        options = place | {"single_grouped_weight": name == SINGLE}
        own = og.Sequential(
            GroupedLinear(count, hidden, 2 * ffn, False, **options),
            SwiGLU(),
            GroupedLinear(count, ffn, hidden, False, **options),
        )
        own.load_state_dict({"0.weight": fc1, "2.weight": fc2})
        found[name] = own, (sizes, sizes)
    if not hasattr(torch, "_grouped_mm"):
        return found, {EAGER: "this PyTorch has no torch._grouped_mm"}
    plain, ends = TorchGrouped(fc1, fc2), sizes.cumsum(0).int()
    found[EAGER] = plain, (ends,)
    compiled: Any = torch.compile(plain)
    found[COMPILED] = compiled, (ends,)
    return found, {}


def ready(groups: Groups, peers: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Steps, warm and compared with the first of PyTorch's."""
    made, refused = modules(groups)
    x = torch.randn(groups.rows, groups.hidden, device=DEVICE, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    x.requires_grad_()
    calls: dict[str, Callable[[], Any]] = {}
    expected: Tensor | None = None
    for name in (EAGER, COMPILED, OURS, SINGLE):
        if name not in made or (name == COMPILED and not peers):
            continue
        module, extra = made[name]
        call = partial(step, module, x, dy, *extra)
        result, reason = attempt(lambda call=call: [call() for _ in range(WARM)][-1])
        if reason is None:
            result = result.clone()
            expected = result if expected is None else expected
            _, reason = attempt(partial(verify, result, expected, LIMITS[torch.bfloat16]))
        if reason is None:
            calls[name] = call
        else:
            refused[name] = reason
    if not peers:
        calls.pop(EAGER, None)
    return calls, refused


def measure(groups: Groups, options: Options) -> dict[str, Any]:
    """Milliseconds of one case."""
    torch._dynamo.reset()
    calls, refused = ready(groups, options.peers)
    wall = alternate(calls, options.walls, 3, synchronize)
    samples = device_time.measure(calls, options.repeats, calls)
    columns = {
        name: device_time.summary(each) | {"wall_ms": wall[name] * 1e3}
        for name, each in samples.items()
    }
    del calls
    free()
    return {**groups._asdict(), "name": groups.name, "columns": columns, "refused": refused}


def cases(options: Options) -> Iterator[Case]:
    """The cases that there are."""
    for groups in CASES:
        yield Case(groups.name, 8 if options.peers else 4, partial(measure, groups, options))


def tasks(options: Options) -> Iterator[Task]:
    """opsgraph's kernels and Inductor's."""
    for groups in CASES:
        yield Task(groups.name, ready, (groups, options.peers))
