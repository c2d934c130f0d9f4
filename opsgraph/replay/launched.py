"""Launches outside of passes: recorded when they come for the second time, then one native call.

Such are the update of delayed scales and the noting of amaxes: a kernel each, whose tensors are
other ones in each call, and whose launch through Triton takes longer than a pass's replay.
"""

import ctypes
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import config
from ..base.errors import OpsgraphError
from ..guards.launching import launching
from ..guards.torch_private import ops_alone, stream_of
from .native import program, replay, why_not
from .record import ALIGNED, used
from .recorder import Event, Recorder

MOST = 256
"""Keys of which something is kept."""
_known: dict[Hashable, Any] = {}
"""By key what launches natively; None after the first call, False where nothing does."""


class _Native:
    """Launches that were recorded, on tensors that begin elsewhere."""

    def __init__(self, events: Sequence[Event], tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        every = [(0, event) for event in events]
        self.program = program(every, lambda place: (place.buffer, place.offset), 0, self.device)
        self.start, self.replay = ctypes.addressof(self.program), replay(self.device.type)
        self.pack = struct.Struct(f"={len(tensors)}q").pack
        self.aligned = [k for k, t in enumerate(tensors) if t.data_ptr() % ALIGNED == 0]
        """What kernels may be compiled for."""

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Launch; returns False, having done nothing, where that is not as recorded."""
        device = self.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            return False
        addresses = [tensor.data_ptr() for tensor in tensors]
        if any(addresses[k] % ALIGNED for k in self.aligned) or not all(addresses):
            return False
        failed = self.replay(self.start, self.pack(*addresses), stream_of(device))
        if failed:
            raise OpsgraphError(f"got error {failed >> 32} from a launch, expected none")
        return True


def run(key: Hashable, function: Callable[..., None], tensors: Sequence[Tensor]) -> None:
    """`function(*tensors)`, natively if that was recorded."""
    known = _known.get(key)
    if known is False or not ops_alone():
        function(*tensors)
    elif known is None:
        if key in _known:
            _known[key] = _recorded(function, tensors)
        else:
            _known[key] = None  # kernels are compiled
            function(*tensors)
            if len(_known) > MOST:
                del _known[next(iter(_known))]
    elif not known(tensors):
        function(*tensors)


def _recorded(function: Callable[..., None], tensors: Sequence[Tensor]) -> Any:
    """Run it, watched; returns what does the same, or False."""
    if not config.read().replay or why_not(tensors[0].device.type) is not None:
        function(*tensors)
        return False
    recorder, count = Recorder(len(tensors)), len(tensors)
    placed = [recorder.argument(k, tensor) for k, tensor in enumerate(tensors)]
    with recorder:
        function(*tensors)
    events, reason = recorder.take()
    own = all(buffer < count for event in events for buffer in used(event))
    if reason is not None or None in placed or recorder.shared or not own:
        return False
    return _Native(events, tensors)


launching.run = run
