"""Linear layers whose weights are `[in_features, out_features]`, one or one for each group."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..op import Lowered, Op
from .grouped import GroupedLinear
from .linear import Linear

READ = "transposed_weight"
"""The attribute that plans read the weight by."""


def as_stored(name: str, shape: tuple[int | None, ...]) -> tuple[str, tuple[int | None, ...]]:
    """What a parameter that plans read by that name is called, and its shape, on its module."""
    return ("weight", _turned(shape)) if name == READ else (name, shape)


def _turned(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return *shape[:-2], *shape[:-3:-1]


class _Transposed(Op):
    """What both share: plans read the weight, by another attribute, as Linear's is stored."""

    reads_transposed = True

    def home(self, name: str) -> Any:
        return (self, READ) if name == "weight" else super().home(name)

    @property
    def transposed_weight(self) -> Any:
        """The weight as `[.., out_features, in_features]`, a view; None where there is none."""
        weight: Any = getattr(*super().home("weight"), None)
        if weight is None or isinstance(weight, UninitializedParameter) or weight.dim() < 2:
            return weight
        return weight.transpose(-2, -1)

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        turned = _turned(shape) if name.startswith("weight") else shape
        super().sizes_from(name, torch.Size(turned))  # type: ignore[arg-type]


class TransposedLinear(_Transposed, Linear):
    """`y = x @ weight + bias`, as GPT-2's Conv1D. x: `[*, in_features]`.

    weight: `[in_features, out_features]`, initialized as the transpose of nn.Linear's, or by
    `init_method(weight.t())`; bias: `[out_features]` or None. Either size may be left out where a
    neighbour or the first input tells it.

    Plans are those of Linear: they read the weight by its transposed view, which products take as
    it is stored, and its gradient is made in the weight's layout. Nothing is copied. What splits a
    layer among ranks, delays weight gradients or adds them to main_grad takes Linear alone.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, device=device, dtype=dtype, init_method=init_method
        )

    def _stored(self, name: str) -> tuple[int | None, ...]:
        return super()._stored(name)[::-1]

    def _reset_weight(self) -> None:
        if isinstance(self.weight, UninitializedParameter):
            return
        with torch.no_grad():
            if self.init_method is None:
                nn.init.kaiming_uniform_(self.weight.t(), a=math.sqrt(5))
            else:
                self.init_method(self.weight.t())

    def split(self, *args: Any) -> NoReturn:
        """Raises OpError: no rank has a share of such a layer."""
        raise OpError(type(self).__name__, "a split among ranks", "Linear")


class TransposedGroupedLinear(_Transposed, GroupedLinear):
    """`y[rows of g] = x[rows of g] @ weight[g] + bias[g]`: experts that are stored `[E, in, out]`.

    Parameters and arguments are GroupedLinear's, but that `weight0`, ... are
    `[in_features, out_features]`, and `weight` is `[num_groups, in_features, out_features]`. It is
    to GroupedLinear what TransposedLinear is to Linear.
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__(
            num_groups, in_features, out_features, bias, device=device, dtype=dtype,
            init_method=init_method, single_grouped_weight=single_grouped_weight,
            single_grouped_bias=single_grouped_bias,
        )  # fmt: skip

    def lower(self) -> Sequence[Lowered]:
        return (Lowered(GroupedLinear, self),)

    def _shape(self, name: str) -> tuple[int | None, ...]:
        shape = super()._shape(name)
        return _turned(shape) if name == "weight" else shape

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(2, out_features=16, single_grouped_weight=True),)
