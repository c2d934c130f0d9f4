"""The user's cache directory: of compiled kernels and of what was measured.

It is `$XDG_CACHE_HOME/opsgraph`, by default `~/.cache/opsgraph`, and where that cannot be written
or is full, a private one below the system's temporary directory.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def directories() -> Iterator[Path]:
    """Where files may be, in order."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # no home
        home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        yield Path(os.path.realpath(home / "opsgraph"))
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    with suppress(FileNotFoundError):  # none that can be written
        # The name itself is not followed: another user may have made a link of it.
        yield Path(os.path.realpath(tempfile.gettempdir())) / f"opsgraph-{user}"


def replace(path: Path, content: bytes) -> None:
    """Write a file as a whole, making its directory if need be. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
