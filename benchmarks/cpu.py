"""An MLP on the CPU: opsgraph, eager PyTorch, torch.compile, and the bare matrix products.

Every case runs in alternation and is judged by medians. "GEMMs" are the products of the step alone,
each at the fastest of the layouts tried and, where the library allows it, into a buffer that is
kept: what no implementation over the same library can beat. Peak memory is that of a step in a
process of its own, weights and inputs left out: of its tensors, and what the process takes more, in
which malloc and the library have a part. Prints a table; writes JSON and a bar chart.

    taskset -c 0,1 python -m benchmarks.cpu [--threads 2] [--seconds 40] [--cases NAME,...]
"""

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import opsgraph as og
from benchmarks import memory
from benchmarks.peers import TorchSwiGLU
from benchmarks.timing import alternate, machine
from opsgraph.ops import GELU, LayerNorm, Linear, RMSNorm, SwiGLU

EAGER, COMPILED, OURS, GEMMS = "eager", "torch.compile", "opsgraph", "GEMMs"


class Case(NamedTuple):
    """One thing to measure. `limits`: the most that opsgraph may take, in times of each other."""

    rows: int
    hidden: int
    ffn: int
    dtype: torch.dtype
    gated: bool
    training: bool
    limits: Mapping[str, float]
    inner: int = 1
    one_thread: bool = False
    peak: float | None = None
    """The most memory that a step may take, in times of eager's; None: it is not measured."""


_BIG = {GEMMS: 1.2, COMPILED: 1 / 1.35, EAGER: 1 / 1.6}
_BF16, _FP32 = torch.bfloat16, torch.float32
CASES = {
    "swiglu-bf16": Case(2048, 1024, 4096, _BF16, True, True, _BIG, peak=0.7),
    "gelu-bf16": Case(2048, 1024, 4096, _BF16, False, True, _BIG, peak=0.7),
    "swiglu-fp32": Case(2048, 1024, 4096, _FP32, True, True, {COMPILED: 1.0, EAGER: 1.0}),
    "inference-bf16": Case(2048, 1024, 4096, _BF16, True, False, {COMPILED: 1 / 1.15, EAGER: 1.0}),
    "16-rows": Case(16, 1024, 4096, _BF16, True, True, {EAGER: 1.0}, 5),
    "16-rows-inference": Case(16, 1024, 4096, _BF16, True, False, {EAGER: 1.0}, 10),
    "tiny": Case(4, 64, 128, _FP32, True, True, {EAGER: 0.8}, 200, True),
    "tiny-inference": Case(4, 64, 128, _FP32, True, False, {EAGER: 1.0}, 500, True),
}


def make_ours(case: Case) -> og.Sequential:
    """RMSNorm and SwiGLU without biases, or LayerNorm and GELU with them."""
    kind = RMSNorm if case.gated else LayerNorm
    return og.Sequential(
        kind(case.hidden, eps=1e-5),
        Linear(case.hidden, case.ffn * (1 + case.gated), bias=not case.gated),
        SwiGLU() if case.gated else GELU(),
        Linear(case.ffn, case.hidden, bias=not case.gated),
        dtype=case.dtype,
    )


def make_theirs(case: Case) -> nn.Sequential:
    """The same in torch.nn."""
    kind = nn.RMSNorm if case.gated else nn.LayerNorm
    return nn.Sequential(
        kind(case.hidden, eps=1e-5),
        nn.Linear(case.hidden, case.ffn * (1 + case.gated), bias=not case.gated),
        TorchSwiGLU() if case.gated else nn.GELU(approximate="tanh"),
        nn.Linear(case.ffn, case.hidden, bias=not case.gated),
    ).to(case.dtype)


def infer(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward without gradients."""
    with torch.no_grad():
        module(x)


def step(
    module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, dy: Tensor
) -> None:
    """Forward and backward, gradients made anew as after `zero_grad`."""
    x.grad = None
    for parameter in parameters:
        parameter.grad = None
    module(x).backward(dy)


def call_of(case: Case, module: nn.Module, compiled: bool = False) -> Callable[[], None]:
    """One call of what a case measures."""
    generator = torch.Generator().manual_seed(0)
    shape = case.rows, case.hidden
    x = torch.randn(shape, generator=generator).to(case.dtype)
    run = torch.compile(module) if compiled else module
    if not case.training:
        return partial(infer, run, x)
    dy = torch.randn(shape, generator=generator).to(case.dtype)
    return partial(step, run, list(module.parameters()), x.requires_grad_(), dy)


def layouts(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    """Ways to multiply `[m, k]` by `[k, n]`: each operand and the result stored by rows or by
    columns, by mm into one buffer or by oneDNN's linear."""

    def stored(rows: int, columns: int, by_rows: bool) -> Tensor:
        shape = (rows, columns) if by_rows else (columns, rows)
        made = torch.full(shape, 0.5, dtype=dtype)
        return made if by_rows else made.t()

    for by_rows in itertools.product((True, False), repeat=2):
        a, b = stored(m, k, by_rows[0]), stored(k, n, by_rows[1])
        for c in (True, False):
            yield partial(torch.mm, a, b, out=stored(m, n, c))
        if torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            yield partial(linear, a, b.t(), None, "none", [], "")


def products(case: Case) -> list[tuple[int, int, int]]:
    """`(m, n, k)` of every product of a step: forward, then data and weight gradients."""
    t, up = case.rows, (case.hidden, case.ffn * (1 + case.gated))
    found = []
    for inputs, outputs in (up, (case.ffn, case.hidden)):
        found.append((t, outputs, inputs))
        if case.training:
            found += [(t, inputs, outputs), (outputs, inputs, t)]
    return found


def bare_gemms(case: Case) -> Callable[[], None]:
    """All products of a step in a row, each at its fastest layout."""
    fastest = [min(layouts(*sizes, case.dtype), key=least_seconds) for sizes in products(case)]

    def run() -> None:
        for product in fastest:
            product()

    return run


def least_seconds(product: Callable[[], Any]) -> float:
    """The least of two timings after one call to warm up."""
    product()
    times = [time.perf_counter()]
    for _ in range(2):
        product()
        times.append(time.perf_counter())
    return min(after - before for before, after in itertools.pairwise(times))


def repeats_within(seconds: float, functions: Mapping[str, Callable[[], Any]], inner: int) -> int:
    """How many rounds fit, between 5 and 40; each sample warms up with one more call."""
    start = time.perf_counter()
    for function in functions.values():
        function()
    one = (time.perf_counter() - start) * (inner + 1)
    return min(40, max(5, int(seconds / one)))


def measure(case: Case, seconds: float, threads: int) -> dict[str, Any]:
    """Median seconds of a call of every candidate."""
    torch.set_num_threads(1 if case.one_thread else threads)
    torch.manual_seed(0)
    theirs = make_theirs(case)
    ours = make_ours(case)
    with torch.no_grad():
        for to, source in zip(ours.parameters(), theirs.parameters(), strict=True):
            to.copy_(source)
    calls = {OURS: call_of(case, ours), EAGER: call_of(case, theirs)}
    if COMPILED in case.limits:
        calls[COMPILED] = call_of(case, theirs, compiled=True)
    if not case.one_thread:
        calls[GEMMS] = bare_gemms(case)
    for call in calls.values():  # compile, plan, measure layouts
        call()
    repeats = repeats_within(seconds, calls, case.inner)
    found = {"repeats": repeats, "seconds": alternate(calls, repeats, case.inner)}
    torch.set_num_threads(threads)
    return found


# -- memory --


def peaks_of(name: str, candidate: str) -> dict[str, int]:
    """Peak bytes of a step over what weights and inputs take; in a process made for it."""
    case = CASES[name]
    module = make_ours(case) if candidate == OURS else make_theirs(case)
    call = call_of(case, module)
    small = case._replace(rows=16)
    call_of(small, make_ours(small) if candidate == OURS else make_theirs(small))()
    found = {}
    if memory.can_tell_resident():
        before = memory.resident()
        call()
        call()
        found["resident"] = memory.resident_peak(call) - before
    with memory.fresh_memory():
        call()
        for tensor in (call.args[-2], *module.parameters()):  # x; old gradients count for nothing
            tensor.grad = None
        found["tensors"] = memory.tensor_peak(call)
    return found


def peaks_in_a_process(name: str, candidate: str, threads: int) -> dict[str, int]:
    """`peaks_of` elsewhere."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--peak", name, candidate], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# -- telling --


def flags() -> list[str]:
    """The vector and matrix extensions that the CPU has, of those that matter here."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")
    info = Path("/proc/cpuinfo")
    text = info.read_text().split() if info.exists() else []
    return [flag for flag in wanted if flag in text]


def ratios(case: Case, found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """`(against, ratio, limit)` of all that has a limit."""
    seconds = found["seconds"]
    for other, limit in case.limits.items():
        yield other, seconds[OURS] / seconds[other], limit
    peaks = found.get("peak_bytes")
    if case.peak is not None and peaks:
        yield "eager's peak memory", peaks[OURS]["tensors"] / peaks[EAGER]["tensors"], case.peak


def table(results: dict[str, Any]) -> str:
    """The results for the eye."""
    lines = [results["machine"], " ".join(results["flags"])]
    lines.append(f"{'ms':<20}" + "".join(f"{n:>15}" for n in (OURS, EAGER, COMPILED, GEMMS)))
    for name, found in results["cases"].items():
        given = (found["seconds"].get(n) for n in (OURS, EAGER, COMPILED, GEMMS))
        cells = ("" if s is None else f"{s * 1e3:.3f}" for s in given)
        lines.append(f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells))
    lines.append("")
    for name, found in results["cases"].items():
        if peaks := found.get("peak_bytes"):
            for kind in peaks[OURS]:
                told = ", ".join(f"{n} {peaks[n][kind] / 2**20:.0f} MiB" for n in peaks)
                lines.append(f"{name:<20}peak of a step, {kind}: {told}")
        for other, ratio, limit in ratios(CASES[name], found):
            word = "" if ratio <= limit else "  above"
            lines.append(f"{name:<20}{ratio:.2f} times {other}, limit {limit:.2f}{word}")
    return "\n".join(lines)


def chart(results: dict[str, Any], path: Path) -> None:
    """A bar for every candidate of every case, in milliseconds; a line at the GEMMs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = results["cases"]
    figure, axes = plt.subplots(2, (len(cases) + 1) // 2, figsize=(12, 6), squeeze=False)
    colours = {OURS: "tab:blue", EAGER: "tab:gray", COMPILED: "tab:orange", GEMMS: "tab:green"}
    for axis, (name, found) in itertools.zip_longest(axes.flat, cases.items(), fillvalue=("", {})):
        if not found:
            axis.axis("off")
            continue
        seconds = found["seconds"]
        bars = axis.bar(
            list(seconds), [s * 1e3 for s in seconds.values()], color=[colours[n] for n in seconds]
        )
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set(title=name, ylabel="ms")
        axis.tick_params(axis="x", rotation=30, labelsize=8)
    figure.suptitle(f"{results['machine']}\n{' '.join(results['flags'])}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print, write; 1 if a limit is missed and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40, help="for timing, compiling apart")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases, with commas")
    default = Path(__file__).parent / "results" / "cpu.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON; the chart goes beside it")
    parser.add_argument("--check", action="store_true", help="fail if a limit is missed")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "CANDIDATE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peaks_of(*args.peak)))
        return 0
    names = args.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"got cases {sorted(unknown)}, expected some of {', '.join(CASES)}")
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "flags": flags(),
        "threads": args.threads,
        "method": "medians of calls in alternation",
        "cases": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        case = CASES[name]
        found = measure(case, args.seconds / len(names), args.threads)
        if case.peak is not None:
            both = OURS, EAGER
            found["peak_bytes"] = {n: peaks_in_a_process(name, n, args.threads) for n in both}
        results["cases"][name] = found
        args.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name} measured", file=sys.stderr)
    print(table(results))
    chart(results, args.out.with_suffix(".png"))
    missed = [
        f"{name}: {other}"
        for name, found in results["cases"].items()
        for other, ratio, limit in ratios(CASES[name], found)
        if ratio > limit
    ]
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
