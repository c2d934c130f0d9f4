"""How ops make their parameters, now or once their size is known, and how ranks split them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def empty_parameter(
    shape: Sequence[int | None], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """A parameter to be initialized; an uninitialized one if a size is None."""
    if any(size is None for size in shape):
        kind: Any = UninitializedParameter
        return kind(device=device, dtype=dtype)  # type: ignore[no-any-return]
    return nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))  # type: ignore[arg-type]


def known(*sizes: int | None) -> int | None:
    """The first size that is not None; 0 is one as well."""
    return next((size for size in sizes if size is not None), None)


def shards(mode: str | None, size: int) -> tuple[int, int]:
    """Among how many ranks a mode splits a weight's rows and columns."""
    return (size if mode == "column" else 1), (size if mode == "row" else 1)


class Partition(NamedTuple):
    """How the ranks of a process group split a parameter: along `dim`, in equal shares.

    stride: in how many pieces it is before each is split; the shares of one rank lie one after the
    other. 2 keeps the gate and the value of a gated activation apart.
    """

    group: str
    size: int
    dim: int
    stride: int = 1

    def mark(self, parameter: nn.Parameter | None) -> None:
        """Set the attributes by which Megatron-LM and its like know split parameters."""
        if parameter is not None:
            attributes = {"partition_dim": self.dim, "partition_stride": self.stride}
            for name, value in ({"tensor_model_parallel": True} | attributes).items():
                setattr(parameter, name, value)

    def share(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's share of the whole, a tensor of its own."""
        pieces = whole.chunk(self.stride, self.dim)
        shares = [piece.tensor_split(self.size, self.dim)[rank] for piece in pieces]
        return torch.cat(shares, self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """The whole, of every rank's share."""
        pieces = zip(*(share.chunk(self.stride, self.dim) for share in shares), strict=True)
        return torch.cat([torch.cat(piece, self.dim) for piece in pieces], self.dim)


def keys_of_basic_ops(state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """A state dict with a linear layer's own keys, for the layer at that prefix.

    TransformerEngine's saves the parameters of the ops inside it, `basic_ops.0.weight`.
    """
    inside, own = f"{prefix}basic_ops.", dict[str, Any]()
    if not any(key.startswith(inside) for key in state_dict):
        return state_dict
    for key, value in state_dict.items():
        name = key.rpartition(".")[2]
        if not key.startswith(inside):
            own[key] = value
        elif name != "_extra_state":
            own.setdefault(prefix + name, value)
    return own


_MARKING = frozenset({"sequence_parallel", "delay_wgrad_compute"})
"""Attributes that say what parameters carry."""


class MarksParameters(nn.Module):
    """A module whose parameters carry attributes, which new or copied parameters lack.

    They get them whatever makes a parameter: assignment, loading, moving, copying, FSDP2's shards.
    """

    def _mark_parameters(self) -> None:
        """Give the parameters the attributes that tell other libraries how they are split."""
        raise NotImplementedError

    def mark(self) -> None:
        """Mark the parameters, and from now on those that are set."""
        self.__dict__["marked"] = True
        self._mark_parameters()

    def own_parameter(self, name: str) -> Any:
        """A parameter of the module, or the one that a parametrization computes it of; or None."""
        parametrized: Any = self._modules.get("parametrizations", ())
        if name in parametrized:
            return getattr(parametrized[name], "original", None)
        return self._parameters.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts its parameters past register_parameter if a module leaves this to torch.
        delayed = self.__dict__.get("delay_wgrad_compute", False)
        super().__setattr__(name, value)
        if name in _MARKING and "marked" in self.__dict__:
            self._mark_again(delayed)

    def _mark_again(self, delayed: bool) -> None:
        """Mark the parameters otherwise. delayed: whether their gradients were so far."""
        if delayed and not self.__dict__["delay_wgrad_compute"]:
            for parameter in self.parameters():
                parameter.__dict__.pop("skip_backward_post_hook", None)
        self._mark_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None and "marked" in self.__dict__:
            self._mark_parameters()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mark_parameters()  # torch.__future__'s swapping of tensors swaps attributes too

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark_parameters()  # moving to another device may make new parameters
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_parameters()  # copies of parameters lose their attributes
