"""What a stage does for weights whose gradients autograd does not see.

They go into `main_grad`, or wait for `backward_dw`; `ops.main_grad` and `ops.delayed` say how. A
stage hands its backward `Unseen.ops` in place of its own, and takes out of the result what waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from ..base.errors import PlanError
from ..guards.torch_private import graph_task
from ..op import Op
from ..ops.delayed import (
    Late,
    deferring,
    delays,
    mark_delayed,
    queue_of,
    unasked,
    verify_arrival,
)
from ..ops.joined import parameters
from ..ops.main_grad import arriving
from ..plan import Plan
from ..plan.basic_ops import BasicOps
from .dimensions import memory
from .weight_gradients import NOWHERE, Elsewhere


class Unseen:
    """Of a stage with such weights: what to know in its forward, how to run its backward.

    reason: what torch.compile could not see, None for a stage without such weights.
    """

    def __init__(
        self,
        run: BasicOps,
        ops: Sequence[Op],
        slots: Sequence[tuple[nn.Module, str]],
        options: Any,
    ) -> None:
        self.run, self.slots, self.options = run, slots, options
        waits = [
            kind.gemm and delays(op, options.given())
            for kind, op in zip(run.kinds, run.ops, strict=True)
        ]
        self.reason = None
        if any(waits):
            self.reason = "delay_wgrad_compute queues gradients, which torch.compile cannot see"
        elif any(getattr(op, "accumulate_into_main_grad", False) for op in run.ops):
            self.reason = (
                "accumulating into main_grad writes a tensor that torch.compile cannot see"
            )
        if self.reason is not None and options.double_backward and not options.stands_in:
            raise PlanError(f"double_backward: got it, and {self.reason}")
        self.ops = tuple(deferring(op) if late else op for op, late in zip(ops, waits, strict=True))
        for (i, _), home in zip(run.slots, slots, strict=True):
            mark_delayed(getattr(*home), waits[i])

    def watch(self, plan: Plan, tensors: Sequence[Any]) -> tuple[Sequence[Any], list[int], int]:
        """What the backward has to know: the weights, each one's edge, what makes the call again.

        That is the number of a backward, -1 for none. Raises OpError for a weight whose gradient
        would go astray. tensors: all that the call has.
        """
        elsewhere: Elsewhere = plan.elsewhere or NOWHERE
        late, weights = elsewhere.late, tensors[plan.specs.first_weight :]
        edges = [0, *accumulate(tensor is not None for tensor in tensors)]
        for k in sorted({*late, *(k for _, k in elsewhere.into_main_grad)}):
            label = self.run.labels[self.run.slots[k][0]]
            verify_arrival(*self.slots[k], weights[k], label, k in late)
        return weights, edges[plan.specs.first_weight :], graph_task()

    def run_backward(
        self, run: Any, plan: Plan, ctx: Any, grads: Sequence[Tensor], saved: list[Any]
    ) -> Any:
        """The backward; calls that come where gradients would are queued, for `backward_dw`."""
        weights, edges, backward = ctx.watched
        if backward < 0:
            backward = graph_task()
        elsewhere: Elsewhere = plan.elsewhere or NOWHERE
        late, kept = elsewhere
        # The weight itself, whatever hooks of saved tensors have made of it.
        for place, k in kept:
            saved[plan.joined.places[place] if ctx.joined else place] = weights[k]
        first = plan.specs.first_weight
        into_main_grad = {k for _, k in kept}
        unwanted: set[int] = set()
        for k in {*late, *into_main_grad}:
            unwanted |= unasked(ctx.next_functions[edges[k]][0], weights[k])
        with arriving(backward, frozenset(unwanted)):
            gradients = list(run(self.ops, *grads, saved))
        kept_memory: set[int] = set()
        for k in reversed(late):
            call, gradients[first + k] = gradients[first + k], None
            if call is not None and not unwanted.issuperset(map(id, parameters(weights[k]))):
                home, unasked_for = self.slots[k], frozenset(unwanted)
                entry = Late.of(home, weights[k], call, k in into_main_grad, unasked_for)
                everywhere = self.options.delay_wgrad_compute
                queue = self.options.queue if everywhere else queue_of(home[0])
                queue.leave(backward, entry)
                kept_memory |= {memory(tensor) for tensor, _ in entry.versions}
        if kept_memory and ctx.lead is not None:
            # Autograd takes a view for .grad as it is, and adds to it: an operand would change.
            for k, gradient in enumerate(gradients[:first]):
                if gradient is not None and memory(gradient) in kept_memory:
                    gradients[k] = gradient.clone()
        return gradients
