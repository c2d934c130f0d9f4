"""`python -m opsgraph`: what is installed (doctor), ops, fusers, plans, measuring, tuning."""

import argparse
import inspect
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from types import UnionType
from typing import Union, get_args, get_origin

import torch

import opsgraph.fusers  # registers the built-in ones
import opsgraph.ops

from .base.backend import backends
from .base.errors import OpsgraphError
from .fuser import Fuser, registered
from .fusers.cublaslt.products import FAMILIES, Family
from .integrations import explain
from .kernels.cpu import build, product
from .kernels.directories import directories
from .op import BACKWARD, FORWARD
from .tune import bench
from .tune import command as tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="opsgraph", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        commands.add_parser(command, help=_summary(_COMMANDS[command]))
    with_arguments = {"explain": explain, "bench": bench, "tune": tune}
    for command, module in with_arguments.items():
        about = module.ABOUT
        module.arguments(commands.add_parser(command, help=about, description=about))
    args = parser.parse_args(argv)
    try:
        given = with_arguments.get(args.command)
        for line in _COMMANDS[args.command]() if given is None else given.run(args):
            print(line)
    except OpsgraphError as error:
        parser.error(str(error))
    return 0


def doctor() -> Iterable[str]:
    """Print versions, devices and each backend: there, or why not."""
    yield "versions"
    yield from _table(
        [
            ("python", platform.python_version()),
            ("opsgraph", _version("opsgraph")),
            ("torch", torch.__version__),  # the metadata of some builds lacks its +cu132
            *((name, _version(name)) for name in ("triton", "networkx")),
        ]
    )
    yield "devices"
    yield from _table(_devices())
    yield "backends"
    yield from _table(
        (backend.name, backend.about, _availability(backend.why_not()))
        for backend in backends().values()
    )
    yield "products of bf16 on the CPU, beside PyTorch's"
    yield from _table((unit, about, _unit(unit)) for unit, about in product.UNITS.items())
    yield "products of quantized operands"
    yield from _table((family.about, _products(family)) for family in FAMILIES)
    yield "measured choices: what, how many, for which machine, where"
    yield from _table([*tune.shown()] or [("none", f"{next(directories())} would hold them")])


def ops() -> Iterable[str]:
    """List the ops, each with what it does."""
    names = sorted(opsgraph.ops.__all__, key=str.lower)
    return _table((name, _summary(getattr(opsgraph.ops, name))) for name in names)


def fusers() -> Iterable[str]:
    """List the registered fusers by backend, with the passes and the ops that each covers."""
    rows = [
        (
            fuser.backend,
            fuser.name,
            _passes(fuser),
            _pattern(fuser.pattern),
        )
        for fuser in registered()
    ]
    return _table(sorted(rows, key=lambda row: row[0]))


_COMMANDS = {"doctor": doctor, "ops": ops, "fusers": fusers}


def _version(package: str) -> str:
    # Read from the installed metadata: importing Triton to ask it takes a while.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterable[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", "no device" if built else "this torch is built without CUDA"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"


def _availability(why_not: str | None) -> str:
    return "there" if why_not is None else f"absent: {why_not}"


def _unit(unit: str) -> str:
    why_not = build.reason("product")
    return _availability(why_not or (None if product.room(unit, 1) else "this CPU has none"))


def _products(family: Family) -> str:
    if backends()["cublaslt"].why_not() is not None:
        return "emulated"
    why_not = family.why_not()
    return "scaled GEMMs" if why_not is None else f"emulated: {why_not}"


def _summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _passes(fuser: Fuser) -> str:
    passes = [name for name in (FORWARD, BACKWARD) if fuser.functions(name)]
    return passes[0] if len(passes) == 1 else "both"


def _pattern(pattern: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_entry(entry)}" for name, entry in pattern.items())


def _entry(entry: object) -> str:
    """A pattern's entry as its author wrote it: an op, a union of ops, or an optional one."""
    if entry is None or entry is type(None):
        return "None"
    if get_origin(entry) in (UnionType, Union):
        return " | ".join(_entry(member) for member in get_args(entry))
    return entry.__name__ if isinstance(entry, type) else repr(entry)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of each column aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
