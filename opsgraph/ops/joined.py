"""One tensor of the parameters of several groups, which kernels take; its gradient goes to each.

Parameters that `pack` has laid one after the other are joined without a copy; it does so when a
module is made, moved or copied. Others (of FSDP, or loaded with `assign=True`) are stacked at each
call, and so are all under torch.compile.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import OpError
from ..torch_private import followed

PLAIN = (Tensor, nn.Parameter)


def join(where: str, parts: Mapping[str, Tensor]) -> Tensor:
    """`[groups, *]` of parameters of one shape, by name; the result has them as `parts`.

    Raises OpError for one of another shape than the first.
    """
    tensors = tuple(parts.values())
    first = tensors[0]
    for name, tensor in parts.items():
        if isinstance(tensor, UninitializedParameter):
            return tensor
        if tensor.shape != first.shape:
            got, expected = (tuple(shape) for shape in (tensor.shape, first.shape))
            raise OpError(where, f"{name} of shape {got}", f"{expected}, as the others have")
    if torch.compiler.is_compiling() or followed():
        return torch.stack(tensors)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    joined: Any = _Join.apply(*tensors) if wanted else _joined(tensors)  # type: ignore[no-untyped-call]
    if type(joined) is Tensor:
        joined.__class__ = Joined
    joined.parts = dict(parts)
    return joined  # type: ignore[no-any-return]


class Joined(Tensor):
    """Parameters as one tensor: its `.grad` is theirs."""

    parts: dict[str, Tensor]
    # As nn.Parameter has it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def grad(self) -> Tensor | None:
        """The gradients of all, 0 where there is none; None if there is none at all."""
        grads = [part.grad for part in self.parts.values()]
        if all(grad is None for grad in grads):
            return None
        pairs = zip(self.parts.values(), grads, strict=True)
        return _joined(tuple(torch.zeros_like(p) if g is None else g for p, g in pairs))

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        for k, part in enumerate(self.parts.values()):
            part.grad = None if value is None else value[k]


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        if not _in_a_row(tensors):
            return torch.stack(tensors)
        first = tensors[0].detach()
        step = (first.numel(), *first.stride())
        return first.as_strided((len(tensors), *first.shape), step)


def _in_a_row(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie one after the other in one storage."""
    first = tensors[0]
    if type(first) not in PLAIN or first.is_meta or not first.is_contiguous():
        return False
    start, size = first.data_ptr(), first.nbytes
    end = first.storage_offset() * first.itemsize + len(tensors) * size
    return end <= first.untyped_storage().nbytes() and all(
        type(tensor) in PLAIN
        and tensor.data_ptr() == start + k * size
        and tensor.dtype == first.dtype
        and tensor.is_contiguous()
        for k, tensor in enumerate(tensors)
    )


class _Join(torch.autograd.Function):
    """The parameters as one tensor. A view of theirs has a version of its own: it is compared."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.versions = [(tensor, tensor._version) for tensor in tensors]
        return _joined(tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if any(tensor._version != version for tensor, version in ctx.versions):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: a group's parameter, after the forward"
            )
        return (None,) * len(ctx.versions) if dy is None else dy.unbind()


def pack(parts: Sequence[Any]) -> None:
    """Lay parameters one after the other, unless they are, or cannot be."""
    if not parts or any(
        type(part) is not nn.Parameter
        or part.is_meta
        or part.shape != parts[0].shape
        or part.dtype != parts[0].dtype
        or part.device != parts[0].device
        for part in parts
    ):
        return
    if prod(parts[0].shape) and not _in_a_row(parts):
        with torch.no_grad():
            whole = torch.stack(tuple(parts))
        for part, own in zip(parts, whole.unbind(), strict=True):
            part.data = own
