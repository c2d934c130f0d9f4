"""Launches outside of passes: recorded when they come again with no kernel to compile, then native.

Such are the update of delayed scales and the noting of amaxes: a kernel each, whose tensors are
other ones in each call, and whose launch through Triton takes longer than a pass's replay.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from ..base import config
from ..base.errors import OpsgraphError
from ..guards.launching import launching
from ..guards.torch_private import current_device, stream_of
from ..guards.watching import watching
from .calling import launcher, unmoved
from .events import Event, Exchange, Wait, used
from .native import program, why_not
from .parts import ALIGNED
from .recorder import Recorder

MOST = 256
"""Keys of which something is kept."""
_known: dict[Hashable, "Launch"] = {}
ATTEMPTS = 4
"""Calls that are recorded until one launches what was compiled before."""


def _native(
    events: Sequence[Event], tensors: Sequence[Tensor], anywhere: bool
) -> Callable[..., bool]:  # fmt: skip
    """What does launches that were recorded, on tensors that begin elsewhere.

    It returns False, having done nothing, where these are not as recorded: kernels may be compiled
    for addresses that are multiples of 16, unless tensors may begin anywhere.
    """
    device = tensors[0].device
    every = [(0, event) for event in events]
    words = program(every, lambda place: (place.buffer, place.offset), 0, device)
    aligned = [not anywhere and t.data_ptr() % ALIGNED == 0 for t in tensors]
    replay = launcher(words, [(ALIGNED - 1) * each for each in aligned], device.type)
    cuda, number = device.type == "cuda", device.index

    def launched(*given: Tensor, words: Any = words) -> bool:  # which replay has the address of
        if cuda and current_device() != number:
            return False
        failed = replay(stream_of(number) if cuda else 0, *given)
        if failed and failed != -1:
            raise OpsgraphError(f"got error {failed >> 32} from a launch, expected none")
        return not failed

    return launched


class Launch:
    """Launches what a function launches, natively once that was recorded."""

    def __init__(self, function: Callable[..., None], anywhere: bool) -> None:
        self.function, self.anywhere = function, anywhere
        self.calls = 0
        """How many there were until it is known whether one is native."""
        self.native: Callable[..., bool] | None = None
        """Does that; returns False, having done nothing, where it cannot."""

    def __call__(self, *tensors: Tensor) -> None:
        if watching.recorder is not None:  # which sees the function
            self.function(*tensors)
        elif self.native is not None:
            if not self.native(*tensors):
                self.function(*tensors)
        elif 0 < self.calls <= ATTEMPTS:
            self.calls += 1
            self.native = _recorded(self.function, tensors, self.anywhere)
        else:
            self.calls += 1  # kernels are compiled
            self.function(*tensors)


def by(key: Hashable, function: Callable[..., None], anywhere: bool = False) -> Launch:
    """What launches it, see `guards.launching`."""
    known = _known.get(key)
    if known is None:
        known = _known[key] = Launch(function, anywhere)
        if len(_known) > MOST:
            _known.pop(next(iter([*_known])), None)  # another thread may have dropped it
    return known


def _recorded(
    function: Callable[..., None], tensors: Sequence[Tensor], anywhere: bool
) -> Callable[..., bool] | None:  # fmt: skip
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
    return _native(events, tensors, anywhere)


launching.by, launching.unmoved = by, unmoved
