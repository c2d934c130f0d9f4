"""Launches outside of passes: recorded when they come again with no kernel to compile, then native.

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
from ..guards.compiled import compiled
from ..guards.launching import launching
from ..guards.torch_private import ops_alone
from ..guards.watching import watching
from .events import Event, Exchange, Wait, used
from .native import program, replay, why_not
from .record import ALIGNED, PAGE
from .recorder import Recorder

MOST = 256
"""Keys of which something is kept."""
_known: dict[Hashable, Any] = {}
"""By key what launches natively; until then how many calls there were, False where nothing does."""
ATTEMPTS = 4
"""Calls that are recorded until one launches what was compiled before."""


class _Native:
    """Launches that were recorded, on tensors that begin elsewhere.

    `run(tensors)` returns False, having done nothing, where these are not as recorded: kernels may
    be compiled for addresses that are multiples of 16, unless tensors may begin anywhere.
    """

    def __init__(
        self, events: Sequence[Event], tensors: Sequence[Tensor], anywhere: bool
    ) -> None:  # fmt: skip
        device = tensors[0].device
        every = [(0, event) for event in events]
        self.program = program(every, lambda place: (place.buffer, place.offset), 0, device)
        names, given = ([f"{kind}{k}" for k in range(len(tensors))] for kind in "pt")
        aligned = [n for n, t in zip(names, tensors, strict=True) if t.data_ptr() % ALIGNED == 0]
        tests = [f"min({', '.join(names)}, {PAGE}) < {PAGE}"]
        if aligned and not anywhere:
            tests.append(f"({' | '.join(aligned)}) % {ALIGNED}")
        stream, namespace = "0", dict[str, Any](replay=replay(device.type), fail=_fail)
        namespace["start"] = ctypes.addressof(self.program)
        namespace["pack"] = struct.Struct(f"={len(tensors)}q").pack
        if device.type == "cuda":
            stream, namespace["stream"] = (
                f"stream({device.index})",
                torch._C._cuda_getCurrentRawStream,
            )
            namespace["current"] = torch._C._cuda_getDevice
            tests.insert(0, f"current() != {device.index}")
        source = f"""def launched(tensors):
    {", ".join(given)}, = tensors
    {", ".join(names)} = {", ".join(f"{name}.data_ptr()" for name in given)}
    if {" or ".join(tests)}:
        return False
    failed = replay(start, pack({", ".join(names)}), {stream})
    if failed:
        fail(failed)
    return True
"""
        self.run: Callable[[Sequence[Tensor]], bool] = compiled("launched", source, namespace)


def _fail(failed: int) -> None:
    raise OpsgraphError(f"got error {failed >> 32} from a launch, expected none")


def run(
    key: Hashable, function: Callable[..., None], tensors: Sequence[Tensor], anywhere: bool = False
) -> None:  # fmt: skip
    """`function(*tensors)`, natively if that was recorded. A recorder sees the function."""
    known = _known.get(key, 0)
    if known is False or watching.recorder is not None or not ops_alone():
        function(*tensors)
    elif known == 0:
        _known[key] = 1  # kernels are compiled
        function(*tensors)
        if len(_known) > MOST:
            _known.pop(next(iter([*_known])), None)  # another thread may have dropped it
    elif type(known) is int:
        made = _recorded(function, tensors, anywhere)
        again = made is None and known < ATTEMPTS
        _known[key] = known + 1 if again else made or False
    elif not known.run(tensors):
        function(*tensors)


def _recorded(
    function: Callable[..., None], tensors: Sequence[Tensor], anywhere: bool
) -> _Native | None:  # fmt: skip
    """Run it, watched; returns what does the same, or None."""
    if not config.read().replay or why_not(tensors[0].device.type) is not None:
        function(*tensors)
        return None
    recorder, count = Recorder(len(tensors)), len(tensors)
    placed = [recorder.argument(k, tensor) for k, tensor in enumerate(tensors)]
    with recorder:
        function(*tensors)
    events, reason = recorder.take()
    local = not any(isinstance(event, Exchange | Wait) for event in events)
    own = local and all(buffer < count for event in events for buffer in used(event))
    if reason is not None or None in placed or recorder.shared or not own:
        return None
    return _Native(events, tensors, anywhere)


launching.run = run
