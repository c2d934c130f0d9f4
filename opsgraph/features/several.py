"""One weight of several layers' weights, one after the other, without a copy at each call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..guards.torch_private import followed
from ..ops.joined import in_a_row, pack, verify_unchanged

_NAMES = "weight", "bias"


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """Adjacent parts as one tensor."""
    first = parts[0].detach()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class _Whole(torch.autograd.Function):
    """Adjacent parts as one tensor, whose version is the first part's alone: all are compared."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parts = [(part, part._version) for part in parts]
        return _whole(parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        verify_unchanged(ctx.parts, "a part of a weight")
        if dy is None:
            return (None,) * len(ctx.parts)
        return dy.split([part.shape[0] for part, _ in ctx.parts])


class SeveralLayers(nn.Module):
    """The weight (and bias) of several linear layers as one; the layers keep their parameters.

    Their memory is laid one after the other when this is made, copied or unpickled, and by
    `pack()`; the parameters stay the same objects. Until then, as after a move to another device,
    under torch.compile and for parameters of another class, the parts are copied at each call.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = list(layers)  # a list: they are no children of this
        self.pack()

    def _parts(self, name: str) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.__dict__["layers"]]

    def pack(self) -> None:
        """Lay the parts one after the other, if they are plain tensors of one dtype and device."""
        self.__dict__["waiting"] = not all("_parameters" in vars(m) for m in vars(self)["layers"])
        if self.__dict__["waiting"]:  # copied in the midst of a layer that leads here
            return
        for name in _NAMES:
            pack(self._parts(name))

    def unpack(self) -> None:
        """Give each part memory of its own again."""
        for part in (part for name in _NAMES for part in self._parts(name)):
            if type(part) is nn.Parameter and part.untyped_storage().nbytes() > part.nbytes:
                part.data = part.data.clone()

    def __getattr__(self, name: str) -> Any:
        if name not in _NAMES or "layers" not in self.__dict__:
            return super().__getattr__(name)
        if self.__dict__["waiting"]:
            self.pack()
        parts = self._parts(name)
        if any(part is None for part in parts):
            return None
        if torch.compiler.is_compiling() or followed() or not in_a_row(parts):
            return torch.cat(parts)
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return _Whole.apply(*parts)  # type: ignore[no-untyped-call]
        return _whole(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()
