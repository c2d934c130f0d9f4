"""Matrix products with collectives cut into pieces: while one piece travels, another is multiplied.

A piece is a run of rows, the same on every rank; each row of a product is computed as it is without
pieces. A group is its name and its size, as in `collectives`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..lazy import Lazy
from .collectives import Pending, on_one_node, start_all_gather, start_reduce_scatter, started, wait

gemm = Lazy("cublaslt.gemm")

PIECES = 4
"""Into how many pieces a collective is cut at most."""
NEAR = 1
"""The same between GPUs of one node. There NCCL and a product share multiprocessors, and take as
long side by side as one after the other: on two H200 pieces cost 2 to 3% of a step."""
ROWS = 256
"""The fewest rows of a rank in a piece. A product takes each rank's rows apart: with fewer, GPUs
have empty tiles, and CPUs lay out the weight too often (128 cost 16% more time, 256 nothing)."""


def most(x: Tensor, group_size: int) -> int:
    """Into how many pieces a gather or a scatter of x is cut at most."""
    return NEAR if x.is_cuda and on_one_node(group_size) else PIECES


def cuts(rows: int, most: int | None = None) -> list[tuple[int, int]]:
    """The pieces of a rank's rows, at most `most` or `PIECES`: start and stop of each."""
    count = max(1, min(PIECES if most is None else most, rows // ROWS))
    return list(pairwise(rows * k // count for k in range(count + 1)))


def _multiply(x: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x @ b + bias` into `out`, of `[ranks, rows, *]` tensors whose ranks may lie apart."""
    many = b.expand(len(x), *b.shape)
    if bias is None:
        torch.bmm(x, many, out=out)
    else:
        torch.baddbmm(bias, x, many, out=out)


def gather_matmul(
    x: Tensor, b: Tensor, bias: Tensor | None, group: str, group_size: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`all_gather(x) @ b + bias`, and with `keep` the gathered x; else None.

    x: `[rows, k]` on each rank; b: `[k, n]`; bias: `[n]` or None; y: `[group_size * rows, n]`.
    """
    rows, width = x.shape
    runs = cuts(rows, most(x, group_size))
    if len(runs) == 1:
        gathered = wait(start_all_gather(x, group, group_size))
        return gemm.matmul(gathered, b, bias), gathered if keep else None
    arriving = [start_all_gather(x[start:stop], group, group_size) for start, stop in runs]
    y = x.new_empty(group_size, rows, b.shape[1])
    whole = x.new_empty(group_size, rows, width) if keep else None
    for (start, stop), piece in zip(runs, arriving, strict=True):
        there = wait(piece).view(group_size, stop - start, width)
        _multiply(there, b, bias, y[:, start:stop])
        if whole is not None:
            whole[:, start:stop] = there
    return y.flatten(0, 1), None if whole is None else whole.flatten(0, 1)


def matmul_scatter(x: Tensor, b: Tensor, group: str, group_size: int) -> Tensor:
    """This rank's rows of the sum over ranks of `x @ b`.

    x: `[rows, k]`, rows a multiple of group_size; b: `[k, n]`; y: `[rows / group_size, n]`.
    """
    parts = x.unflatten(0, (group_size, x.shape[0] // group_size))
    runs, leaving = cuts(parts.shape[1], most(x, group_size)), []
    if len(runs) == 1:
        return wait(start_reduce_scatter(gemm.matmul(x, b), group, group_size))
    for start, stop in runs:
        piece = x.new_empty(group_size, stop - start, b.shape[1])
        _multiply(parts[:, start:stop], b, None, piece)
        leaving.append(start_reduce_scatter(piece.flatten(0, 1), group, group_size))
    y = x.new_empty(parts.shape[1], b.shape[1])
    for (start, stop), pending in zip(runs, leaving, strict=True):
        y[start:stop] = wait(pending)
    return y


def matmul_all_reduce(x: Tensor, b: Tensor, group: str) -> Tensor:
    """The sum over ranks of `x @ b`. x: `[rows, k]`; b: `[k, n]`; y: `[rows, n]`."""
    y = x.new_empty(x.shape[0], b.shape[1])
    leaving = []
    for start, stop in cuts(x.shape[0]):
        torch.mm(x[start:stop], b, out=y[start:stop])
        leaving.append(start_all_reduce_in_place(y[start:stop], group))
    for piece in leaving:
        wait(piece)
    return y


def start_all_reduce_in_place(y: Tensor, group: str) -> Pending:
    """Put the sum over ranks into y, to which nothing else may refer. To be waited for."""
    return started(torch.ops._c10d_functional.all_reduce_(y, "sum", group), y)
