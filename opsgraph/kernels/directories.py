"""The user's cache directory: of compiled kernels and of what was measured.

No other user may be able to write there: `private` says so, and what is not private is not used. It
is `$XDG_CACHE_HOME/opsgraph`, by default `~/.cache/opsgraph`, and where that cannot be written
or is full, a private one below the system's temporary directory.
"""

import errno
import os
import stat
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


ROOT = 0
"""A user whose files count as one's own: a system's, or those of an image."""
NOT_PRIVATE = "belongs to another user or is writable by others"


def private(path: Path) -> bool:
    """Whether no other user can have made the file, or can put another one in its place.

    Raises OSError where there is none.
    """
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    above = [parent.stat().st_mode for parent in path.parents]
    exposed = any(mode & stat.S_IWOTH and not mode & stat.S_ISVTX for mode in above)
    return found.st_uid in (os.getuid(), ROOT) and not found.st_mode & 0o022 and not exposed


def read(path: Path) -> str:
    """The text of a file, whose directory is private too. Raises OSError, also where one is not."""
    for part in (path.parent, path):
        if not private(part):
            raise PermissionError(errno.EACCES, NOT_PRIVATE, str(part))
    return path.read_text()


def replace(path: Path, content: bytes) -> None:
    """Write a file as a whole, making its directory if need be.

    Raises OSError, also for a directory that is not private.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not private(path.parent):
        raise PermissionError(errno.EACCES, NOT_PRIVATE, str(path.parent))
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
