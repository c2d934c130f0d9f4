"""Blocks of lives, lived in processes of their own; a life that fails is the last of its process.

So what it may have left there, in PyTorch or elsewhere, makes no other life fail. It is shrunk in a
new process, and what comes of that is tried in another one.
"""

import gc
import multiprocessing
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...kernels.cpu import memory
from ...replay import recording
from .known import known
from .lives import Step, live, script, shrink
from .plots import Plot

BLOCK = 5
"""Lives that are told of together."""
MOST = 1500
"""Lives of one process."""
SECONDS = 900.0
"""How long a life may take; a process that is not done by then hangs, and is ended."""
SMALL = 170_000_000
"""The seed from which every other life takes small memory for large: what is kept for later, and
what a stretch of a replay looks at its peak for."""
SIZES = 1, 2**10
"""Bytes of such memory, of either kind."""
_USUAL = memory.LEAST, recording.LARGE


class Failure(NamedTuple):
    """A life that failed; known: the fault of another's that it met, if it is one of `known`."""

    seed: int
    error: str
    script: str
    known: str | None


class Block(NamedTuple):
    """What became of some lives."""

    first: int
    steps: int
    failures: list[Failure]


class Told(NamedTuple):
    """How a life went, in words: kind and text of what it raised, and where."""

    steps: int
    error: str = ""
    where: str = ""
    known: str | None = None


class Worker:
    """A process that does what it is asked to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()
        self.lives = 0

    def ask(self, function: Callable[..., Any], *given: Any) -> Any:
        """What a function returns there; EOFError if the process ends over it."""
        self.lives += 1
        self.pipe.send((function, given))
        if not self.pipe.poll(SECONDS):
            self.process.kill()
        return self.pipe.recv()

    def end(self) -> str:
        """Let the process go; returns how it ended."""
        self.pipe.close()
        self.process.join()
        return f"a process ended with exit code {self.process.exitcode}"


_own = threading.local()
"""The process of a thread."""


def run_block(first: int, device: str) -> Block:
    """Live `BLOCK` lives, from a seed on, in the process of this thread."""
    steps, failures = 0, []
    for seed in range(first, first + BLOCK):
        worker = _own.__dict__.setdefault("worker", None) or Worker()
        told = _asked(worker, _lived, seed, device)
        steps += told.steps
        if told.error:
            failures.append(_failure(seed, device, told))
        _own.worker = worker
        if told.error or worker.lives == MOST:
            worker.end()
            _own.worker = None
    return Block(first, steps, failures)


def _serve(pipe: Any) -> None:
    """Do what comes, until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of widths of 0
    gc.freeze()  # what was imported: collections took a sixth of the time
    while True:
        try:
            function, given = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*given))


def _asked(worker: Worker, function: Callable[..., Told], *given: Any) -> Told:
    try:
        return worker.ask(function, *given)  # type: ignore[no-any-return]
    except EOFError:
        return Told(0, f"EOFError: {worker.end()}")


def resize(seed: int) -> tuple[int, int]:
    """Have a life's sizes in this process, which lives nothing else meanwhile; returns them."""
    memory.LEAST, recording.LARGE = SIZES if _small(seed) else _USUAL
    return memory.LEAST, recording.LARGE


def _small(seed: int) -> bool:
    return seed >= SMALL and seed % 2 == 1


def _lived(seed: int, device: str) -> Told:
    plot = Plot(seed, device=device)
    return _tell(seed, plot.start, plot.steps)


def _tell(seed: int, start: Step, steps: Sequence[Step]) -> Told:
    resize(seed)
    lived = live(start, steps)
    if (error := lived.error) is None:
        return Told(lived.steps)
    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return Told(lived.steps, _said(error), where, known(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _alike(one: str, other: str) -> bool:
    """Whether two errors are of one kind, and begin alike."""
    (kind, _, said), (other_kind, _, other_said) = one.partition(": "), other.partition(": ")
    return kind == other_kind and said[:12] == other_said[:12]


def _shrunk(seed: int, device: str, said: str) -> list[Step] | None:
    """Fewer steps after which the life still fails; None if it does not fail by itself."""
    plot = Plot(seed, device=device)
    if not _alike(_tell(seed, plot.start, plot.steps).error, said):
        return None
    return shrink(plot.start, plot.steps, lambda error: _alike(_said(error), said))


def _failure(seed: int, device: str, told: Told) -> Failure:
    plot = Plot(seed, device=device)
    if told.known is not None:
        return Failure(seed, told.error, program(seed, plot.start, plot.steps), told.known)
    steps, note = _elsewhere(_shrunk, seed, device, told.error), ""
    if steps is None:
        steps, note = plot.steps, "# It failed behind other lives of its process, not by itself.\n"
    elif not _alike(_elsewhere(_tell, seed, plot.start, steps, default=told).error, told.error):
        steps = plot.steps
    text = note + program(seed, plot.start, steps)
    return Failure(seed, f"{told.error}\n{told.where}", text, told.known)


def program(seed: int, start: Step, steps: Sequence[Step]) -> str:
    """A life as a program that runs by itself, with its sizes."""
    if not _small(seed):
        return script(start, steps)
    sizes = f"memory.LEAST, recording.LARGE = {SIZES}"
    imports = "from opsgraph.kernels.cpu import memory\nfrom opsgraph.replay import recording"
    return f"{imports}\n\n{sizes}\n{script(start, steps)}"


def _elsewhere(function: Callable[..., Any], *given: Any, default: Any = None) -> Any:
    """What a function returns in a new process; default: if that ends over it."""
    worker = Worker()
    try:
        return worker.ask(function, *given)
    except EOFError:
        return default
    finally:
        worker.end()
