"""Linear layers: BasicLinear (the GEMM), Bias, and Linear, which lowers to the two."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..op import Lowered, Op, arguments
from ..quantized_parameter import hold
from ..quantizers import Quantized
from ..scaling import make_for
from ..spec import Spec
from . import scaled_gemm as scaled
from .main_grad import accumulate
from .parameters import empty_parameter

Operand = Any
"""A tensor, or `Quantized` under a recipe."""


class BasicLinear(Op):
    """`y = x @ weight.T`. x: `[*, in_features]`; weight: `[out_features, in_features]`.

    Either size may be left out where a neighbour or the first input tells it. The weight is
    initialized as nn.Linear's (uniform within `1/sqrt(in_features)`), or by `init_method(weight)`.
    accumulate_into_main_grad: the weight's gradient goes into `weight.main_grad`, see `main_grad`.
    """

    gemm = quantizable = True

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        accumulate_into_main_grad: bool = False,
        overwrite_main_grad: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.overwrite_main_grad = overwrite_main_grad
        self.init_method = init_method
        self.weight = empty_parameter((out_features, in_features), device, dtype)
        if type(self) is BasicLinear:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight, where its sizes are known."""
        if isinstance(self.weight, UninitializedParameter):
            return
        if self.init_method is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            with torch.no_grad():
                self.init_method(self.weight)
        hold(self, "weight")

    @property
    def in_width(self) -> int | None:
        return self.in_features

    def width_before(self, out_width: int) -> int | None:
        return self.in_features

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        if self.in_features is None and in_width is not None:
            self.in_features = in_width
        if self.out_features is None and out_width is not None:
            self.out_features = out_width
        if self.in_features is None or self.out_features is None:
            return
        sizes = {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}
        lazy = [n for n, p in self._parameters.items() if isinstance(p, UninitializedParameter)]
        for name in lazy:
            self._parameters[name].materialize(sizes[name])  # type: ignore[union-attr]
        if lazy:
            self.reset_parameters()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        make_for(self, state_dict, prefix, ("weight",))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.out_features = shape[0]
        if name == "weight":
            self.in_features = shape[1]

    def out(self, x: Spec) -> Spec:
        return x.like(self.out_features)

    def fwd(self, x: Operand, weight: Operand) -> tuple[Tensor, tuple[()]]:
        return (scaled.forward(x, weight) if isinstance(x, Quantized) else F.linear(x, weight)), ()

    def dgrad(self, dy: Operand, weight: Operand) -> Tensor:
        return scaled.dgrad(dy, weight) if isinstance(weight, Quantized) else dy @ weight

    def wgrad(self, dy: Operand, x: Operand, weight_stored: Tensor) -> Any:
        """`dy.T @ x`, or into the weight's main_grad; fusers with a linear inside call it too."""
        if not self.accumulate_into_main_grad:
            return scaled.wgrad(dy, x) if isinstance(x, Quantized) else dy.t() @ x
        quantized = isinstance(x, Quantized)
        left, right = scaled.wgrad_operands(dy, x) if quantized else (dy.t(), x)
        return accumulate(left, right, weight_stored, self.overwrite_main_grad)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(out_features=24),)


class Bias(Op):
    """`y = x + bias`, bias `[width]`, initialized to 0. The gradient is summed in fp32."""

    def __init__(
        self,
        width: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.bias = empty_parameter((width,), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if not isinstance(self.bias, UninitializedParameter):
            nn.init.zeros_(self.bias)

    @property
    def in_width(self) -> int | None:
        return self.width

    def width_before(self, out_width: int) -> int | None:
        return out_width

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = in_width or out_width
        if self.width is None and width is not None:
            self.width = width
            if isinstance(self.bias, UninitializedParameter):
                self.bias.materialize((width,))
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.width = shape[0]

    def reject(self, x: Spec) -> str | None:
        width = getattr(self, "width", None) or getattr(self, "out_features", None)
        return None if x.width == width else f"got input width {x.width}, expected {width}"

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


class Linear(BasicLinear):
    """`y = x @ weight.T + bias`: a drop-in for nn.Linear, with its keys and its initialization.

    x: `[*, in_features]`; weight: `[out_features, in_features]`; bias: `[out_features]` or None.
    init_method initializes the weight alone; the bias is 0 then.
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
        accumulate_into_main_grad: bool = False,
        overwrite_main_grad: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            device=device,
            dtype=dtype,
            init_method=init_method,
            accumulate_into_main_grad=accumulate_into_main_grad,
            overwrite_main_grad=overwrite_main_grad,
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = empty_parameter((out_features,), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is None or isinstance(self.bias, UninitializedParameter):
            return
        if self.init_method is not None or not self.in_features:
            nn.init.zeros_(self.bias)
        else:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def lower(self) -> Sequence[Lowered]:
        kind = type(self)
        functions = ("fwd", "bwd", "dgrad", "wgrad")
        own = any(getattr(kind, name) is not getattr(BasicLinear, name) for name in functions)
        parts = [Lowered(kind if own else BasicLinear, self)]
        added = self.has("bias") and "bias" not in arguments(kind.fwd)
        return [*parts, Lowered(Bias, self)] if added else parts

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.has('bias')}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(out_features=24), cls(out_features=24, bias=False)
