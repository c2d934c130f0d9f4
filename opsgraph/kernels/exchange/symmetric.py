"""Matrix products and collectives over PyTorch's symmetric memory: GPUs read each other's.

Products are cut into one piece for each rank, and copies between GPUs take no multiprocessors.
Every rank of the group must be on one node. A group is its name and its size, as in `pieces`.
Tensors are CUDA tensors of one float dtype, which results have too; PyTorch raises RuntimeError for
operands that do not fit.
"""

import torch
import torch.distributed._symmetric_memory as memory
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import _SymmetricMemory

ALL_REDUCES = {"two_shot": "two_shot_all_reduce_", "multimem_all_reduce": "multimem_all_reduce_"}
"""Of `symmetric_ar_type`, the ops that sum in place."""


def gather_matmul(
    x: Tensor, b: Tensor, bias: Tensor | None, group: str, group_size: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`all_gather(x) @ b + bias`, and with `keep` the gathered x. x: `[rows, k]`; b: `[k, n]`."""
    if not x.shape[0]:  # nothing to share memory for
        return x.new_empty(0, b.shape[1]), x if keep else None
    fused = torch.ops.symm_mem.fused_all_gather_matmul
    whole, (y,) = fused(x.contiguous(), [b], 0, group, return_A=keep)
    return y if bias is None else y.add_(bias), whole if keep else None


def matmul_scatter(x: Tensor, b: Tensor, group: str, group_size: int) -> Tensor:
    """This rank's rows of the sum over ranks of `x @ b`. x: `[rows, k]`; b: `[k, n]`."""
    if not x.shape[0]:
        return x.new_empty(0, b.shape[1])
    y: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x, b, "sum", 0, group)
    return y


def matmul_all_reduce(x: Tensor, b: Tensor, group: str, how: str) -> Tensor:
    """The sum over ranks of `x @ b`. x: `[rows, k]`; b: `[k, n]`; how: a `symmetric_ar_type`.

    The product is written where the other GPUs read it; what is returned is a copy.
    """
    shape = x.shape[0], b.shape[1]
    if not shape[0]:
        return x.new_empty(shape)
    size = shape[0] * shape[1] * x.element_size()
    room = memory.get_symm_mem_workspace(group, size)  # type: ignore[arg-type]
    mine = room.get_buffer(room.rank, shape, x.dtype)
    torch.mm(x, b, out=mine)
    if how == "one_shot":
        y: Tensor = torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", group)
        return y
    reduced: Tensor = getattr(torch.ops.symm_mem, ALL_REDUCES[how])(mine, "sum", group)
    return reduced.clone()


def has_multicast(device: torch.device) -> bool:
    """Whether a GPU's switch can add up what GPUs hold, which `multimem_all_reduce` needs."""
    found: bool = _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index or 0)
    return found
