"""GroupedLinear: one linear layer for each group of rows, as mixtures of experts use them."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import OpError
from ..op import Op
from ..spec import Spec
from .parameters import empty_parameter


def _pieces(x: Tensor, split_sizes: Tensor) -> tuple[Tensor, ...]:
    sizes = split_sizes.tolist()
    if sum(sizes) != x.shape[0] or min(sizes, default=0) < 0:
        raise OpError("GroupedLinear", f"split_sizes {sizes}", f"sizes that add to {x.shape[0]}")
    return tuple(torch.split(x, sizes))


class GroupedLinear(Op):
    """`y[rows of g] = x[rows of g] @ weight[g].T + bias[g]`.

    Rows are split by an extra input, `split_sizes`: int64 `[num_groups]`, adding to the row count;
    groups may be empty. x: `[*, in_features]`; weight: `[num_groups, out_features, in_features]`;
    bias: `[num_groups, out_features]` or None. A state dict with a TransformerEngine
    GroupedLinear's keys (weight0, weight1, ..., bias0, ...) is accepted.
    """

    gemm = True
    extra_inputs = ("split_sizes",)
    takes_buffers = ("output", "grad_input")

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
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise OpError("GroupedLinear", f"num_groups {num_groups}", "at least 1")
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.init_method = init_method
        shape = (num_groups, out_features, in_features)
        self.weight = empty_parameter(shape, device, dtype)
        self.register_parameter("bias", None)
        if bias:
            self.bias = empty_parameter(shape[:2], device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize each group as nn.Linear does, or by init_method and zeros."""
        if self.in_features is None or self.out_features is None:
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        if self.init_method is None:
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            with torch.no_grad():
                for weight in self.weight:
                    self.init_method(weight)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
            if self.init_method is not None:
                nn.init.zeros_(self.bias)

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        if self.in_features is None and in_width is not None:
            self.in_features = in_width
        if self.out_features is None and out_width is not None:
            self.out_features = out_width
        if self.in_features is None or self.out_features is None:
            return
        shape = (self.num_groups, self.out_features, self.in_features)
        lazy = [p for p in self.parameters() if isinstance(p, UninitializedParameter)]
        for parameter in lazy:
            parameter.materialize(shape if parameter is self.weight else shape[:2])
        if lazy:
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.out_features = shape[1]
        if name == "weight":
            self.in_features = shape[2]

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        shape = self.num_groups, self.out_features, self.in_features
        return {"weight": shape, "bias": shape[:2]}.get(name)

    @property
    def in_width(self) -> int | None:
        return self.in_features

    def width_before(self, out_width: int) -> int | None:
        return self.in_features

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return None

    def example_extra(self, name: str, x: Spec, rows: int) -> Tensor:
        sizes = torch.zeros(self.num_groups, dtype=torch.int64, device=x.device)
        sizes[0] = rows - rows // 2
        sizes[-1] += rows // 2
        return sizes

    def out(self, x: Spec) -> Spec:
        return x.like(self.out_features)

    def fwd(
        self, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[()]]:
        pieces = _pieces(x, split_sizes)
        biases = [None] * len(pieces) if bias is None else bias.unbind()
        parts = [F.linear(p, w, b) for p, w, b in zip(pieces, weight, biases, strict=True)]
        return torch.cat(parts), ()

    def bwd(
        self, dy: Tensor, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None,
        want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
        dx = dweight = dbias = None
        grads = _pieces(dy, split_sizes)
        if "x" in want:
            dx = torch.cat([g @ w for g, w in zip(grads, weight, strict=True)])
        if "weight" in want:
            pieces = zip(grads, _pieces(x, split_sizes), strict=True)
            dweight = torch.stack([g.t() @ p for g, p in pieces])
        if "bias" in want and bias is not None:
            dbias = torch.stack([g.sum(0, dtype=bias.dtype) for g in grads])
        return dx, (None, dweight, dbias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            keys = [f"{prefix}{name}{g}" for g in range(self.num_groups)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.in_features}, {self.out_features}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(2, out_features=16), cls(3, out_features=16, bias=False)
