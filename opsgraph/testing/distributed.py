"""Run a test body on N Gloo ranks of one machine: `run(body, 4, *args)`, or `Ranks` for many.

Ranks are spawned processes that the parent commands through pipes. The store through which they
meet is the parent's own and has taken its port before any rank starts, so there is no race for it.
Starting a rank imports torch, which takes seconds: a `Ranks` keeps its processes from body to body,
and each body gets a process group of its own.
"""

import faulthandler
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which, imported while there is a group, keeps its threads past its end
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

START_LIMIT = 300.0
"""Seconds for a rank to start and import torch, which a busy machine makes slow."""

GRACE = 1.0
"""Seconds between the first failure, or the time limit, and the end of the other ranks."""


class RankError(RuntimeError):
    """A rank raised, died or hung. The message holds its traceback; `ranks` says which failed."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


def run(body: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `body(rank, size, *args)` on `size` fresh ranks and return what each returned, by rank.

    The body is a function that a module defines at its top level; a script that calls `run` does so
    under `if __name__ == "__main__"`. Arguments and results are pickled, tensors by value.
    In the body the default process group is a Gloo group of all ranks, with NCCL for CUDA tensors
    where there is a device for each, and torch has one thread.
    `timeout` is in seconds and counts from when every rank has started.

    Raises RankError if a rank raises, dies or is not done in time; every rank has ended by then.
    """
    with Ranks() as ranks:
        return ranks.run(body, size, *args, timeout=timeout)


@dataclass
class _Rank:
    """What the parent holds of one rank: its process, a pipe to it, where it dumps stacks."""

    process: BaseProcess
    pipe: Connection
    dump: Path
    started: bool = False


@dataclass
class _Outcome:
    """What a body gave: results by rank, and failures in the order in which they came."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


class Ranks:
    """Ranks that stay between bodies: a context manager whose exit ends every process.

    They start when a body first needs them; a body of size 2 runs on the first two of four. After a
    failure all are ended, and the next body starts fresh ones. Their Python state lives as long as
    they do: a body puts back what it changes. As a pytest fixture::

        @pytest.fixture(scope="session")
        def ranks():
            with Ranks() as ranks:
                yield ranks
    """

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._bodies = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: TCPStore | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks that are there."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid]

    def close(self) -> None:
        """End every rank at once; a later `run` starts fresh ones."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
            rank.pipe.close()
        self._ranks, self._store = [], None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def run(
        self, body: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0
    ) -> list[Any]:
        """As the function `run`, on the ranks that are there and those still missing."""
        task = _pickled(body, args)
        try:
            self._start(size)
            self._bodies += 1
            for rank in self._ranks[:size]:
                _send(rank.pipe, (self._bodies, size, timeout, sys.path, task))
            outcome = self._wait(size, timeout)
        except BaseException:
            self.close()  # interrupted: the ranks may be in the middle of anything
            raise
        if len(outcome.results) < size:
            error = self._error(outcome, size, timeout)
            self.close()
            raise error
        return [outcome.results[rank] for rank in range(size)]

    def _start(self, size: int) -> None:
        """Spawn the ranks that are missing and wait until every one has imported torch."""
        if self._store is None or self._folder is None:
            local = "127.0.0.1"
            self._store = TCPStore(local, 0, is_master=True, wait_for_workers=False)
            self._folder = tempfile.TemporaryDirectory(prefix="opsgraph-ranks-")
        spawn = get_context("spawn")
        for number in range(len(self._ranks), size):
            ours, theirs = spawn.Pipe()
            dump = Path(self._folder.name, f"rank{number}")
            process = spawn.Process(
                target=_serve,
                args=(theirs, number, self._store.port, str(dump)),
                name=f"rank {number}",
                daemon=True,
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._ranks.append(_Rank(process, ours, dump))
        deadline = time.monotonic() + START_LIMIT
        for number, rank in enumerate(self._ranks):
            if not rank.started:
                ready = rank.pipe.poll(deadline - time.monotonic())
                if not ready or not _received(rank.pipe):
                    raise RankError(f"rank {number} did not start", (number,))
                rank.started = True

    def _wait(self, size: int, timeout: float) -> _Outcome:
        """Gather results until all are there, a rank fails or the time is up."""
        outcome = _Outcome()
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks[:size])}
        deadline = time.monotonic() + timeout + GRACE
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                number = waiting.pop(pipe)
                message = _received(pipe)
                if message is None:
                    outcome.failures[number] = self._death(number)
                elif message[0]:
                    outcome.results[number] = pickle.loads(message[1])
                else:
                    outcome.failures[number] = message[1]
            if ready and outcome.failures:
                deadline = min(deadline, time.monotonic() + GRACE)
            elif not ready:
                break
        return outcome

    def _death(self, number: int) -> str:
        process = self._ranks[number].process
        process.join()
        code = process.exitcode
        if code is not None and code < 0:
            return f"killed by signal {-code}"
        return f"ended with exit code {code} before the body did"

    def _error(self, outcome: _Outcome, size: int, timeout: float) -> RankError:
        """One message of all failures; of ranks that hang, where, if no rank failed before."""
        failures = dict(outcome.failures)
        if not failures:
            for number in sorted(set(range(size)) - set(outcome.results)):
                dump = self._ranks[number].dump.read_text()
                failures[number] = f"not done after {timeout:g} s\n{dump}"
        told = [f"rank {number} of {size}: {text}" for number, text in failures.items()]
        return RankError("\n".join(told), tuple(failures))


def _pickled(body: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((body, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        name = getattr(body, "__qualname__", repr(body))
        raise TypeError(
            f"{name}: got a body or arguments that cannot be pickled ({error}), "
            "expected a function at a module's top level"
        ) from error


def _send(pipe: Connection, command: tuple[Any, ...]) -> None:
    """Send to a rank; if it is dead, `_wait` will see that."""
    try:
        pipe.send(command)
    except (BrokenPipeError, ConnectionResetError):
        return


def _received(pipe: Connection) -> Any:
    """The next message, or None where the other side has ended."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _serve(pipe: Connection, rank: int, port: int, dump: str) -> None:
    """A rank: run one body after the other until the parent ends it or itself ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        # The machine's own name may not resolve, or resolve to a slow interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, is_master=False)
    pipe.send("started")
    while command := _received(pipe):
        body, size, timeout, sys.path[:], task = command
        with open(dump, "w") as stacks:
            faulthandler.dump_traceback_later(timeout, file=stacks)
            pipe.send(_result(task, rank, size, timeout, PrefixStore(f"body {body}", store)))
            faulthandler.cancel_dump_traceback_later()


def _follow_parent() -> None:
    """End with the parent, even one that was killed while this rank waits in a collective."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _result(task: bytes, rank: int, size: int, timeout: float, store: Store) -> tuple[bool, Any]:
    """(True, the pickled result) or (False, the traceback).

    The last body's group is destroyed here, not behind that body: by now every rank is out of it.
    """
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Longer than the parent waits, whose message says of every rank where it hangs.
        patience = timedelta(seconds=2 * timeout + 10)
        enough = torch.cuda.device_count() >= size and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if enough else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        body, args = pickle.loads(task)
        return True, pickle.dumps(body(rank, size, *args))
    except BaseException:
        return False, traceback.format_exc()
