"""Calls like earlier ones: one check in C++ finds their plan, and no key is made.

The check is PyTorch's own, of guards: it compares class, dtype, device, sizes and whether a
gradient is wanted, of the input and of all parameters, and it fails under autocast that was not
there when it was made. A call that fails goes by its key (`run.key`): a difference too many costs
time alone. Leading sizes are left open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..guards.torch_private import dispatch_modes, followed, same_kinds
from ..ops.joined import Joined
from ..plan import Plan
from ..precision.delayed import Scaling
from ..precision.reading import fixed_of

MOST = 64
"""Kinds of calls that a stage knows."""
_PLAIN = (Tensor, nn.Parameter, Joined)
_parameters, _training = attrgetter("_parameters"), attrgetter("training")

Place = tuple[nn.Module, str]


class Known(NamedTuple):
    """A kind of call."""

    fits: Callable[..., bool]
    """Whether the input, the extra inputs and the parameters are of this kind."""
    trains: list[bool]
    """Of the ops that training matters to, whether they train."""
    grad: bool
    """Whether grad is enabled, which the check does not compare."""
    plan: Plan
    changes: int
    """Of the table of plans until then: a plan may be replaced."""


def _is_none(module: nn.Module, name: str) -> bool:
    """Whether that is no parameter but an attribute, and None, as the scale of most recipes is."""
    return name not in module._parameters and module.__dict__.get(name, module) is None


class KnownCalls:
    """Those of a stage.

    slots: its parameters. absent: where others may appear. modes: ops that training matters to.
    plans: the table's.
    """

    def __init__(
        self, slots: Sequence[Place], absent: Sequence[Place], modes: Sequence[Any], plans: Any
    ) -> None:
        self.never = [
            k for k, slot in enumerate(slots) if isinstance(slot[0], Scaling) or _is_none(*slot)
        ]
        read = [slot for k, slot in enumerate(slots) if k not in self.never]
        self.modules, self.names = [m for m, _ in read], [name for _, name in read]
        self.made = [k for k, (m, name) in enumerate(read) if name not in m._parameters]
        """Those that are made at each call, as one of several layers' parameters."""
        self.missing = {k: torch.empty(0, device="cpu") for k in self.made}
        """What the check compares in the place of one that is None."""
        self.states = [*dict.fromkeys(m for m, _ in slots if isinstance(m, Scaling))]
        self.absent, self.appearing = [m for m, _ in absent], [name for _, name in absent]
        self.nothing = [None] * len(absent)
        self.modes, self.plans = modes, plans
        self.last: Known | None = None
        self.kinds: dict[Any, Known | None] = {}
        """By key; None for a call that fits no check, as one with the same tensor twice."""

    def __call__(
        self, x: Tensor, extras: Sequence[Tensor]
    ) -> tuple[Plan | None, list[Tensor | None], Sequence[Tensor] | None]:
        """The plan of a call of a known kind; the parameters that are there as such; the scales.

        The scales are those of each delayed state, `reading.fixed_of`.
        """
        weights: list[Any] = [*map(dict.get, map(_parameters, self.modules), self.names)]
        for k in self.made:
            weights[k] = getattr(self.modules[k], self.names[k], None)
        compared = self._compared(weights) if self.made else weights
        scales = fixed_of(self.states) if self.states else ()
        last = self.last  # which another thread may replace
        same = (
            last is not None
            and scales is not None
            and not x.is_nested  # which the check cannot look at
            and last.fits(x, *extras, *compared, *scales)
            and torch.is_grad_enabled() is last.grad
            and (self.states or not followed())  # where there are scales, that was asked
            and self.plans.changes == last.changes
            and [*map(_training, self.modes)] == last.trains
            and [*map(dict.get, map(_parameters, self.absent), self.appearing)] == self.nothing
        )
        for k in self.never:
            weights.insert(k, None)
        return last.plan if same and last is not None else None, weights, scales

    def _compared(self, weights: Sequence[Any]) -> list[Any]:
        return [self.missing.get(k) if w is None else w for k, w in enumerate(weights)]

    def learn(
        self, key: tuple[Any, ...], plan: Plan, x: Tensor, extras: Sequence[Tensor], weights: Any
    ) -> None:
        """Know the kind of a call from now on. weights: all, wherever they come from."""
        scales = fixed_of(self.states)
        if scales is None:
            return
        read = [w for k, w in enumerate(weights) if k not in self.never]
        tensors = (x, *extras, *self._compared(read), *scales)
        if key[5] is not None or dispatch_modes() or any(type(t) not in _PLAIN for t in tensors):
            return  # under autocast its dtype counts too
        grad, changes = torch.is_grad_enabled(), self.plans.changes
        where = (*key, grad, torch.is_inference_mode_enabled(), *[t.dim() for t in (x, *extras)])
        known = self.kinds.get(where)
        stale = known is not None and (known.changes != changes or not known.fits(*tensors))
        if stale or where not in self.kinds:
            free = [*[t.dim() - 1 for t in (x, *extras)], *[0] * (len(self.names) + len(scales))]
            fits, known = same_kinds(tensors, free), None
            if fits is not None and fits(*tensors):
                known = Known(fits, [*map(_training, self.modes)], grad, plan, changes)
            if len(self.kinds) >= MOST:
                self.kinds.clear()
            self.kinds[where] = known
        if known is not None:
            self.last = known
