"""LayerScale: a learned factor for each column (Touvron et al., 2021)."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..guards.validation import Checked, features, finite, place
from ..kernels.reference import scales
from ..op import Op, Spec
from .parameters import empty_parameter, known


class LayerScale(Op):
    """`y = x * weight`, weight `[width]` of any float dtype, initialized to init_value.

    x: `[*, width]`; the width may be left out. y has the dtype to which PyTorch promotes x's and
    the weight's.
    """

    keeps_width = True
    required = as_stored = typed_by = ("weight",)
    width = Checked(features)

    def __init__(
        self,
        width: int | None = None,
        init_value: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        who = type(self).__name__
        place(who, device, dtype)
        super().__init__()
        self.init_value = finite(who, "init_value", init_value)
        self.width = width
        self.weight = empty_parameter((width,), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to init_value."""
        if not isinstance(self.weight, UninitializedParameter):
            nn.init.constant_(self.weight, self.init_value)

    @property
    def in_width(self) -> int | None:
        width: int | None = self.width
        return width

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = known(in_width, out_width)
        if self.width is None and width is not None:
            self.width = width
            if isinstance(self.weight, UninitializedParameter):
                self.weight.materialize((width,))
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.width = shape[0]

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        return (self.width,)

    def out(self, x: Spec) -> Spec:
        return x

    def result(self, dtype: torch.dtype, others: Mapping[str, torch.dtype]) -> torch.dtype:
        return torch.promote_types(dtype, others["weight"])

    def fwd(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[()]]:
        return scales.scale_forward(x, weight), ()

    def bwd(
        self, dy: Tensor, x: Tensor, weight: Tensor, want: Collection[str]
    ) -> tuple[Tensor | None, tuple[Tensor | None]]:
        dx, dweight = scales.scale_backward(dy, x, weight, want)
        return dx, (dweight,)

    def extra_repr(self) -> str:
        return f"{self.width}, init_value={self.init_value}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(init_value=0.5),)
