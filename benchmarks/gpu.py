"""opsgraph on one GPU, beside other libraries: whole steps, pointwise kernels, products, groups.

    steps       a training step of RMSNorm, Linear, SwiGLU, Linear in bf16 and under every recipe,
                beside nn.Sequential, torch.compile, Liger, TransformerEngine, torchao and QuACK,
                those that can be imported: time of the device's kernels, wall time as called and as
                a CUDA graph, saved bytes, peak memory; and the six products as PyTorch has them
    bandwidth   norms, activations and casts, as shares of a copy's bandwidth
    products    the six products by PyTorch, by opsgraph, and by the library's best algorithm
    grouped     GroupedLinear, SwiGLU, GroupedLinear beside `torch._grouped_mm`

All that is compared takes turns in one run; times are medians. Kernels are compiled before, by
several processes. Results go into benchmarks/results/gpu.json as they come: what another run
measured of other parts stays there. Then follow a table, the targets and PNG bars.

    python -m benchmarks.gpu [--parts steps,grouped] [--sizes 8192x4096x14336] [--only-ours]
    python -m benchmarks.gpu --show              # the table of what is in the file; no GPU
    python -m benchmarks.gpu --readme            # README's tables
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import device_time, gpu_bandwidth, gpu_grouped, gpu_products, gpu_report, gpu_steps
from benchmarks.gpu_parts import DEVICE, RECIPES, SIZES, Case, Options, share_caches, warm
from benchmarks.gpu_targets import targets
from benchmarks.overhead import RESULTS, facts, names_of, sizes_of
from benchmarks.peers import CANDIDATES, EXTRAS

PARTS: Mapping[str, Any] = {
    "steps": gpu_steps,
    "bandwidth": gpu_bandwidth,
    "products": gpu_products,
    "grouped": gpu_grouped,
}
METHOD = (
    "medians of samples in turns; device time: all kernels of one call, by torch.profiler; "
    "wall time: 3 calls and one synchronization at their end"
)


class Deadline:
    """Seconds that a run may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - self.passed()


def run_cases(
    cases: Sequence[Case], deadline: Deadline, record: Callable[[dict[str, Any]], Any]
) -> list[str]:
    """Measure what there is time for, and hand on each record; returns what was left out, and why.

    A case that fails costs itself alone.
    """
    left_out = []
    for case in cases:
        if deadline.left() < case.seconds:
            left_out.append(f"{case.name}: no time left")
            continue
        start = time.monotonic()
        try:
            found = case.measure()
        except Exception as error:
            left_out.append(f"{case.name}: {type(error).__name__}: {str(error).strip()[:300]}")
            continue
        record(found | {"seconds": round(time.monotonic() - start, 2)})
    return left_out


def measure(args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """All parts that were asked for; the file is written after each record."""
    deadline, parts = Deadline(args.seconds), names_of(args.parts, PARTS)
    results: dict[str, Any] = {**facts(), "method": METHOD, "parts": {}, "not_measured": []}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        results["parts"] = {k: v for k, v in before.get("parts", {}).items() if k not in parts}
    print(f"{results['machine']}; {METHOD}", flush=True)
    tasks = [task for part in parts for task in PARTS[part].tasks(options)]
    for told in warm(tasks, args.jobs, deadline.left() * 0.4):
        print(f"compiling ahead: {told}")
    print(f"[{deadline.passed():.0f} s] {len(tasks)} tasks compiled ahead", flush=True)
    for part in parts:
        start = time.monotonic()
        made: dict[str, Any] = {"date": results["date"], "machine": results["machine"], "cases": []}
        results["parts"][part] = made

        def record(found: dict[str, Any], made: dict[str, Any] = made, part: str = part) -> None:
            made["cases"].append(found)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(gpu_report.TEXT[part](found), flush=True)

        left_out = run_cases(list(PARTS[part].cases(options)), deadline, record)
        results["not_measured"] += [f"{part} {name}" for name in left_out]
        made["seconds"] = round(time.monotonic() - start, 1)
        print(f"[{deadline.passed():.0f} s] {part} took {made['seconds']} s\n", flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    parser.add_argument("--sizes", default="", help="rows, hidden, ffn: 8192x4096x14336,...")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--only-ours", action="store_true", help="no other libraries")
    parser.add_argument("--without", default="", help="columns to leave out: Liger,te.ops")
    parser.add_argument("--repeats", type=int, default=7, help="samples of device time")
    parser.add_argument("--walls", type=int, default=5, help="samples of wall time")
    parser.add_argument("--seconds", type=float, default=270.0, help="limit for the whole run")
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--show", action="store_true", help="print what is in the file")
    parser.add_argument("--readme", action="store_true", help="print README's tables")
    return parser.parse_args(arguments)


def options_of(args: argparse.Namespace) -> Options:
    """What to measure. Raises SystemExit for names that are not known."""
    return Options(
        sizes=tuple(sizes_of(args.sizes)) if args.sizes else SIZES,
        recipes=tuple(names_of(args.recipes, RECIPES)),
        peers=not args.only_ours,
        without=tuple(names_of(args.without, [*CANDIDATES, *EXTRAS, "torchao"])),
        repeats=args.repeats,
        walls=args.walls,
    )


def draw(results: Mapping[str, Any], out: Path) -> None:
    """PNG files beside the JSON, where there is matplotlib."""
    try:
        for path in gpu_report.bars(results, out.parent, out.stem):
            print(f"written to {path}")
    except ImportError as error:
        print(f"no bars: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; or print what was measured before."""
    args = parse(arguments)
    options = options_of(args)
    if args.show or args.readme:
        results = json.loads(args.out.read_text())
        print(gpu_report.markdown(results) if args.readme else gpu_report.text(results))
        return 0
    if DEVICE.type != "cuda":
        print("benchmarks.gpu needs a CUDA device; there is none here")
        return 1
    share_caches()
    device_time.check()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = measure(args, options)
    for target in targets(results):
        print(target)
    for name in results["not_measured"]:
        print(f"not measured: {name}")
    draw(results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
