"""Libraries of C++ kernels: compiled at first use, kept in a cache directory of the user's.

There is one for each .cpp file of `source`, so that they are compiled at the same time, and only
where they are needed. A file's name tells from what it was made (sources, compiler, flags, CPU) and
the digest of its own bytes: `norms-KEY-DIGEST.so`. It appears by a rename, so processes that start
at the same time may each compile, and none sees half a file. A file whose bytes are not what its
name says is made again, and so is one that another user could have put there. The directory is
the user's cache directory (`directories`), and where that cannot be written, is full or does not
let libraries be loaded, a private one below the system's temporary directory.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..directories import directories, private, replace

SOURCES = Path(__file__).parent / "source"
EVERYDAY = ("norms", "activations", "transpose", "product")
"""The libraries of the kernels that plans have without recipes."""
CPUINFO = Path("/proc/cpuinfo")
# -O3 compiles for longer and makes nothing faster: loops that are to be unrolled say so.
# No -ffast-math: linked, it has the whole process flush denormals to zero; inf and NaN get lost.
# Contraction is off because sources say themselves where a multiply-add is fused (scalar.h).
FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-shared", "-fPIC", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd",
)  # fmt: skip
# On ARM the vectors are those that all of them have, NEON's: for SVE's, whose length it does not
# know, GCC leaves sums scalar.
TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-mtune=native",), ())
"""Flags for this machine's vectors: on x86, on ARM, elsewhere; the first that the compiler takes.

A compiler's command that names a machine itself (-march, -mcpu) gets none of them.
"""
TIMEOUT = 300
"""Seconds after which a compiler counts as one that does not work."""

_locks: dict[str, threading.Lock] = {}


def _renew_locks() -> None:
    _locks.update({path.stem: threading.Lock() for path in SOURCES.glob("*.cpp")})


_renew_locks()
if hasattr(os, "register_at_fork"):  # a thread that holds one is not there in the child
    os.register_at_fork(after_in_child=_renew_locks)
_found: dict[str, ctypes.CDLL | str] = {}


class BuildError(Exception):
    """Why there is no library."""


def library(name: str) -> ctypes.CDLL:
    """A loaded library, compiled if need be. Raises BuildError, with the reason, every time."""
    with _locks[name]:
        if name not in _found:
            try:
                _found[name] = _load(name)
            except BuildError as error:
                _found[name] = str(error)
    found = _found[name]
    if isinstance(found, str):
        raise BuildError(found)
    return found


def reason(name: str) -> str | None:
    """Why a library is not there, or None where it is."""
    try:
        library(name)
    except BuildError as error:
        return str(error)
    return None


def why_not() -> str | None:
    """Why one of the `EVERYDAY` libraries is not there, or None; they are compiled side by side."""
    with ThreadPoolExecutor(len(EVERYDAY)) as pool:
        return next(filter(None, pool.map(reason, EVERYDAY)), None)


def compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX`, or the first of c++, g++ and clang++ there is.

    `$CXX` may have arguments. Raises BuildError.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    for name in [given[0]] if given else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return [path, *given[1:]]
    looked = f"CXX={given[0]} is not found" if given else "none of c++, g++ and clang++ is found"
    raise BuildError(f"no C++ compiler: {looked}")


def _load(library: str) -> ctypes.CDLL:
    command = compiler()
    name = f"{library}-{_key(command)}"
    for directory in directories():
        for path in sorted(directory.glob(f"{name}-*.so")):
            with suppress(OSError):  # what cannot be read or loaded is made again
                if _intact(path):
                    return ctypes.CDLL(str(path))
    content = _compiled(library, command)
    failures = []
    for directory in directories():
        path = directory / f"{name}-{_digest(content)}.so"
        try:
            replace(path, content)
            return ctypes.CDLL(str(path))
        except OSError as error:
            failures.append(f"{directory}: {error.strerror or error}")
    raise BuildError(f"the compiled kernels cannot be kept and loaded: {'; '.join(failures)}")


def _intact(path: Path) -> bool:
    """Whether a file is as this user made it, and no other user could have. Raises OSError."""
    ours = private(path.parent) and private(path)
    return ours and path.stem.endswith(f"-{_digest(path.read_bytes())}")


def _compiled(library: str, command: list[str]) -> bytes:
    """A library, compiled among temporary files, for which compilers need room anyway."""
    try:
        with tempfile.TemporaryDirectory(prefix="opsgraph-") as folder:
            made = Path(folder) / f"{library}.so"
            for target in _targets(command):
                source = str(SOURCES / f"{library}.cpp")
                reason = _compile([*command, *FLAGS, *target, source, "-o", str(made)])
                if reason is None and _whole(content := made.read_bytes()):
                    return content
    except OSError as error:
        reason = str(error)
    raise BuildError(f"the C++ compiler {command[0]} failed: {reason}")


def _whole(content: bytes) -> bool:
    """Whether a library is there to its end. Raises BuildError: a part could end the process.

    The last part of an ELF file is its table of sections, of which the header tells the place.
    """
    if content[:5] != b"\x7fELF\x02":
        return True  # no ELF of 64 bits: the system's loader looks at its length
    header = content[:64].ljust(64, b"\0")
    order: Any = "little" if header[5] == 1 else "big"
    start, size, count = (
        int.from_bytes(header[a:b], order) for a, b in ((40, 48), (58, 60), (60, 62))
    )
    if len(content) < max(64, start + size * count):
        raise BuildError(f"the C++ compiler wrote {len(content)} bytes, a part of a library")
    return True


def _targets(command: list[str]) -> Sequence[tuple[str, ...]]:
    return ((),) if any(a.startswith(("-march", "-mcpu")) for a in command) else TARGETS


def _compile(command: list[str]) -> str | None:
    """Run the compiler; returns the first error that it prints, or None. Raises BuildError."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False,
            env={**os.environ, "LC_ALL": "C"},  # in English: errors are found by that word
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:  # with other flags it would not end either
        raise BuildError(f"the C++ compiler {command[0]} did not end within {TIMEOUT} s") from error
    except OSError as error:
        return str(error)
    if run.returncode == 0:
        return None
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [f"exit status {run.returncode}"])[0]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _key(command: list[str]) -> str:
    """What libraries depend on, as a name. A compiler counts by its file, size and date."""
    made = hashlib.sha256(repr((command, FLAGS, TARGETS, _processor())).encode())
    found = os.stat(os.path.realpath(command[0]))
    made.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    for path in sorted(SOURCES.iterdir()):
        made.update(path.read_bytes())
    return made.hexdigest()[:32]


def _processor() -> str:
    """The instruction sets of this machine: a home may be shared by different ones."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # no Linux: macOS tells the chip's family in its version
        return f"{platform.version()} {platform.machine()} {platform.processor()}"
    told = [x for x in lines if x.partition(":")[0].strip() in ("model name", "flags", "Features")]
    return "\n".join([platform.machine(), *told[:2]])
