"""Kernels outside of passes: launched in Python, or, once replays are there, natively.

`replay.launched` takes the place of `launching.by`.
"""

from collections.abc import Callable, Hashable

Launch = Callable[..., None]
"""Launches kernels on tensors, and does nothing else."""


class _Launching:
    by: Callable[..., Launch]
    """What does what a function does, natively if it can: one for each key.

    `by(key, function, anywhere=False)`: with one key functions launch the same on as many tensors.
    anywhere: whether no kernel is compiled for aligned addresses. Those who call it have seen that
    no transform and no dispatch mode follows PyTorch's ops.
    """


def _in_python(key: Hashable, function: Launch, anywhere: bool = False) -> Launch:
    return function


launching = _Launching()
launching.by = _in_python
