"""Kernels outside of passes: launched in Python, or, once replays are there, natively.

`replay.launched` takes the place of `launching.run`.
"""

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

Run = Callable[[Hashable, Callable[..., None], Sequence[Tensor]], None]


class _Launching:
    run: Run
    """Runs a function that launches kernels on tensors, and does nothing else.

    By its key what it launches is the same, but for where the tensors are.
    """


launching = _Launching()
launching.run = lambda key, function, tensors: function(*tensors)
