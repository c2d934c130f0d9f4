"""Kernels outside of passes: launched in Python, or, once replays are there, natively.

`replay.launched` takes the place of `launching.run`.
"""

from collections.abc import Callable

Run = Callable[..., None]


class _Launching:
    run: Run
    """Runs a function that launches kernels on tensors, and does nothing else.

    `run(key, function, tensors, anywhere=False)`: by its key what it launches is the same, but for
    where the tensors are. anywhere: whether no kernel is compiled for aligned addresses.
    """


launching = _Launching()
launching.run = lambda key, function, tensors, anywhere=False: function(*tensors)
