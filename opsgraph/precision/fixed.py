"""Delayed scales as of one update, to which nothing writes; `delayed` says who may have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guards.torch_private import capturing_here, ops_alone, reinterpreted, stream_of
from ..kernels.reference.quantize import new_scales


class Fixed:
    """Scales of some states to which nothing writes, fp32 `[count, 3]`, and views of them.

    Another stream may still read them when the last view of them is gone, so it gets copies. What
    the scales were before the update may follow, for `previous` alone.
    """

    __slots__ = "_views", "number", "parts", "stream", "values"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.number = values.get_device() if values.is_cuda else None
        """Of the device; None for one whose work waits in no stream."""
        self.stream = 0 if self.number is None else stream_of(self.number)
        self.parts: dict[tuple[int, ...], Tensor] = {}
        """The scales of some states by their places, fp32 `[states, 3]`, that were asked for."""
        self._views: Sequence[Tensor] = ()

    def is_for_now(self) -> bool:
        """Whether views may be handed to what runs now: neither another stream nor a graph."""
        number = self.number
        if number is None:
            return True
        stream = self.stream  # no graph is captured on the default one, 0
        return stream_of(number) == stream and not (stream and capturing_here())

    def part(self, places: tuple[int, ...]) -> Tensor:
        """One of these."""
        found = self.parts.get(places)
        if found is None:
            found = self.parts[places] = self._part(places)
        return found

    def _part(self, places: tuple[int, ...]) -> Tensor:
        values, first, count = self.values, places[0], len(places)
        if places != (*range(first, first + count),):
            return gathered([(self, place) for place in places])
        if count == values.size(0):
            return values
        if torch.is_inference_mode_enabled():
            return values[first : first + count]  # which training may save
        strides = values.stride()
        return reinterpreted(values, (count, values.size(1)), strides, first * strides[0])

    def views(self) -> Sequence[Tensor]:
        """The scales, fp32 `[]`, by their place; made when they are first asked for."""
        if not self._views:
            self._views = self.values.view(-1).unbind(0)
        return self._views


def gathered(places: Sequence[tuple[Fixed, int]]) -> Tensor:
    """A copy of the scales of some states, fp32 `[states, 3]`, by where they are."""
    with torch.inference_mode(False), torch.no_grad():
        made = new_scales(len(places), places[0][0].values.device)
        torch._foreach_copy_(list(made.unbind(0)), [fixed.values[k] for fixed, k in places])
    return made


def version_of(scale: Tensor) -> int:
    """How often a tensor was written to, as far as it is counted."""
    return -1 if scale.is_inference() else scale._version


def followed_ops(buffer: Tensor) -> bool:
    """Whether a transform, a mode or a subclass has to see the ops on a buffer."""
    return type(buffer) is not Tensor or not ops_alone()
