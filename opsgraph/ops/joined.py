"""One tensor of the parameters of several groups, which kernels take; its gradient goes to each.

Parameters that `pack` has laid one after the other are joined without a copy; it does so when a
module is made, moved or copied. Others (of FSDP, or loaded with `assign=True`) are stacked at each
call, and so are all under torch.compile.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..guards.torch_private import followed, same_layouts

PLAIN = (Tensor, nn.Parameter)


def join(module: nn.Module, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """`[groups, *]` of a module's parameters of one shape; the result has them as `parts`.

    Raises OpError for one of another shape than the first.
    """
    if type(tensors[0]) is UninitializedParameter:
        return tensors[0]
    if torch.compiler.is_compiling() or followed():
        _verify(module, names, tensors)
        return torch.stack(tensors)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    row = _is_row(module, names, tensors)
    joined: Any = _Join.apply(row, *tensors) if wanted else _joined(row, tensors)  # type: ignore[no-untyped-call]
    if type(joined) is Tensor:
        joined.__class__ = Joined
    joined.parts = dict(zip(names, tensors, strict=True))
    return joined  # type: ignore[no-any-return]


class _Row(NamedTuple):
    """Parameters that were looked at. fits: whether some are laid out as they were."""

    fits: Callable[..., bool] | None
    addresses: list[int]
    row: bool


_known: WeakKeyDictionary[nn.Module, dict[str, _Row]] = WeakKeyDictionary()
"""By a module, and the name of the first parameter."""


def _is_row(module: nn.Module, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> bool:
    """Whether shapes are the same and `in_a_row` holds; looked at again where layouts change."""
    if type(tensors[0]) not in PLAIN or tensors[0].is_meta:
        _verify(module, names, tensors)
        return False
    known = _known.setdefault(module, {})
    before, addresses = known.get(names[0]), [*map(Tensor.data_ptr, tensors)]
    if before is not None and before.addresses == addresses:
        if before.fits is not None and before.fits(*tensors):
            return before.row
    _verify(module, names, tensors)
    found = known[names[0]] = _Row(same_layouts(tensors), addresses, in_a_row(tensors))
    return found.row


def _verify(module: nn.Module, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device != tensors[0].device:
            expected_text = f"{tensors[0].device}, as the others are"
            raise OpError(type(module).__name__, f"{name} on {tensor.device}", expected_text)
        if tensor.shape != tensors[0].shape:
            got, expected = (tuple(shape) for shape in (tensor.shape, tensors[0].shape))
            expected_text = f"{expected}, as the others have"
            raise OpError(type(module).__name__, f"{name} of shape {got}", expected_text)


class Joined(Tensor):
    """Parameters as one tensor: its `.grad` is theirs."""

    parts: dict[str, Tensor]
    is_plain_memory = True
    """Kernels and replays may read it as they read a plain tensor."""
    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    @property
    def grad(self) -> Tensor | None:
        """The gradients of all, 0 where there is none; None if there is none at all."""
        grads = [part.grad for part in self.parts.values()]
        if all(grad is None for grad in grads):
            return None
        pairs = zip(self.parts.values(), grads, strict=True)
        gradients = tuple(torch.zeros_like(p) if g is None else g for p, g in pairs)
        return _joined(in_a_row(gradients), gradients)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        for k, part in enumerate(self.parts.values()):
            part.grad = None if value is None else value[k]


def parts_of(weight: Tensor) -> dict[str, Tensor]:
    """The parameters that a tensor was joined of, by name; empty for a parameter itself."""
    parts: dict[str, Tensor] = getattr(weight, "parts", {})
    return parts


def parameters(weight: Tensor) -> list[Tensor]:
    """The parameters that a tensor was joined of, or the one that it is."""
    return list(parts_of(weight).values()) or [weight]


def _joined(row: bool, tensors: tuple[Tensor, ...]) -> Tensor:
    first = tensors[0].detach()
    if not row:
        return torch.stack([tensor.detach() for tensor in tensors])
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def in_a_row(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie one after the other in one storage."""
    first = tensors[0]
    if type(first) not in PLAIN or first.is_meta or not first.is_contiguous():
        return False
    storage, at = first.untyped_storage(), first.data_ptr()
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.data_ptr() != at:
            return False
        if tensor.dtype != first.dtype or not tensor.is_contiguous():
            return False
        at += tensor.nbytes
    return at <= storage.data_ptr() + storage.nbytes()


def verify_unchanged(versions: Sequence[tuple[Tensor, int]], what: str) -> None:
    """Raises PyTorch's error for a tensor that has another version than in the forward."""
    if any(tensor._version != version for tensor, version in versions):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: {what}, after the forward"
        )


class _Join(torch.autograd.Function):
    """The parameters as one tensor. A view of theirs has a version of its own: it is compared."""

    @staticmethod
    def forward(ctx: Any, row: bool, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.versions = [(tensor, tensor._version) for tensor in tensors]
        return _joined(row, tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        verify_unchanged(ctx.versions, "a group's parameter")
        return None, *([None] * len(ctx.versions) if dy is None else dy.unbind())


def pack(parts: Sequence[Any]) -> None:
    """Lay parameters one after the other, unless they are, or cannot be. Their rows may differ."""
    if not parts or any(
        type(part) is not nn.Parameter
        or part.is_meta
        or part.shape[1:] != parts[0].shape[1:]
        or part.dtype != parts[0].dtype
        or part.device != parts[0].device
        for part in parts
    ):
        return
    if prod(parts[0].shape) and not in_a_row(parts):
        with torch.no_grad():
            whole = torch.cat(tuple(parts))
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
