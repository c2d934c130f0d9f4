"""`python -m opsgraph tune`: finds the module, shows progress, tells what was measured."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from ..base.errors import OpError
from ..kernels.choices import Choices, kept
from ..precision import recipe as recipes
from ..precision.autocast import autocast
from .measure import made, tune

RECIPES = {
    "current": recipes.Float8CurrentScaling,
    "delayed": recipes.DelayedScaling,
    "blocks": recipes.Float8BlockScaling,
    "mxfp8": recipes.MXFP8BlockScaling,
    "nvfp4": recipes.NVFP4BlockScaling,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ABOUT = "Measure products, launch configurations and plans of a module, and keep what is fastest."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("target", nargs="?", metavar="MODULE:OBJECT", help="a module, or what returns one")
    add("--rows", type=int, action="append", default=[], metavar="N", help="rows of the input")
    add("--width", type=int, metavar="N", help="of the input, where the module does not tell")
    add("--recipe", choices=RECIPES, help="to run in opsgraph.autocast with")
    add("--autocast", choices=DTYPES, help="to run in torch.autocast with")
    add("--forget", action="store_true", help="remove what is kept; with MODULE: measure it again")


def run(args: argparse.Namespace) -> Iterable[str]:
    """The lines that the command prints. Raises OpsgraphError."""
    if args.target is None:
        if not args.forget:
            raise OpError("tune", "nothing", "MODULE:OBJECT, or --forget")
        return _forget()
    if not args.rows or min(args.rows) < 1:
        raise OpError("tune", f"--rows {args.rows or 'left out'}", "--rows N, once or more")
    module, began = found(args.target), time.time()
    before = Choices.renewed
    Choices.renewed = began if args.forget else before
    try:
        with progress() as told:
            tune(module, args.rows, args.width, partial(_context, args, module), told)
    finally:
        Choices.renewed = before
    return _report(began)


def found(target: str, who: str = "tune") -> nn.Module:
    """The module that `MODULE:OBJECT` names; a class or a function is called without arguments.

    who: the command that asks, in errors. Raises OpError.
    """
    name, colon, path = target.partition(":")
    if not (name and colon and path):
        raise OpError(who, repr(target), "MODULE:OBJECT, as package.module:name")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(name)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        raise OpError(who, str(error), "MODULE:OBJECT that can be imported") from error
    if callable(value) and not isinstance(value, nn.Module):
        value = value()
    if not isinstance(value, nn.Module):
        raise OpError(target, f"a {type(value).__name__}", "a module, or what returns one")
    return value


def _context(args: argparse.Namespace, module: nn.Module) -> ExitStack:
    stack = ExitStack()
    device = next((p.device.type for p in module.parameters()), "cpu")
    if args.autocast:
        stack.enter_context(torch.autocast(device, DTYPES[args.autocast]))
    if args.recipe:
        stack.enter_context(autocast(recipe=RECIPES[args.recipe]()))
    return stack


@contextmanager
def progress(who: str = "tune") -> Iterator[Callable[[str], object]]:
    """Shows what is done next, on the standard error; with a bar where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text: print(f"{who}: {text}", file=sys.stderr)
        return
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=text)


def _report(began: float) -> Iterator[str]:
    results = made(began)
    changed = [m for m in results if m.choice.name != m.choice.usual]
    yield f"measured {len(results)}, of which {len(changed)} are faster than the usual"
    for kept_by, key, choice in results:
        if choice.name == choice.usual:
            yield f"  {kept_by.kind}  {key}: {choice.name}, as usual"
        else:
            time_ = f"{choice.ratio:.2f} of the time"
            yield f"  {kept_by.kind}  {key}: {choice.usual} -> {choice.name}, {time_}"
    for path in sorted({str(next(iter(m.choices.files()), "")) for m in results}):
        yield f"kept in {path}"


def _forget() -> Iterator[str]:
    for file in kept():
        try:
            file.path.unlink()
        except OSError as error:
            yield f"not removed: {file.path}: {error.strerror}"
            continue
        yield f"removed {len(file.choices)} of {file.kind}: {file.path}"


def shown() -> Iterator[tuple[str, ...]]:
    """What is kept, for `doctor`: kind, how many, for which machine, where."""
    for file in kept():
        yield file.kind, str(len(file.choices)), ", ".join(file.machine), str(file.path)
