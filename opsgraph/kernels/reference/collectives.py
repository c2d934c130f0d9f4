"""Exchanges of rows between the ranks of a process group, on torch.distributed's functional ops.

A group is its name and its size, so that it can be written into a plan's source. Each exchange is
started, which never writes to x, and waited for; between the two its result must not be read.
Ranks are in the group's order. Gradients are those of the plan: these functions record none.
"""

import torch
from torch import Tensor


def start_all_gather(x: Tensor, group: str, group_size: int) -> Tensor:
    """Every rank's `[rows, *]`, one below the other: `[group_size * rows, *]`. To be waited for."""
    ops = torch.ops._c10d_functional
    gathered: Tensor = ops.all_gather_into_tensor(x.contiguous(), group_size, group)
    return gathered


def start_reduce_scatter(x: Tensor, group: str, group_size: int) -> Tensor:
    """This rank's `[rows / group_size, *]` of the sum over ranks. To be waited for."""
    ops = torch.ops._c10d_functional
    scattered: Tensor = ops.reduce_scatter_tensor(x.contiguous(), "sum", group_size, group)
    return scattered


def start_all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over ranks, of x's shape. To be waited for."""
    reduced: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    return reduced


def wait(pending: Tensor) -> Tensor:
    """The result of an exchange, once it is there; on a GPU, for what follows on the stream."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return done


def all_gather(x: Tensor, group: str, group_size: int) -> Tensor:
    """`start_all_gather`, waited for."""
    return x if group_size == 1 else wait(start_all_gather(x, group, group_size))


def reduce_scatter(x: Tensor, group: str, group_size: int) -> Tensor:
    """`start_reduce_scatter`, waited for."""
    return x if group_size == 1 else wait(start_reduce_scatter(x, group, group_size))


def all_reduce(x: Tensor, group: str, group_size: int) -> Tensor:
    """`start_all_reduce`, waited for."""
    return x if group_size == 1 else wait(start_all_reduce(x, group))
