"""Tables of wrong uses: text files of expressions, each with the error that it has to raise.

    [setup; of a section]
    m(None)
        OpError: input: got None, expected a tensor [*, 8]

An expression, or statements, run after the section's setup. The message may leave out parts, as
` ... `, and lines after the first. A row of statements that assign changes what is there itself;
any other must leave all modules and tensors of its section as they were.
"""

import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops, parallel, quantizers, recipe
from opsgraph.__main__ import main
from opsgraph.integrations.transformers import patch, unpatch

FOLDER = Path(__file__).parent / "bad_input"


class Row(NamedTuple):
    """A wrong use. error: the type's name; parts: what the message holds, in this order.

    whole: whether that is all of its first line.
    """

    section: str
    setup: str
    code: str
    error: str
    parts: tuple[str, ...]
    whole: bool

    @property
    def assigns(self) -> bool:
        """Whether the row itself changes something."""
        return " = " in self.code or self.code.startswith(("del ", "m +="))


def rows(name: str) -> Iterator[Row]:
    """The rows of a file."""
    section = setup = code = ""
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            section = line.removeprefix("# ")
        elif not line.strip():
            continue
        elif line.startswith("["):
            setup = line[1 : line.rindex("]")]
        elif line.startswith("    "):
            error, _, text = line.strip().partition(": ")
            parts = tuple(part.strip() for part in text.split("...") if part.strip())
            assert parts, f"{code}: the table names no part of the message"
            yield Row(section, setup, code, error, parts, "..." not in text)
        else:
            code = line


def fuser(**declared: Any) -> type[og.Fuser]:
    """A class of fusers of one GELU, but for what is declared otherwise."""
    usual = {"backend": "cpu", "pattern": {"a": ops.GELU}, "fwd": lambda self, x: (x, ())}
    return type("F", (og.Fuser,), usual | declared)


def call(module: Any, x: Tensor, under: Any) -> Any:
    """A call under a recipe."""
    with og.autocast(recipe=under):
        return module(x)


def step(module: Any, x: Tensor, under: Any = None) -> None:
    """A call and its backward."""
    with og.autocast(under is not None, under):
        module(x).sum().backward()


def command(*arguments: str) -> None:
    """`python -m opsgraph`, whose complaint becomes an error."""
    complaint = StringIO()
    try:
        with redirect_stderr(complaint), redirect_stdout(StringIO()):
            main(arguments)
    except SystemExit as error:
        raise ValueError(complaint.getvalue().strip().splitlines()[-1]) from error


def under(**environment: str) -> Any:
    """A plan that is made under environment variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return og.Sequential(ops.GELU())(torch.ones(2, 2))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def names() -> dict[str, Any]:
    """What expressions may name."""
    return {
        "og": og, "ops": ops, "recipe": recipe, "quantizers": quantizers, "parallel": parallel,
        "patch": patch, "unpatch": unpatch, "torch": torch, "nn": nn, "np": np, "NAN": torch.nan,
        "INF": torch.inf, "fuser": fuser, "call": call, "step": step,
        "command": command, "under": under,
    }  # fmt: skip


def run(code: str, environment: dict[str, Any]) -> None:
    """Evaluate an expression, or execute statements."""
    try:
        compiled = compile(code, code, "eval")
    except SyntaxError:
        compiled = compile(code, code, "exec")
    eval(compiled, environment)


class State:
    """All that modules and tensors of a section are: bytes, settings, which objects."""

    def __init__(self, environment: dict[str, Any]) -> None:
        values = {k: v for k, v in environment.items() if not k.startswith("_")}
        self.tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        found = [v for v in values.values() if isinstance(v, nn.Module)]
        self.modules = [*dict.fromkeys(part for module in found for part in module.modules())]
        kept = [(part, _plain(part)) for part in self.modules]
        self.kept = [(p, plain | {"channels": p.__dict__.get("channels")}) for p, plain in kept]
        self.places = [
            (part, name, p, p.detach().clone(), p.requires_grad)
            for part in self.modules
            for name, p in part._parameters.items()
            if p is not None
        ]
        self.seen = self.look()

    def look(self) -> list[Any]:
        """What can be compared."""
        own = [(name, _bytes(value)) for name, value in self.tensors.items()]
        for part in self.modules:
            own += [(id(child), name) for name, child in part._modules.items()]
            own += [
                (id(p), name, _bytes(p), _bytes(p.grad), _bytes(getattr(p, "main_grad", None)))
                for name, p in (*part._parameters.items(), *part._buffers.items())
                if p is not None
            ]
            own.append(repr(_plain(part)))
        return own

    def restore(self) -> None:
        """Undo what a row assigned."""
        for part, name, p, value, wanted in self.places:
            if part._parameters.get(name) is not p:
                setattr(part, name, p)
            p.requires_grad_(wanted)
            if p.shape != value.shape:
                p.data = value.clone()
            size = value.untyped_storage().nbytes()
            if p.untyped_storage().nbytes() < size:
                p.untyped_storage().resize_(size)
            with torch.no_grad():
                p.copy_(value)
        for part, plain in self.kept:
            for name, value in plain.items():
                if name in vars(part) and vars(part)[name] is not value:
                    setattr(part, name, value)


def _plain(part: nn.Module) -> dict[str, Any]:
    skipped = {*vars(nn.Module()), "channels"}
    return {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in skipped}


def _bytes(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return id(value)
    if not value.untyped_storage().nbytes():
        return "freed"
    return value.dtype, value.shape, bytes(value.detach().flatten().view(torch.uint8).tolist())
