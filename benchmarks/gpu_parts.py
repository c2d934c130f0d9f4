"""What the parts of `benchmarks.gpu` have in common: what was asked for, cases, and warming up.

Kernels are compiled ahead of the measurements by processes that share the disk caches of Triton and
Inductor, all at once: one process would compile them one after the other, for minutes.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A CPU shows that the parts work, in tests."""

Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = (
    (2048, 4096, 14336),
    (8192, 1024, 3584),
    (8192, 2048, 5632),
    (8192, 4096, 14336),
    (4096, 8192, 28672),
)
RECIPES = ("bf16", "current", "delayed", "blocks")


@dataclass(frozen=True)
class Options:
    """What to measure. repeats: samples of device time; walls: samples of wall time."""

    sizes: tuple[Size, ...] = SIZES
    recipes: tuple[str, ...] = RECIPES
    peers: bool = True
    without: tuple[str, ...] = ()
    repeats: int = 7
    walls: int = 5


class Case(NamedTuple):
    """One record to be measured. seconds: what it takes, about, once kernels are compiled."""

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


class Task(NamedTuple):
    """A function of a module, to be called in another process: it compiles what a case will use."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give the GPU's memory back, for what comes next."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def share_caches() -> None:
    """Settings that this process and its children need alike, for the caches to be shared."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # each profile would start it anew


def _alone(folder: str) -> None:
    """Keep what a child measures beside others, such as the fastest products, out of the cache."""
    os.environ["XDG_CACHE_HOME"] = folder


def _run(task: Task) -> str | None:
    try:
        task.function(*task.arguments)
    except ModuleNotFoundError:  # the measurement says so
        return None
    except Exception as error:
        return f"{task.name}: {type(error).__name__}: {str(error).strip()[:200]}"
    finally:
        free()
    return None


def warm(tasks: Sequence[Task], jobs: int, limit: float) -> list[str]:
    """Run tasks in `jobs` processes for at most `limit` seconds; returns what went wrong."""
    if not tasks or jobs < 1:
        return []
    context, deadline = get_context("spawn"), time.monotonic() + limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _alone, (folder,))
        futures: dict[Future[str | None], Task] = {pool.submit(_run, task): task for task in tasks}
        wait(futures, max(0.0, deadline - time.monotonic()))
        late = [task.name for future, task in futures.items() if not future.done()]
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=not late, cancel_futures=True)
        for process in processes if late else []:
            process.terminate()
            process.join(5)
    told = [f"{name}: no time left to compile it ahead" for name in late]
    for future, task in futures.items():
        if task.name in late:
            continue
        error = future.exception()
        found = f"{task.name}: {error!r}" if error else future.result()
        if found:
            told.append(found)
    return told
