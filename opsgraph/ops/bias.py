"""Bias, the op that adds one to each row."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..guards.validation import Checked, Fixed, features, flag, place
from ..guards.validation import size as valid_size
from ..op import Op, Spec
from .collectives import Group, group_of
from .parameters import MarksParameters, Partition, empty_parameter, known

if TYPE_CHECKING:
    from .collectives import GroupLike


class Bias(MarksParameters, Op):
    """`y = x + bias`, bias `[width]`, initialized to 0. The gradient is summed in fp32.

    size: the same as width, by TransformerEngine's name. With tensor_parallel it is that of the
    whole bias, of which each rank of tensor_parallel_group (as `Linear` takes it) holds a share,
    the one that belongs to its share of x's columns.
    """

    keeps_width = True
    required = ("bias",)
    width = Checked(features)
    tensor_parallel = Fixed("another Bias")

    def __init__(
        self,
        width: int | None = None,
        *,
        size: int | None = None,
        tensor_parallel: bool = False,
        tensor_parallel_group: "GroupLike | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        who = type(self).__name__
        if width is not None and size is not None:
            raise OpError(who, f"width={width!r} and size={size!r}", "one of them")
        place(who, device, dtype)
        group = Group("", 1)
        if flag(who, "tensor_parallel", tensor_parallel):
            group = group_of(tensor_parallel_group, who)
        super().__init__()
        self.tensor_parallel = bool(tensor_parallel)
        self.group, self.group_size = group
        whole = valid_size(who, "width", size if width is None else width, 0)
        if whole is not None and whole % group.size:
            raise OpError(who, f"width {whole}", f"a multiple of {group.size}, for the ranks")
        self.width = None if whole is None else whole // group.size
        self.bias = empty_parameter((self.width,), device, dtype)
        self.reset_parameters()

    def partitions(self) -> dict[str, Partition]:
        """How ranks split the bias, if they do."""
        split = {"bias": Partition(self.group, self.group_size, 0)}
        return split if self.tensor_parallel else {}

    def _mark_parameters(self) -> None:
        for name, partition in self.partitions().items():
            partition.mark(self.own_parameter(name))

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        self.mark()
        if not isinstance(self.bias, UninitializedParameter):
            nn.init.zeros_(self.bias)

    @property
    def in_width(self) -> int | None:
        width: int | None = self.width
        return width

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = known(in_width, out_width)
        if self.width is None and width is not None:
            self.width = width
            if isinstance(self.bias, UninitializedParameter):
                self.bias.materialize((width,))
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.width = shape[0]

    def reject(self, x: Spec) -> str | None:
        width = known(getattr(self, "width", None), getattr(self, "local_out_features", None))
        return None if x.width == width else f"got input width {x.width}, expected {width}"

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        return (known(getattr(self, "width", None), getattr(self, "local_out_features", None)),)

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, bias: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + bias, ()

    def dgrad(self, dy: Tensor) -> Tensor:
        return dy

    def wgrad(self, dy: Tensor, bias: Tensor) -> Tensor:
        return dy.sum(0, dtype=bias.dtype)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)
