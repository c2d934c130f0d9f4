"""Fair timing of several candidates: they take turns, and each is judged by its median."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from opsgraph.kernels.cpu.choices import cpu_model

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 50,
    inner: int = 100,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median seconds of one call of each function, over `repeats` samples of `inner` calls.

    They take turns (`take_turns`). `synchronize` is called before the clock is read
    (`torch.cuda.synchronize` where the work is on a GPU).
    """
    for function in functions.values():  # warm up: plan, allocate, compile
        function()
    samplers = {
        name: partial(_sample, function, inner, synchronize) for name, function in functions.items()
    }
    found = take_turns(samplers, repeats)
    return {name: statistics.median(samples) for name, samples in found.items()}


def take_turns(samplers: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """`repeats` samples of each.

    In every repeat each is asked once, the next one first and the others in an order of chance,
    the same in every run. So a change of the machine's speed meets all of them, and none always
    follows the same other. Python's garbage collector is off meanwhile, and collects between
    repeats what these have left.
    Where a caller has frozen objects, those of this call stay frozen with them.
    """
    samples: dict[K, list[T]] = {name: [] for name in samplers}
    names = list(samplers)
    collected, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for repeat in range(repeats):
            turn = repeat % len(names) if names else 0
            others = names[:turn] + names[turn + 1 :]
            random.Random(repeat).shuffle(others)
            for name in names[turn : turn + 1] + others:
                samples[name].append(samplers[name]())
            gc.collect()
    finally:
        if not frozen:
            gc.unfreeze()
        if collected:
            gc.enable()
    return samples


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    if len(samples) == 1:
        return dict.fromkeys(("median", "low", "high"), samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


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
