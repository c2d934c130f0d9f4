"""GroupedLinear under a recipe: each group's operands are quantized on their own."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Op, Placed, Spec
from ..precision import products as scaled
from ..precision.quantizers import Quantized, Quantizer
from ..precision.recipe import Recipe
from .grouped import GroupedLinear, _pieces, weight_gradients

CopiesOf = Callable[[Quantizer, Tensor, Collection[str]], Quantized]
"""A function that makes the copies of a tensor whose names it is given."""


def _by_formula(quantizer: Quantizer, x: Tensor, copies: Collection[str]) -> Quantized:
    return quantizer(x, copies)


class QuantizedGroupedLinear(GroupedLinear):
    """What recipes put in the place of a GroupedLinear; it reads that one's parameters.

    Blocks of scales end with their group, so a group's result does not depend on its neighbours.
    Nothing quantized is saved: a group's sizes are not known before it runs.
    """

    quantizes = "activation", "weight", "gradient"

    def __init__(self, layer: GroupedLinear, quantizers: Sequence[Quantizer], override: str | None):
        Op.__init__(self)
        self.num_groups = layer.num_groups
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.group_names = layer.group_names
        self.single_grouped_weight = layer.single_grouped_weight
        self.single_grouped_bias = layer.single_grouped_bias
        self.quantizers, self.override = tuple(quantizers), override
        self.channels, self.strict = layer.channels, layer.strict
        for name in ("accumulate_into_main_grad", "overwrite_main_grad", "delay_wgrad_compute"):
            setattr(self, name, getattr(layer, name))
        for name in ("weight", "bias"):
            self._homes[name] = layer.home(name)

    def reject(self, x: Spec) -> str | None:
        widths = {"in_features": x.width, "out_features": self.out_features or 0}
        for (name, width), quantizer in zip(widths.items(), self.quantizers[::2], strict=True):
            if reason := quantizer.reject(name, width):
                return reason
        return super().reject(x)

    def fwd(
        self, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[()]]:
        return self.forward_by(_by_formula, x, split_sizes, weight, bias)

    def bwd(
        self, dy: Tensor, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None,
        weight_stored: Tensor, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
        operands = dy, x, split_sizes, weight, bias, weight_stored, want
        return self.backward_by(_by_formula, *operands)

    def forward_by(
        self, copies_of: CopiesOf, x: Tensor, split_sizes: Tensor, weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, tuple[()]]:  # fmt: skip
        """`fwd`, with copies made so."""
        activation, weights, _ = self.quantizers
        parts = []
        for g, piece in enumerate(_pieces(x, split_sizes)):
            operands = (
                copies_of(activation, piece, ("row",)),
                copies_of(weights, weight[g], ("row",)),
            )
            y = scaled.forward(*operands)
            parts.append(y if bias is None else y + bias[g])
        return torch.cat(parts), ()

    def backward_by(
        self, copies_of: CopiesOf, dy: Tensor, x: Tensor, split_sizes: Tensor, weight: Tensor,
        bias: Tensor | None, weight_stored: Tensor, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
        """`bwd`, with copies made so."""
        if self.override == "high_precision":
            return super().bwd(dy, x, split_sizes, weight, bias, weight_stored, want)
        pieces = zip(_pieces(dy, split_sizes), _pieces(x, split_sizes), weight, strict=True)
        groups = [self._group(copies_of, d, p, w, want) for d, p, w in pieces]
        dx = torch.cat([data for data, _ in groups]) if "x" in want else None  # type: ignore[misc]
        dweight = dbias = None
        if "weight" in want:
            pairs = [operands for _, operands in groups]
            dweight = self.weigh(weight_gradients, self, scaled.wgrad, pairs, weight_stored)
        if "bias" in want and bias is not None:
            grads = _pieces(dy, split_sizes)
            dbias = torch.stack([g.sum(0, dtype=bias.dtype) for g in grads])
        return dx, (None, dweight, dbias)

    def _group(
        self, copies_of: CopiesOf, dy: Tensor, x: Tensor, weight: Tensor, want: Collection[str]
    ) -> tuple[Tensor | None, tuple[Any, Quantized] | None]:
        """dx of one group, and of what its weight gradient is the product."""
        copies = ("row",) if self.override else ("col",)
        activation, weights, gradient = self.quantizers
        grad = dy if self.override else copies_of(gradient, dy, ("row", "col"))
        dx = scaled.dgrad(grad, copies_of(weights, weight, copies)) if "x" in want else None
        if "weight" not in want:
            return dx, None
        if isinstance(grad, Quantized) and grad.col is not None:
            grad = grad._replace(row=None)
        return dx, (grad, copies_of(activation, x, copies))

    @classmethod
    def sample(cls) -> Sequence[Op]:
        return ()


def grouped(entry: Placed, recipe: Recipe) -> Iterator[Placed]:
    """A GroupedLinear under a recipe. With DelayedScaling each group has its own current scale."""
    assert isinstance(entry.op, GroupedLinear)
    quantizers = [recipe.undelayed(role) for role in QuantizedGroupedLinear.quantizes]
    op = QuantizedGroupedLinear(entry.op, quantizers, recipe.backward_override)
    yield entry._replace(kind=QuantizedGroupedLinear, op=op)
