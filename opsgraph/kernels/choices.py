"""Choices between equal computations that are measured once and remembered, in memory and on disk.

A file holds the choices of one kind for one machine: a CPU or GPU model with the versions of what
runs there. It lies in the user's cache directory (`directories`). It is replaced as a whole by
renaming, after what others have written meanwhile is read again. Writers may overwrite each other's
entries, which are then measured again, but no reader ever sees half a file. A file that cannot be
read or written, or that another user could have written, is left out with a warning.
"""

import json
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..guards.torch_private import dispatch_modes
from ..guards.watching import watching
from .directories import directories, read, replace

Run = Callable[[], object]
Measure = Callable[[Mapping[str, Run]], "str | Choice"]
PREFIX = "choices-"


class Choice(NamedTuple):
    """What was chosen. ratio: its time over the usual candidate's. measured: when, in Unix time."""

    name: str
    usual: str
    ratio: float = 1.0
    measured: float = 0.0


class Kept(NamedTuple):
    """A file of choices, as `kept` finds it."""

    path: Path
    kind: str
    machine: tuple[str, ...]
    choices: Mapping[str, Choice]


_making = threading.RLock()


class Choices:
    """Names of candidates by key. All methods may be called by any thread.

    kind: of what, a word. machine: for what they hold. measure: returns the fastest of the
    candidates that it is given. files: where they are kept: read from the first that is there,
    written to the first that can be; with none they are forgotten with the process. forgotten:
    called when choices are forgotten, for those who remember what was made of them.
    """

    renewed = 0.0
    """Choices that were measured before that moment, in Unix time, are made again."""

    def __init__(
        self, kind: str, machine: Callable[[], tuple[str, ...]], measure: Measure,
        files: Callable[[], Iterable[Path]] | None = None,
        forgotten: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.kind, self.machine, self.measure = kind, machine, measure
        self.forgotten = forgotten
        self.files = files if files is not None else self._places
        self._lock = threading.RLock()
        self._found: dict[str, Choice] | None = None
        with _making:
            _all.add(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.RLock()

    def _places(self) -> Iterator[Path]:
        what = sha256(repr((self.kind, self.machine())).encode()).hexdigest()[:16]
        for directory in directories():
            yield directory / f"{PREFIX}{self.kind}-{what}.json"

    def choose(self, key: str, candidates: Callable[[], Mapping[str, Run]]) -> str:
        """The choice for a key; measured, and written to the file, if there is none yet.

        Once made it stays for as long as the process lives, unless it is forgotten. Where nothing
        can be measured (`measurable`) and nothing is known it is the usual one, the first.
        """
        with self._lock:
            found = self._loaded()
            runs = candidates()
            known = found.get(key)
            if known is not None and known.name in runs and known.measured >= self.renewed:
                return known.name
            usual = next(iter(runs))
            if not measurable():
                return usual
            if watching.recorder is not None:
                watching.recorder.refuse("what runs fastest was measured")
            best = self.measure(runs)
            made = best if isinstance(best, Choice) else Choice(best, usual)
            there = self._read()
            # Another process may have measured it meanwhile: all are to compute the same bits.
            other = there.get(key)
            if other is None or other.name not in runs or other.measured < self.renewed:
                there[key] = made._replace(measured=time.time())
                self._write(there)
            found[key] = there[key]
            return found[key].name

    def known(self, key: str) -> str | None:
        """The choice for a key, if there is one; nothing is measured."""
        with self._lock:
            found = self._loaded().get(key)
            return None if found is None or found.measured < self.renewed else found.name

    def all(self) -> dict[str, Choice]:
        """All choices that this process knows."""
        with self._lock:
            return dict(self._loaded())

    def since(self, moment: float) -> dict[str, Choice]:
        """Those that were measured at a moment, in Unix time, or later."""
        return {key: made for key, made in self.all().items() if made.measured >= moment}

    def forget(self, keys: Collection[str] | None = None) -> int:
        """Take choices out of the memory and of the files, all or some. Returns how many.

        Raises OSError where a file cannot be written.
        """
        with self._lock:
            found = self._loaded()
            gone = set(found if keys is None else keys) & set(found)
            self._found = {key: made for key, made in found.items() if key not in gone}
            for path in self.files():
                what, there = _read(path)
                left = {key: made for key, made in there.items() if key not in gone}
                if what and len(left) < len(there):
                    replace(path, self._content(left))
            if gone:
                self.forgotten()
            return len(gone)

    def _loaded(self) -> dict[str, Choice]:
        if self._found is None:
            self._found = self._read()
        return self._found

    def _read(self) -> dict[str, Choice]:
        for path in self.files():
            there, choices = _read(path)
            if there:
                return choices
        return {}

    def _content(self, choices: Mapping[str, Choice]) -> bytes:
        listed = {key: choices[key]._asdict() for key in sorted(choices)}
        what = {"kind": self.kind, "machine": self.machine(), "choices": listed}
        return json.dumps(what, indent=1).encode()

    def _write(self, choices: Mapping[str, Choice]) -> None:
        failures = []
        for path in self.files():
            try:
                replace(path, self._content(choices))
                return
            except OSError as error:
                failures.append(f"{path}: {error.strerror or error}")
        if failures:
            text = "; ".join(failures)
            warnings.warn(f"opsgraph: measured choices are not kept: {text}", stacklevel=2)


def measurable() -> bool:
    """Whether kernels that run now do run: none is traced or captured."""
    if dispatch_modes():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def working(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Those that run, the usual one in any case: others may need more than there is."""
    found = dict[str, Run]()
    for name, run in runs.items():
        try:
            run()
        except Exception:
            if not found:
                raise
            continue
        found[name] = run
    return found


_stores: dict[tuple[str, tuple[str, ...]], Choices] = {}
_all: "weakref.WeakSet[Choices]" = weakref.WeakSet()


def gpu(device: torch.device) -> tuple[str, ...]:
    """A GPU's model, and the versions of CUDA and torch, as a machine's description."""
    chip = torch.cuda.get_device_properties(device)
    versions = f"CUDA {torch.version.cuda or torch.version.hip}", f"torch {torch.__version__}"
    return (chip.name, f"sm_{chip.major}{chip.minor}", *versions)


def store(
    kind: str, machine: tuple[str, ...], measure: Measure,
    forgotten: Callable[[], object] = lambda: None,
) -> Choices:  # fmt: skip
    """The choices of a kind for a machine: the same object for all who ask."""
    with _making:
        if (kind, machine) not in _stores:
            made = Choices(kind, lambda: machine, measure, forgotten=forgotten)
            _stores[kind, machine] = made
        return _stores[kind, machine]


def stores() -> list[Choices]:
    """All that there are in this process."""
    with _making:
        return sorted(_all, key=lambda choices: choices.kind)


def kept() -> list[Kept]:
    """All files of choices that there are, of all kinds and machines."""
    found = []
    for directory in directories():
        for path in sorted(directory.glob(f"{PREFIX}*.json")):
            what, choices = _read(path)
            if what:
                machine = tuple(map(str, what.get("machine", ())))
                found.append(Kept(path, str(what.get("kind", "")), machine, choices))
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Choice]]:
    """What a file says, and its choices; nothing where it is missing, or spoilt, with a warning."""
    try:
        found = json.loads(read(path))
        choices = {key: Choice(**made) for key, made in found["choices"].items()}
        if not all(isinstance(made.name, str) for made in choices.values()):
            raise TypeError
        return found, choices
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = str(error)
    except (TypeError, KeyError, AttributeError):
        why = "it holds no choices"
    warnings.warn(f"opsgraph: {path} is ignored: {why}", stacklevel=2)
    return {}, {}
