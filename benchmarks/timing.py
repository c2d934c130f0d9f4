"""Fair timing of several candidates: they take turns, and each is judged by its median."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from opsgraph.kernels.cpu.choices import cpu_model


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 50,
    inner: int = 100,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median seconds of one call of each function, over `repeats` samples of `inner` calls.

    In every repeat each function is sampled once, starting from the next one, so that a change of
    the machine's speed meets all of them, and none always follows the same other. Python's garbage
    collector is off meanwhile. `synchronize` is called before the clock is read
    (`torch.cuda.synchronize` where the work is on a GPU).
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for function in functions.values():  # warm up: plan, allocate, compile
        function()
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(_sample(functions[name], inner, synchronize))
    finally:
        if collected:
            gc.enable()
    return {name: statistics.median(found) for name, found in samples.items()}


def _sample(function: Callable[[], Any], inner: int, synchronize: Callable[[], Any]) -> float:
    function()  # what ran before has left the caches to others
    synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        function()
    synchronize()
    return (time.perf_counter() - start) / inner


def machine() -> str:
    """CPU (and GPU) model, threads that PyTorch uses, and its version."""
    parts = [cpu_model(), f"{torch.get_num_threads()} thread(s)"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join((*parts, f"torch {torch.__version__}"))
