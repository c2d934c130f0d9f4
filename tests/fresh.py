"""Processes that are forked from one that has imported what they need, which takes seconds."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "opsgraph.testing.distributed",
        "opsgraph.integrations.transformers",
        "torch._dynamo.testing",
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "quick_torch",
    ]
)
LIMIT = 240
"""Seconds that a script may take."""


class Done(NamedTuple):
    """What a script left: its exit code, and what it wrote."""

    code: int | None
    output: str
    error: str


class Started(NamedTuple):
    """A script that runs in a process of its own."""

    process: Any
    files: tuple[Path, Path]

    def done(self) -> Done:
        """Wait for its end."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        output, error = (file.read_text(encoding="utf-8") for file in self.files)
        return Done(self.process.exitcode, output, error)


def start(
    script: str | Path, folder: Path, environment: Mapping[str, str] | None = None, *arguments: str
) -> Started:
    """Run a script, or its text, as `__main__`; what it writes is kept in `folder`.

    environment: all of its variables, those of this process where there are none.
    """
    number = len(list(folder.glob("output*.txt")))
    files = folder / f"output{number}.txt", folder / f"error{number}.txt"
    for file in files:
        file.touch()
    if isinstance(script, str):
        path = folder / f"script{number}.py"
        path.write_text(script, encoding="utf-8")
    else:
        path = script
    given = path, files, dict(os.environ if environment is None else environment), arguments
    process = context.Process(target=_run, args=given)
    process.start()
    return Started(process, files)


def run(
    script: str | Path, folder: Path, environment: Mapping[str, str] | None = None, *arguments: str
) -> Done:
    """`start`, and wait for its end."""
    return start(script, folder, environment, *arguments).done()


def _run(
    path: Path, files: tuple[Path, Path], environment: dict[str, str], arguments: tuple[str, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it is that of the variables now
    for stream, name in enumerate(files, 1):
        with name.open("w") as file:
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    sys.argv[:] = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
