"""Exchanges of rows between the ranks of a process group, on torch.distributed's functional ops.

A group is its name and its size: these can be written into generated source. Each exchange is
started, which never writes to x, and waited for; between the two its result must not be read.
Ranks are in the group's order. These functions record nothing for autograd.

Between CPUs an exchange is over when it has started: with several under way Gloo's threads corrupt
the heap now and then (PyTorch 2.13; docs/parallel.md tells what was tried).
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor


def on_one_node(group_size: int) -> bool:
    """Whether as many ranks may be on this node: torchrun says how many are, and devices tell."""
    return group_size <= gpus_here()


def gpus_here() -> int:
    """The ranks that torchrun started here, or the devices, whatever is more."""
    return max(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Pending(NamedTuple):
    """An exchange that was started. What is sent must live until it is over."""

    result: Tensor
    sent: Tensor


def started(result: Tensor, sent: Tensor) -> Pending:
    """An exchange that is under way; over Gloo it is waited for here."""
    pending = Pending(result, sent)
    if result.is_cpu:
        wait(pending)
    return pending


def start_all_gather(x: Tensor, group: str, group_size: int) -> Pending:
    """Every rank's `[rows, *]`, one below the other: `[group_size * rows, *]`. To be waited for."""
    ops = torch.ops._c10d_functional
    x = x.contiguous()
    return started(ops.all_gather_into_tensor(x, group_size, group), x)


def start_reduce_scatter(x: Tensor, group: str, group_size: int) -> Pending:
    """This rank's `[rows / group_size, *]` of the sum over ranks. To be waited for."""
    ops = torch.ops._c10d_functional
    x = x.contiguous()
    return started(ops.reduce_scatter_tensor(x, "sum", group_size, group), x)


def start_all_reduce(x: Tensor, group: str) -> Pending:
    """The sum over ranks, of x's shape. To be waited for."""
    x = x.contiguous()
    return started(torch.ops._c10d_functional.all_reduce(x, "sum", group), x)


def wait(pending: Pending) -> Tensor:
    """The result of an exchange, once it is there; on a GPU, for what follows on the stream."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(pending.result)
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
