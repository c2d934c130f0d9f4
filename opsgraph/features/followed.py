"""Who follows PyTorch's ops alone: torch.func, forward-mode AD, torch.jit.trace.

None of them sees what a Function or a kernel of ours computes. For them another stage stands in, of
the same ops, which runs the reference under PyTorch's own autograd, as `double_backward` has it.
The hook is `run_followed`, which a stage asks before it looks for a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..base.errors import PlanError
from ..guards.torch_private import (
    PassThrough,
    constant_under_compile,
    followed,
    forward_ad,
    has_memory,
    top_transform,
    untraced,
    without_autocast,
)
from ..plan import Plan
from ..plan.basic_ops import BasicOps

_SEEN_THROUGH = ("cpu", "aten", "reference")
"""Backends that leave the work to PyTorch's ops while a dispatch mode is active."""


def see_through(
    plan: Plan, gradients: Sequence[Tensor], saved: Sequence[Tensor]
) -> AbstractContextManager[Any]:
    """A context for a backward whose gradients may be no memory that a kernel can read.

    Batched ones, of `is_grads_batched`, are left to PyTorch's ops. Raises PlanError for tangents of
    forward-mode AD, which only a forward inside of it can follow, and where kernels do not yield.
    """
    if forward_ad._current_level >= 0:
        for tensor in (*gradients, *saved):
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise PlanError(
                    "got a tangent of forward-mode AD in a backward, expected the forward inside "
                    "of it too, or a module with double_backward=True"
                )
    if all(map(has_memory, gradients)):
        return without_autocast(gradients[0])
    if plan.specs.prepared or any(step.backend not in _SEEN_THROUGH for step in plan.backward):
        raise PlanError(
            "got a batched gradient for a backward of fused kernels, expected a module with "
            "double_backward=True, and no recipe"
        )
    return PassThrough()  # type: ignore[no-untyped-call]


class Followed:
    """What a stage does when it is followed."""

    again: partial[Any]
    table: Any
    recipe: Any
    eager_only: str | None
    double_backward: bool
    run_inference: Callable[..., Any]

    @cached_property
    def stand_in(self) -> Any:
        """The stage of the same ops that runs the reference."""
        ops, labels, options, *wiring = self.again.args
        options = replace(options, double_backward=True, stands_in=True)
        return self.again.func(ops, labels, options, *wiring)

    def run_followed(
        self, x: Tensor, extras: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> Any:
        """The call, in ops of PyTorch that a transform or a trace can follow."""
        if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights):
            self.check_gradients()
        other: Any = self if self.double_backward else self.stand_in
        if torch.compiler.is_compiling():
            return other(x, extras, True)
        with untraced():  # a trace records tensors, and planning makes some
            key = other.key(x, extras, weights)
            if key not in other.plans and other.outdated():
                return other.renewed()(x, extras)
            plan = other.ensure(key)
        return self.run_inference(plan, other, len(extras), (x, *extras, *weights))

    @constant_under_compile
    def is_followed(self) -> bool:
        """Whether Dynamo traces inside a transform, which it guards by itself, or for an export."""
        wanted = followed() or top_transform() is not None or self._is_exported()
        return wanted and self.stand_in is not None

    def _is_exported(self) -> bool:
        """Whether torch.export traces what the reference can stand for.

        A program goes to processes that have none of this one's plans, so it is of PyTorch's ops.
        """
        return (
            torch.compiler.is_exporting()
            and self.recipe is None
            and self.eager_only is None
            and not any(kind.collective for kind in self.table.run.kinds)
        )

    def check_gradients(self) -> None:
        """Raises PlanError where weight gradients would go past PyTorch's own autograd."""
        if self.eager_only is not None:
            raise PlanError(
                f"{self.eager_only}; nor can double_backward, torch.func, forward-mode AD and "
                "torch.jit.trace"
            )


def check_differentiable(run: BasicOps, options: Any, recipe: int | None) -> None:
    """Raises PlanError for what PyTorch's own autograd has no derivative of."""
    if not options.double_backward:
        return
    others = "torch.func, forward-mode AD and torch.jit.trace"
    if recipe is not None:
        raise PlanError(
            f"double_backward: a recipe's rounding has no derivative, which {others} want too; "
            "got both, expected no recipe"
        )
    i = next((i for i, kind in enumerate(run.kinds) if kind.collective), None)
    if i is not None:
        raise PlanError(
            f"{run.labels[i]}: it exchanges tensors with other ranks, and has no second "
            f"derivative, which {others} want too; expected double_backward=False and none of them"
        )


def copy_gradients(flats: Sequence[Tensor]) -> None:
    """Have flattened inputs get gradients of their own, where ops run under plain autograd.

    A view's gradient is a view of what came, and PyTorch takes it into `.grad` without a copy.
    """
    if not (torch.compiler.is_compiling() or followed()):
        for flat in flats:
            if flat.requires_grad and not flat.is_leaf:
                flat.register_hook(_copy)


def _copy(gradient: Tensor | None) -> Tensor | None:
    """A hook, which also sees gradients that are undefined."""
    return None if gradient is None else gradient.clone()
