"""Delayed scales as of one update, to which nothing writes; `delayed` says who may have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guards.torch_private import capturing_here, ops_alone, reinterpreted, stream_of


class Fixed:
    """Scales of some states to which nothing writes, fp32 `[count, 3]`, and views of them.

    Another stream may still read them when the last view of them is gone, so it gets copies. What
    the scales were before the update may follow, for `previous` alone.
    """

    __slots__ = "_views", "number", "rows", "stream", "values"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.number = values.get_device() if values.is_cuda else None
        """Of the device; None for one whose work waits in no stream."""
        self.stream = 0 if self.number is None else stream_of(self.number)
        self.rows: dict[int, Tensor] = {}
        """The scales by their place, fp32 `[3]`, of those that were asked for."""
        self._views: Sequence[Tensor] = ()

    def is_for_now(self) -> bool:
        """Whether views may be handed to what runs now: neither another stream nor a graph."""
        number = self.number
        if number is None:
            return True
        stream = self.stream  # no graph is captured on the default one, 0
        return stream_of(number) == stream and not (stream and capturing_here())

    def row(self, place: int) -> Tensor:
        """One of these."""
        found = self.rows.get(place)
        if found is None:
            values = self.values
            if torch.is_inference_mode_enabled():
                found = values[place]  # which training may save
            else:
                step, inner = values.stride()
                found = reinterpreted(values, (values.size(1),), (inner,), place * step)
            self.rows[place] = found
        return found

    def views(self) -> Sequence[Tensor]:
        """The scales, fp32 `[]`, by their place; made when they are first asked for."""
        if not self._views:
            self._views = self.values.view(-1).unbind(0)
        return self._views


def version_of(scale: Tensor) -> int:
    """How often a tensor was written to, as far as it is counted."""
    return -1 if scale.is_inference() else scale._version


def followed_ops(buffer: Tensor) -> bool:
    """Whether a transform, a mode or a subclass has to see the ops on a buffer."""
    return type(buffer) is not Tensor or not ops_alone()
