"""Errors of every op, forward and backward, in units in the last place, beside eager PyTorch.

python -m benchmarks.numerics [--device cuda] [--only NAME ...] [--quick]
python -m benchmarks.numerics --draw

Inputs are all numbers of a 16-bit dtype, and of fp32 each exponent with some mantissas and both
signs; for ops on rows each row has one exponent. The exact results are in fp64. A unit is that of
the exact result, of an op on rows that of the row's largest result, and of a sum over rows that of
the sum of magnitudes. An infinity where the exact result is finite, or the reverse, is an error
without end. Errors are compared by the exponent of the input: "excess" is how much the largest
error of ours is beyond the largest one of eager's at one exponent.

Writes benchmarks/results/numerics.json, an entry for each device; --draw makes numerics.png and the
table of docs/numerics.md of it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import opsgraph as og
from benchmarks.numerics_cases import ELEMENTWISE, ROWS, Elementwise, Rows

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH, NEAR = 64, 4


class Error(NamedTuple):
    """The errors of one result. exponents: of the inputs; ours, eager: the largest at each."""

    exponents: list[int]
    ours: list[float]
    eager: list[float]
    tiny: tuple[float, float]
    """The largest, ours and eager's, where the input or the result is tiny; not in the others."""
    near: int = 0
    """Of how many exponents on either side eager's largest is taken: inputs are drawn at random."""

    @property
    def excess(self) -> tuple[float, float, float, int]:
        """How far ours is beyond eager at most; ours, eager and the exponent there."""
        of = range(len(self.eager))
        eager = [max(self.eager[max(0, k - self.near) : k + self.near + 1]) for k in of]
        three = zip(self.ours, eager, self.exponents, strict=True)
        return max((0.0 if o <= e else o - e, o, e, k) for o, e, k in three)


def every_number(dtype: torch.dtype, mantissas: int) -> Tensor:
    """All finite numbers of 16 bits, or of fp32 some mantissas for each exponent and sign."""
    if dtype != torch.float32:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        found = bits.view(dtype)
    else:
        exponents = torch.arange(0, 255, dtype=torch.int32)[:, None] << 23
        generator = torch.Generator().manual_seed(0)
        some = torch.randint(0, 2**23, (255, mantissas), generator=generator, dtype=torch.int32)
        some[:, :2] = torch.tensor([0, 2**23 - 1])
        bits = exponents | some
        found = torch.cat((bits, bits | -(2**31))).flatten().view(torch.float32)
    return found[found.isfinite()]


def units(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of numbers of that size, fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny, max=info.max))
    return torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)


def error_of(found: Tensor, exact: Tensor, size: Tensor) -> Tensor:
    """Units by which each element is off; inf for a wrong infinity or a NaN."""
    dtype, wide = found.dtype, found.double()
    largest = torch.finfo(dtype).max
    over = exact.abs() > largest * (1 + torch.finfo(dtype).eps / 4)
    near = exact.abs() > largest * (1 - torch.finfo(dtype).eps)
    off = (wide - exact).abs() / units(torch.maximum(exact.abs(), size), dtype)
    off = torch.where(wide.isfinite(), off, math.inf)
    right = wide.isinf() & (wide.sign() == exact.sign()) & (over | near)
    off = torch.where(over, torch.where(right, 0.0, math.inf), torch.where(right, 0.0, off))
    return off


def exponent_of(x: Tensor) -> Tensor:
    """The exponent of the power of two at or below |x|; of 0 that of the smallest number."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal * info.eps))
    return exponent - 1


MANTISSAS = 4096
"""Of each exponent of fp32: with fewer, the largest errors depend on the luck of the draw."""
TINY = 128
"""Times the smallest normal number: below it products on the way have lost digits, or are 0."""


def collected(
    keys: Tensor, exact: tuple[Tensor, Tensor], ours: Tensor, eager: Tensor, near: int = 0
) -> Error:
    """The largest errors at each key. ours, eager: results; exact: and its size."""
    value, size = exact
    info = torch.finfo(ours.dtype)
    least = info.smallest_normal * TINY
    small = torch.exp2(keys.double()) < least
    tiny = small | (torch.maximum(value.abs(), size) < least)
    known, place = keys.flatten().unique(return_inverse=True)
    most, apart = [], []
    for result in (ours, eager):
        off = error_of(result, value, size)
        apart.append(float(torch.where(tiny, off, 0.0).detach().amax()))
        usual = torch.where(tiny, 0.0, off).flatten()
        none = torch.zeros(len(known), dtype=torch.float64)
        most.append(none.scatter_reduce(0, place, usual, "amax").tolist())
    return Error(known.tolist(), most[0], most[1], (apart[0], apart[1]), near)


def module_of(op: Any, dtype: torch.dtype, device: str) -> Any:
    """A sequence of the op alone. Parameters get values of ordinary size."""
    module = og.Sequential(op, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("0.alpha"):
                value = torch.randn(parameter.shape, generator=generator) * 0.5 + 0.5
                parameter.copy_(value)
    return module


def run_ours(module: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and all gradients, on the CPU, by name."""
    x = x.requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, (x, *named.values()), dy)
    names = ("dx", *(f"d{name.removeprefix('0.')}" for name in named))
    found = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    return {name: value.cpu() for name, value in found.items()}


def run_eager(
    function: Callable[..., Tensor], leaves: Mapping[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """The same of a function of leaves."""
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    y = function(own)
    gradients = torch.autograd.grad(y, tuple(own.values()), dy)
    names = (f"d{name}" for name in own)
    found = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    return {name: value.cpu() for name, value in found.items()}


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of ordinary size, none near 0."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    return (value + 0.5 * value.sign()).to(dtype)


def elementwise(
    case: Elementwise, dtype: torch.dtype, device: str, mantissas: int
) -> dict[str, Error]:
    """Of an activation; gated ones also with every number as the value."""
    numbers = every_number(dtype, mantissas)
    numbers = numbers[: len(numbers) // WIDTH * WIDTH].view(-1, WIDTH)
    if case.g is None:
        return _plain(case, numbers, dtype, device)
    ordinary = _noise(tuple(numbers.shape), dtype, 2)
    a, b = torch.cat((numbers, ordinary)), torch.cat((ordinary, numbers))
    keys = exponent_of(torch.cat((numbers, numbers)))
    dy = _noise(tuple(a.shape), dtype, 3)
    module = module_of(case.op(), dtype, device)
    ours = run_ours(module, torch.cat((a, b), 1).to(device), dy.to(device))
    eager = run_eager(
        lambda t: case.eager(t["a"], t["b"]), {"a": a.to(device), "b": b.to(device)}, dy.to(device)
    )
    f, g, upstream = case.f(a.double()), case.g(b.double()), dy.double()
    exact = {
        "y": (f.value * g.value, (f.value * g.value).abs()),
        "da": (upstream * g.value * f.slope, (upstream * g.value).abs() * f.size),
        "db": (upstream * f.value * g.slope, (upstream * f.value).abs() * g.size),
    }
    ours = {"y": ours["y"], "da": ours["dx"][:, :WIDTH], "db": ours["dx"][:, WIDTH:]}
    return {name: collected(keys, exact[name], ours[name], eager[name], NEAR) for name in exact}


def _plain(case: Elementwise, x: Tensor, dtype: torch.dtype, device: str) -> dict[str, Error]:
    dy = _noise(tuple(x.shape), dtype, 3)
    module = module_of(case.op(), dtype, device)
    ours = run_ours(module, x.to(device), dy.to(device))
    eager = run_eager(lambda t: case.eager(t["x"]), {"x": x.to(device)}, dy.to(device))
    f, upstream = case.f(x.double()), dy.double()
    exact = {
        "y": (f.value, f.value.abs()),
        "dx": (upstream * f.slope, upstream.abs() * f.size),
    }
    keys = exponent_of(x)
    return {name: collected(keys, exact[name], ours[name], eager[name]) for name in exact}


def limits(case: Elementwise, dtype: torch.dtype, device: str) -> list[str]:
    """What is wrong at infinities: values and slopes there are those that go on for ever."""
    x = torch.tensor([[math.inf, -math.inf]], dtype=dtype)
    far = case.f(x.double().clamp(-1e30, 1e30))
    value = torch.where(far.value.abs() > 1e20, far.value.sign() * math.inf, far.value)
    slope = torch.where(far.slope.abs() > 1e20, far.slope.sign() * math.inf, far.slope)
    module = module_of(case.op(), dtype, device)
    b = torch.full_like(x, 1.5)
    given = x if case.g is None else torch.cat((x, b), 1)
    factor = 1.0 if case.g is None else case.g(b.double()).value
    found = run_ours(module, given.to(device), torch.ones_like(x).to(device))
    wrong = []
    for name, exact in (("y", value * factor), ("dx", slope * factor)):
        near = torch.isclose(found[name][:, :2].double(), exact, rtol=4 * torch.finfo(dtype).eps)
        wrong += [f"{name} at {'+-'[k]}inf" for k in range(2) if not near[0, k]]
    return wrong


def row_exponents(dtype: torch.dtype, rows: int) -> Tensor:
    """Of each row: all exponents from the smallest subnormal on, each as often."""
    info = torch.finfo(dtype)
    least = math.frexp(info.smallest_normal * info.eps)[1] - 1
    return torch.arange(least, math.frexp(info.max)[1] - 3).repeat_interleave(rows)


def on_rows(case: Rows, dtype: torch.dtype, device: str, rows: int) -> dict[str, Error]:
    """Of an op with parameters."""
    keys = row_exponents(dtype, rows)
    noise = _noise((len(keys), WIDTH), torch.float32, 4).double()
    x = torch.ldexp(noise, keys[:, None]).to(dtype)
    module = module_of(case.op(WIDTH), dtype, device)
    leaves = {"x": x} | {
        name.removeprefix("0."): p.detach().cpu() for name, p in module.named_parameters()
    }
    dy = _noise((len(keys), module(x[:1].to(device)).shape[-1]), dtype, 5)
    ours = run_ours(module, x.to(device), dy.to(device))
    eager = run_eager(case.eager, {k: v.to(device) for k, v in leaves.items()}, dy.to(device))
    exact = run_eager(case.exact, {k: v.double() for k, v in leaves.items()}, dy.double())
    magnitudes = run_eager(
        case.exact, {k: v.double().abs() for k, v in leaves.items()}, dy.double().abs()
    )
    found = {}
    for name, value in exact.items():
        of_rows = name in ("y", "dx")
        size = value.abs().amax(-1, keepdim=True) if of_rows else magnitudes[name].abs()
        size = size.expand_as(value)
        place = keys[:, None].expand_as(value) if of_rows else torch.zeros_like(value).long()
        fits = magnitudes[name].abs() < torch.finfo(dtype).max / 2  # so do all partial sums
        parts = [t[fits] for t in (place, value, size, ours[name], eager[name])]
        if len(parts[0]):
            found[name] = collected(parts[0], (parts[1], parts[2]), *parts[3:], near=NEAR)
    return found


def measured(
    device: str, only: list[str], quick: bool
) -> Iterator[tuple[str, str, str, dict[str, Error], list[str]]]:
    """Op, dtype, backend, errors by result, wrong limits."""
    for name, case in (*ELEMENTWISE.items(), *ROWS.items()):
        if only and name not in only:
            continue
        for label, dtype in DTYPES.items():
            if isinstance(case, Elementwise):
                wrong = limits(case, dtype, device)
                errors = elementwise(case, dtype, device, 8 if quick else MANTISSAS)
                width = WIDTH if case.g is None else 2 * WIDTH
                op = case.op()
            else:
                wrong, errors = [], on_rows(case, dtype, device, 1 if quick else 64)
                width, op = WIDTH, case.op(WIDTH)
            module = module_of(op, dtype, device)
            plan = module.plan(x=torch.zeros(1, width, dtype=dtype, device=device))
            backend = "+".join(dict.fromkeys(step.backend for step in plan.forward))
            yield name, label, backend, errors, wrong


def summary(error: Error) -> dict[str, Any]:
    """What is kept of an error."""
    most = {name: max(getattr(error, name), default=0.0) for name in ("ours", "eager")}
    named = {name: most[name] for name in ("ours", "eager")}
    return named | {"excess": error.excess, "tiny": error.tiny}


def place_of(device: str) -> str:
    """What results are kept under."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    from opsgraph.kernels.triton import interpreting

    return f"{platform.machine()} CPU" + ", Triton interpreted" * interpreting()


def told(units: float) -> str:
    """Units for a table."""
    return "∞" if math.isinf(units) else f"{units:.2f}" if units < 1000 else f"{units:.0e}"


def table(ops: Mapping[str, Any]) -> str:
    """The largest error of y and of all gradients, ours and eager's, by dtype; markdown."""
    heads = [f"{label} {part}" for label in DTYPES for part in ("y", "gradients")]
    lines = ["| op | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name, found in ops.items():
        cells = []
        for label in DTYPES:
            results = found[label]["results"]
            for own in (["y"], [key for key in results if key != "y"]):
                most = (max(results[key][who] for key in own) for who in ("ours", "eager"))
                cells.append(" / ".join(map(told, most)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(record: Mapping[str, Any]) -> None:
    """The picture, and the table in the page of documentation, of the first device."""
    import matplotlib.pyplot as plt

    place, own = next(iter(record.items()))
    names = [*own["ops"]]
    figure, axes = plt.subplots(1, 3, figsize=(11, 8), sharey=True, layout="constrained")
    for axis, label in zip(axes, DTYPES, strict=True):
        for k, name in enumerate(names):
            for result, found in own["ops"][name][label]["results"].items():
                shape = "o" if result == "y" else "^"
                for who, colour in (("eager", "tab:orange"), ("ours", "tab:blue")):
                    units = min(max(found[who], 0.05), 1e8)
                    axis.plot(units, k, shape, color=colour, markersize=5, alpha=0.7)
        axis.set(xscale="log", xlabel="units in the last place", title=label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"largest errors: eager (orange), opsgraph (blue), y (dots); {place}")
    figure.savefig(RESULTS / "numerics.png", dpi=110)
    before, start, rest = PAGE.read_text().partition("<!-- start measured -->\n")
    end = rest.partition("<!-- end measured -->\n")[2]
    made = f"{before}{start}{table(own['ops'])}<!-- end measured -->\n{end}"
    PAGE.write_text(made)


def main() -> None:
    """Measure, print a table, keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", default=[], help="ops")
    parser.add_argument("--quick", action="store_true", help="fewer numbers of fp32")
    parser.add_argument("--out", type=Path, default=RESULTS / "numerics.json")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.draw:
        draw(record)
        return
    own = record.setdefault(place_of(given.device), {"torch": torch.__version__, "ops": {}})
    for name, dtype, backend, errors, wrong in measured(given.device, given.only, given.quick):
        found = {result: summary(error) for result, error in errors.items()}
        own["ops"].setdefault(name, {})[dtype] = {
            "backend": backend, "wrong limits": wrong, "results": found,
        }  # fmt: skip
        shown = "  ".join(
            f"{result} {s['ours']:.2f}/{s['eager']:.2f}"
            + (" ({1:.2f}/{2:.2f} at 2^{3})".format(*s["excess"]) if s["excess"][0] > 0.5 else "")
            for result, s in found.items()
        )
        print(f"{name:16} {dtype} {backend:10} {shown} {wrong or ''}", flush=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
