"""`python -m opsgraph bench`: a sequence on this machine, beside eager PyTorch and torch.compile.

Each candidate runs a step (forward and backward) and an inference, in alternation; medians are
told. Nothing is told of a sequence whose results differ from PyTorch's.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import OpError
from ..layernorm_mlp import LayerNormMLP
from ..ops.activations import SwiGLU
from ..ops.linear import Linear
from ..ops.norms import RMSNorm
from ..ops.residual import Residual
from ..run.sequential import Sequential
from .command import found as named
from .command import progress
from .eager import Eager
from .measure import inputs

ABOUT = "Measure sequences of ops here, beside eager PyTorch and torch.compile: a table and a PNG."
OURS, EAGER, COMPILED = "opsgraph", "PyTorch", "torch.compile"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALLOWED = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}
"""How far results may be from PyTorch's, in times of the largest."""
ROUNDS = 5, 100
Part = Sequential | LayerNormMLP
NEWLINE = "\n"


class Result(NamedTuple):
    """Of one candidate: median seconds of a step and of an inference, bytes kept for a backward."""

    step: float
    inference: float
    saved: int


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("target", nargs="?", metavar="MODULE:OBJECT", help="a module, or what returns one")
    add("--mlp", metavar="H,F", help="instead: RMSNorm, Linear, SwiGLU, Linear of these widths")
    add("--rows", type=int, default=2048, metavar="N", help="rows of the input")
    add("--width", type=int, metavar="N", help="of the input, where the module does not tell")
    add("--dtype", choices=DTYPES, help="by default as the module is, and bfloat16 for --mlp")
    add("--device", help="by default where the module is, and the GPU, if there is one, for --mlp")
    add("--seconds", type=float, default=20.0, help="for measuring, compiling apart")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--png", type=Path, default=Path("bench.png"), help="where the picture goes")


def run(args: argparse.Namespace) -> Iterator[str]:
    """The lines that the command prints. Raises OpsgraphError."""
    if (args.target is None) == (args.mlp is None):
        raise OpError("bench", f"{args.target} and --mlp {args.mlp}", "one of the two")
    if args.rows < 1:
        raise OpError("bench", f"--rows {args.rows}", "at least 1")
    module = built(args.mlp) if args.target is None else named(args.target, "bench")
    default = "cuda" if args.mlp and torch.cuda.is_available() else None
    dtype = DTYPES[args.dtype or "bfloat16"] if args.dtype or args.mlp else None
    module.to(device=args.device or default, dtype=dtype)
    sequences = [*_sequences(module)]
    if not sequences:
        expected = "a Sequential or a LayerNormMLP in it"
        raise OpError("bench", type(module).__name__, expected)
    counts = Counter(map(repr, sequences))
    chosen = {repr(sequence): sequence for sequence in sequences}
    results: dict[str, dict[str, Result]] = {}
    notes: list[str] = []
    with progress("bench") as told:
        for key, sequence in chosen.items():
            title = ", ".join(map(_named, _ops(sequence)))
            title += f" ({counts[key]} times)" if counts[key] > 1 else ""
            rounds = args.seconds / len(chosen)
            compiles = not args.no_compile
            results[title] = measured(
                sequence, args.rows, args.width, rounds, compiles, told, notes
            )
    parameter = next(module.parameters(), torch.empty(0))
    dtype_name = str(parameter.dtype).removeprefix("torch.")
    yield f"{args.rows} rows, {dtype_name}, {_machine(parameter.device)}"
    for title, result in results.items():
        yield from _told(title, result, args.rows)
    yield from notes
    yield _draw(results, args.png)


def built(sizes: str) -> Sequential:
    """The MLP of `--mlp H,F`. Raises OpError for what is no two sizes."""
    try:
        hidden, ffn = map(int, sizes.split(","))
        if min(hidden, ffn) < 1:
            raise ValueError
    except ValueError:
        raise OpError("bench", f"--mlp {sizes}", "two sizes, as --mlp 1024,4096") from None
    return Sequential(
        RMSNorm(hidden),
        Linear(hidden, 2 * ffn, bias=False),
        SwiGLU(),
        Linear(ffn, hidden, bias=False),
    )


def measured(
    sequence: Part,
    rows: int,
    width: int | None,
    seconds: float,
    compiles: bool,
    told: Callable[[str], object],
    notes: list[str],
) -> dict[str, Result]:
    """A result for each candidate. Raises OpError if the sequence's results are not PyTorch's.

    compiles: with torch.compile. told: is called with what is done next. notes: takes what failed.
    """
    eager = Eager(*_ops(sequence))
    parameters = [p for p in sequence.parameters() if p.requires_grad]
    x, *extras = inputs(sequence, rows, width)
    if extras:
        raise OpError("bench", "a sequence with extra inputs", "one that takes x alone")
    _compare(sequence, eager, x, parameters)
    modules: dict[str, Any] = {OURS: sequence, EAGER: eager}
    if compiles:
        told("compiling")
        modules[COMPILED] = torch.compile(eager)
    calls: dict[tuple[str, str], Call] = {}
    saved = {}
    for name, module in modules.items():
        both = {
            (name, "step"): Call(module, True, _stepping(module, x, parameters)),
            (name, "inference"): Call(module, False, _inferring(module, x)),
        }
        try:
            for call in both.values():
                call.prepared()()
            saved[name] = _saved_bytes(module.train(), x, parameters)
        except Exception as error:
            if name != COMPILED:
                raise
            notes.append(f"{name} failed: {str(error).strip().partition(NEWLINE)[0]}")
        else:
            calls |= both
    medians = _medians(calls, seconds, x.device, told)
    return {
        name: Result(medians[name, "step"], medians[name, "inference"], saved[name])
        for name in saved
    }


def _named(module: nn.Module) -> str:
    name = type(module).__name__
    inner = module.ops if isinstance(module, Residual) else ()
    return f"{name}({', '.join(map(_named, inner))})" if inner else name


def _ops(part: Part) -> Iterable[nn.Module]:
    return part if isinstance(part, Sequential) else part._built()[0]


def _sequences(module: nn.Module) -> Iterator[Part]:
    if isinstance(module, (Sequential, LayerNormMLP)):
        yield module
        return
    if type(module) is nn.Sequential:
        yield Sequential.from_torch(module)
        return
    for child in module.children():
        yield from _sequences(child)


# -- running --


class Call(NamedTuple):
    """What is timed, and the mode that its module is in."""

    module: nn.Module
    training: bool
    function: Callable[[], object]

    def prepared(self) -> Callable[[], object]:
        """The function, with the module in its mode."""
        self.module.train(self.training)
        return self.function


def _stepping(
    module: nn.Module, x: Tensor, parameters: Sequence[Tensor]
) -> Callable[[], list[Tensor]]:
    """A call of forward and backward; returns y and the gradients, made anew."""
    x = x.detach().requires_grad_()
    dy: list[Tensor] = []

    def run() -> list[Tensor]:
        y = module(x)
        if not dy:
            generator = torch.Generator().manual_seed(0)
            dy.append(torch.randn(y.shape, generator=generator).to(y))
        return [y, *torch.autograd.grad(y, [x, *parameters], dy[0])]

    return run


def _inferring(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    return run


def _compare(ours: nn.Module, eager: nn.Module, x: Tensor, parameters: Sequence[Tensor]) -> None:
    """Raises OpError if y or a gradient is not what PyTorch computes; without dropout."""
    names = ["y", "the gradient of x"]
    names += [f"the gradient of {name}" for name, p in ours.named_parameters() if p.requires_grad]
    pairs = zip(*(_stepping(m.eval(), x, parameters)() for m in (ours, eager)), strict=True)
    for name, (value, other) in zip(names, pairs, strict=True):
        other = other.double()
        gap, scale = (t.abs().amax().item() for t in (value.double() - other, other))
        if not gap <= ALLOWED[x.dtype] * max(scale, 1e-30):
            expected = f"at most {ALLOWED[x.dtype]:g} of its largest value, {scale:.2e}"
            raise OpError("bench", f"{name} that differs from PyTorch's by {gap:.2e}", expected)


def _saved_bytes(module: nn.Module, x: Tensor, parameters: Sequence[Tensor]) -> int:
    """Bytes kept from forward to backward: each storage once, those of parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in (*parameters, *module.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.detach().requires_grad_())
    return sum(storage.nbytes() for storage in kept.values())


def _medians(
    calls: Mapping[tuple[str, str], Call],
    seconds: float,
    device: torch.device,
    told: Callable[[str], object],
) -> dict[tuple[str, str], float]:
    """Median seconds of each call. In each round all take turns, and another one is the first."""
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    keys, began = list(calls), time.perf_counter()
    for turn in range(ROUNDS[1]):
        if turn >= ROUNDS[0] and time.perf_counter() - began > seconds:
            break
        told(f"measuring, round {turn + 1}")
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            call = calls[key].prepared()
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            samples[key].append(time.perf_counter() - start)
    return {key: statistics.median(times) for key, times in samples.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- telling --


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def cells(results: Mapping[str, Result], rows: int) -> list[tuple[str, ...]]:
    """A table with a row for each candidate; a ratio is opsgraph's time over the candidate's."""
    ours = results[OURS]
    table: list[tuple[str, ...]] = [
        ("", "step ms", "ratio", "inference ms", "ratio", "kept bytes/row")
    ]
    for name, result in results.items():
        step, inference = ours.step / result.step, ours.inference / result.inference
        times = f"{result.step * 1e3:.2f}", f"{result.inference * 1e3:.2f}"
        kept = f"{result.saved / rows:,.0f}"
        table.append((name, times[0], f"{step:.2f}", times[1], f"{inference:.2f}", kept))
    return table


def _told(title: str, results: Mapping[str, Result], rows: int) -> Iterable[str]:
    """The table by rich where this is a terminal, and as text otherwise."""
    table = cells(results, rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        console = None
    else:
        console = Console() if sys.stdout.isatty() else None
    if console is None:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        ]
        return [title, *lines]
    made = Table(title=title, title_justify="left")
    for k, name in enumerate(table[0]):
        made.add_column(name, justify="right" if k else "left", no_wrap=True)
    for row in table[1:]:
        made.add_row(*row, style="bold" if row[0] == OURS else None)
    console.print(made)
    return []


def _draw(results: Mapping[str, Mapping[str, Result]], path: Path) -> str:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed"
    figure = Figure(figsize=(10, 2.6 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(results), 3, squeeze=False)
    for axes, (title, shown) in zip(grid, results.items(), strict=True):
        for axis, name, scale in zip(axes, Result._fields, (1e3, 1e3, 2**-20), strict=True):
            values = [getattr(result, name) * scale for result in shown.values()]
            colors = ["#c4713b" if key == OURS else "#7a8694" for key in shown]
            axis.bar_label(axis.barh(list(shown), values, color=colors), fmt=" %.3g")
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(
                "kept, MiB" if name == "saved" else f"{name}, ms", fontsize=9, loc="left"
            )
        axes[0].set_ylabel(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"wrote {path}"
