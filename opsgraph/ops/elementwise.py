"""Ops without parameters: Identity, ConstantScale, Dropout, and Reshape."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpError
from ..guards.state_dicts import without_extra_state
from ..guards.validation import number, whole
from ..kernels.reference.dropout import keep_mask
from ..op import Op, Spec


class Identity(Op):
    """`y = x`"""

    keeps_width = True

    def identity(self, direction: str, training: bool) -> bool:
        return True

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x, ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return dy, ()


class ConstantScale(Op):
    """`y = scale * x`, scale a number or a tensor of one element, read at construction."""

    keeps_width = True
    constants = ("scale",)

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        self.scale = number("ConstantScale", "scale", scale)

    def reject(self, x: Spec) -> str | None:
        number("ConstantScale", "scale", self.scale)  # it may have been set since construction
        return None

    def identity(self, direction: str, training: bool) -> bool:
        return self.scale == 1.0

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, scale: float) -> tuple[Tensor, tuple[()]]:
        return x * scale, ()

    def bwd(self, dy: Tensor, scale: float) -> tuple[Tensor, tuple[()]]:
        return dy * scale, ()

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(0.7),)


def _probability(p: Any) -> float:
    return number("Dropout", "p", p, "a probability from 0 to 1", lambda v: 0 <= v <= 1)


class Dropout(Op):
    """In training, each element is 0 with probability p, the others are `x / (1 - p)`.

    The mask is a hash of a 64-bit seed and the element's position. The seed is drawn from the
    device's default generator (`torch.manual_seed` makes it repeatable) and is all that is saved.
    """

    keeps_width = True
    saves = ("seed",)
    constants = ("p",)
    random = training_matters = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = _probability(p)

    def reject(self, x: Spec) -> str | None:
        _probability(self.p)  # it may have been set since construction
        return None

    def identity(self, direction: str, training: bool) -> bool:
        return not training or self.p == 0.0

    def out(self, x: Spec) -> Spec:
        return x

    def saved(self, x: Spec) -> dict[str, Spec]:
        return {"seed": Spec((), torch.int64, x.device)}

    def fwd(self, x: Tensor, p: float) -> tuple[Tensor, tuple[Tensor]]:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        return self.again(x, seed, p), (seed,)

    def again(self, x: Tensor, seed: Tensor, p: float) -> Tensor:
        """The same mask on x, from the seed."""
        rows, width = x.shape
        keep = keep_mask(seed, rows, width, p)
        return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0)

    def bwd(self, dy: Tensor, seed: Tensor, p: float) -> tuple[Tensor, tuple[()]]:
        return self.again(dy, seed, p), ()

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Reshape(nn.Module):
    """`y = x.reshape(shape)`, shape as `torch.reshape` takes it.

    It changes what a row is, so it is no op of a plan: it stands between two of them.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        sizes: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], Iterable) else shape
        self.shape = tuple(whole("Reshape", "shape", size, -1) for size in sizes)
        if self.shape.count(-1) > 1:
            raise OpError("Reshape", f"shape={self.shape}", "at most one -1")

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape with as many elements as the target."""
        return x.reshape(self.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(without_extra_state(state_dict, prefix), prefix, *args)

    def extra_repr(self) -> str:
        return str(self.shape)
