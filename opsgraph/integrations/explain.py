"""`python -m opsgraph explain`: the plans of a module, or what `patch` does to a model."""

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..base.errors import OpError
from ..layernorm_mlp import LayerNormMLP
from ..op import Op
from ..run.sequential import Sequential
from ..tune.command import found
from .transformers import patch

ABOUT = "Print the plans of a module, or those that a model of transformers gets by patching it."
_LAYERS = "num_hidden_layers", "encoder_layers", "decoder_layers"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    what = "a module, or what returns one; or a config.json of transformers, its folder, its name"
    add = parser.add_argument
    add("target", metavar="MODULE:OBJECT or CONFIG", help=what)
    add("--inference", action="store_true", help="plans of calls without gradients")
    add("--html", type=Path, metavar="FOLDER", help="write each plan as a page, too")
    add("--layers", type=int, default=2, metavar="N", help="of a config's layers make the first N")


def run(args: argparse.Namespace) -> Iterator[str]:
    """The lines that the command prints. Raises OpsgraphError."""
    if args.layers < 1:
        raise OpError("explain", f"--layers {args.layers}", "at least 1")
    named = ":" in args.target and not Path(args.target).exists()
    module = found(args.target, "explain") if named else _made(args.target, args.layers)
    plans: dict[str, tuple[Any, list[str]]] = {}
    for name, part in _parts(module, ""):
        plan = part.plan(training=not args.inference)
        plans.setdefault(str(plan), (plan, []))[1].append(name)
    for text, (plan, names) in plans.items():
        yield from (", ".join(names), text, "")
        if args.html:
            yield from _written(plan, args.html / f"{names[0]}.html")
    if not plans:
        yield str(patch(module))


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """What has plans, by its name; an op that is called alone is a sequence of one."""
    if isinstance(module, (Sequential, LayerNormMLP, Op)):
        yield (
            name or type(module).__name__,
            Sequential(module) if isinstance(module, Op) else module,
        )
        return
    for key, child in module.named_children():
        yield from _parts(child, f"{name}.{key}" if name else key)


def _written(plan: Any, path: Path) -> Iterator[str]:
    """Pages of a plan, or of each of several; says where they are."""
    several = isinstance(plan, tuple)
    for number, one in enumerate(plan if several else (plan,)):
        place = path.with_name(f"{path.stem}-{number}.html") if several else path
        one.draw(place)
        yield f"wrote {place}"


def _made(target: str, layers: int) -> nn.Module:
    """A model of a config, of random weights and with so many of its layers. Raises OpError."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise OpError("explain", target, "MODULE:OBJECT, or transformers to be installed") from None
    if target.endswith(".json") and not Path(target).is_file():
        raise OpError("explain", target, "a config.json that is there")
    try:
        config = transformers.AutoConfig.from_pretrained(target)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for name in _LAYERS:
                if isinstance(count := getattr(part, name, None), int):
                    setattr(part, name, min(count, layers))
            if types := getattr(part, "layer_types", None):
                part.layer_types = types[:layers]
        return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise OpError(
            "explain", f"{target}: {first}", "a config that makes a model, or MODULE:OBJECT"
        ) from error
