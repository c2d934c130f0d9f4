"""Processes that are forked from one that has imported what they need, which takes seconds."""

import multiprocessing
import os
import runpy
from pathlib import Path
from typing import NamedTuple

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
    ]
)


class Done(NamedTuple):
    """What a script left: its exit code, and all that it wrote."""

    code: int | None
    output: str


def run(script: str, folder: Path, environment: dict[str, str] | None = None) -> Done:
    """Run a script as `__main__`; it and its output are files in `folder`."""
    path, output = folder / "script.py", folder / "output.txt"
    path.write_text(script, encoding="utf-8")
    process = context.Process(target=_run, args=(path, output, environment or {}))
    process.start()
    process.join()
    return Done(process.exitcode, output.read_text(encoding="utf-8"))


def _run(path: Path, output: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    runpy.run_path(str(path), run_name="__main__")
