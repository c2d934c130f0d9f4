"""Delayed scales as of one update, to which nothing writes; `delayed` says who may have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guards.torch_private import ops_alone, stream_of


class Fixed:
    """Scales of some states to which nothing writes, fp32 `[count, 3]`, and views of them.

    Another stream may still read them when the last view of them is gone, so it gets copies. What
    follows the `count` is there for `previous` alone.
    """

    def __init__(self, values: Tensor, count: int) -> None:
        self.values, self.count, self.device = values, count, values.device
        self.stream = stream_of(self.device)
        self._rows: Sequence[Tensor] = ()
        self._views: Sequence[Tensor] = ()

    def is_for_now(self) -> bool:
        """Whether views may be handed to what runs now: neither another stream nor a graph."""
        return stream_of(self.device) == self.stream and not capturing(self.device)

    def rows(self) -> Sequence[Tensor]:
        """The scales of each state, fp32 `[3]`; made when they are first asked for."""
        if not self._rows:
            self._rows = self.values.narrow(0, 0, self.count).unbind(0)
        return self._rows

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


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes down what runs, to run it again on what is there then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
