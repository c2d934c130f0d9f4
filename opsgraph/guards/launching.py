"""Kernels outside of passes: launched in Python, or, once replays are there, natively.

`replay.launched` takes the place of `launching.by` and `launching.unmoved`.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

Launch = Callable[..., None]
"""Launches kernels on tensors, and does nothing else."""
Hosts = Sequence[dict[str, Any]]
"""The own dicts of modules."""


class _Launching:
    by: Callable[..., Launch]
    """What does what a function does, natively if it can: one for each key.

    `by(key, function, anywhere=False)`: with one key functions launch the same on as many tensors.
    anywhere: whether no kernel is compiled for aligned addresses. Those who call it have seen that
    no transform and no dispatch mode follows PyTorch's ops.
    """
    unmoved: Callable[[Hosts, Sequence[str], Sequence[Tensor]], Callable[[], bool]]
    """What tells whether modules have the tensors that they have now, of as many elements, where
    they begin now.

    `unmoved(hosts, names, buffers)`: of each module's own dict, as many buffers as names.
    """


def _in_python(key: Hashable, function: Launch, anywhere: bool = False) -> Launch:
    return function


def unmoved(hosts: Hosts, names: Sequence[str], buffers: Sequence[Tensor]) -> Callable[[], bool]:
    """`launching.unmoved`, in Python."""
    return partial(_are_there, hosts, names, buffers, [*map(_extent, buffers)])


def _extent(buffer: Tensor) -> tuple[int, int]:
    return buffer.data_ptr(), buffer.numel()


def _are_there(
    hosts: Hosts, names: Sequence[str], buffers: Sequence[Tensor], extents: Sequence[Any]
) -> bool:
    now = [host["_buffers"].get(name) for host in hosts for name in names]
    same = all(one is other for one, other in zip(now, buffers, strict=True))
    return same and [*map(_extent, buffers)] == extents


launching = _Launching()
launching.by, launching.unmoved = _in_python, unmoved
