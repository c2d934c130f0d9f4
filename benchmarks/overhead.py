"""What the host pays: RMSNorm, Linear, SwiGLU, Linear without biases, beside other libraries.

On a CPU: an MLP too small for arithmetic to matter (4 rows, H=64, F=128, fp32, one thread) and one
of 16 rows in bf16, beside torch.nn; and the time that planning takes. On a GPU: training and
inference beside PyTorch, torch.compile, Liger and TransformerEngine where they can be imported, in
bf16 and under every recipe that the device has; split over GPUs with --ranks. opsgraph runs its
passes from Python (OPSGRAPH_REPLAY=0), replayed, and as a CUDA graph. All take turns in one run.
On both: what planning and recording add to a module's first calls (`benchmarks.first_call`).

    python -m benchmarks.overhead [--repeats 60] [--inner 200] [--out FILE]
    python -m benchmarks.overhead --device cuda [--sizes 64x256x512,...] [--recipes none,...]
    python -m benchmarks.overhead --device cuda --ranks 2
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import opsgraph as og
from benchmarks import first_call, tables
from benchmarks import overhead_device as device_cases
from benchmarks.calls import FORWARD, INFERENCE, TRAINING, Clock, case_of, prepare, samples_of
from benchmarks.peers import CANDIDATES, ON_CPU, ON_RANKS, RECIPES, Block
from benchmarks.timing import alternate, machine
from opsgraph.base import config
from opsgraph.ops import Linear, RMSNorm, SiLU, SwiGLU

CPU = torch.device("cpu")
TINY = Block(4, 64, 128, torch.float32, CPU)
FEW_ROWS = Block(16, 1024, 3584, torch.bfloat16, CPU)
HOST_LIMIT = 1.1  # times nn.Sequential
PLANNING_LIMITS = {"MLP, greedy": 2e-3, "MLP, optimal": 2e-3, "1,000 ops, greedy": 0.5}
RESULTS = Path(__file__).parent / "results"


def host_cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """For every kind of call of the tiny MLP, the same call of all modules."""
    kinds = {
        "forward, no_grad": INFERENCE,
        "forward, grad": FORWARD,
        "forward + backward": TRAINING,
    }
    prepared = prepare(ON_CPU, TINY, tuple(kinds.values()))
    return {name: prepared.calls[kind] for name, kind in kinds.items()}


def plan_afresh(module: og.Sequential) -> Callable[[], Any]:
    """A function that plans the module's training again at every call, past its table.

    The only place here that reaches into the package: a stage plans for a key of its table.
    """
    plan = module.plan(training=True)
    (stage,) = module._stages
    key = next(key for key, found in stage.plans.items() if found is plan)
    return partial(stage.make, key)


def mlp(planner: str) -> og.Sequential:
    """The tiny MLP, by one of the planners."""
    return og.Sequential(
        RMSNorm(TINY.hidden),
        Linear(TINY.hidden, 2 * TINY.ffn, bias=False),
        SwiGLU(),
        Linear(TINY.ffn, TINY.hidden, bias=False),
        planner=planner,
    )


def planning_cases() -> dict[str, Callable[[], Any]]:
    """Plans to make: the MLP's with both planners, and that of a long run of ops."""
    layers = [layer for _ in range(500) for layer in (Linear(8, 8, bias=False), SiLU())]
    return {
        "MLP, greedy": plan_afresh(mlp("greedy")),
        "MLP, optimal": plan_afresh(mlp("optimal")),
        "1,000 ops, greedy": plan_afresh(og.Sequential(*layers)),
    }


def planning_seconds(repeats: int) -> dict[str, float]:
    """Medians of the time that plans take."""
    planning = planning_cases()
    short = {name: call for name, call in planning.items() if name.startswith("MLP")}
    long = {name: call for name, call in planning.items() if name not in short}
    return alternate(short, repeats, 5) | alternate(long, 3, 1)


def cpu_cases(clock: Clock, threads: int) -> Iterator[dict[str, Any]]:
    """Records of the tiny MLP on one thread, then of that of few rows on `threads`."""
    before = torch.get_num_threads()
    settings = (
        (TINY, (INFERENCE, FORWARD, TRAINING), clock, 1),
        (FEW_ROWS, (INFERENCE, TRAINING), few_calls(clock), threads),
    )
    try:
        for block, kinds, each, count in settings:
            torch.set_num_threads(count)
            prepared = prepare(ON_CPU, block, kinds)
            for kind in kinds:
                samples = samples_of(prepared, kind, each)
                case = case_of(block, kind, samples, prepared.refused[kind], prepared.plans[kind])
                yield case | {"threads": count}
    finally:
        torch.set_num_threads(before)


def few_calls(clock: Clock) -> Clock:
    """The same with a 40th of the calls in a sample, for what takes milliseconds."""
    return Clock(clock.repeats, max(1, clock.host // 40), clock.wall)


def facts() -> dict[str, Any]:
    """Where and when, and with which versions."""
    versions = {}
    for name in ("triton", "transformer_engine", "liger_kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opsgraph": og.__version__,
        "replays": "replay" in config.Config._fields,
        "others": versions,
    }


def misses(results: dict[str, Any]) -> list[str]:
    """What is above its limit, on a CPU: the tiny MLP's calls, planning, and first calls."""
    slow = []
    for case in results["cases"]:
        own, other = (case["seconds"][name]["host"] for name in ("opsgraph", "nn.Sequential"))
        if case["rows"] == TINY.rows and own["median"] > HOST_LIMIT * other["median"]:
            slow.append(case["kind"])
    planning = results["planning_seconds"]
    slow += [name for name, seconds in planning.items() if seconds > PLANNING_LIMITS[name]]
    return slow + first_call.misses(results["first_calls"])


def planning_table(seconds: dict[str, float]) -> str:
    """Planning for the eye."""
    lines = [f"{'planning':<22}{'time':>12}{'limit':>16}"]
    for name, found in seconds.items():
        lines.append(f"{name:<22}{found * 1e3:>9.2f} ms{PLANNING_LIMITS[name] * 1e3:>13.0f} ms")
    return "\n".join(lines)


def sizes_of(text: str) -> list[tuple[int, int, int]]:
    """`64x256x512,8192x1024x3584`: rows, hidden and ffn of each."""
    sizes = []
    for part in text.split(","):
        rows, hidden, ffn = (int(number) for number in part.split("x"))
        sizes.append((rows, hidden, ffn))
    return sizes


def names_of(text: str, known: Iterable[str]) -> list[str]:
    """The names in a text, with commas. Raises SystemExit for one that is not known."""
    names, known = [name.strip() for name in text.split(",") if name.strip()], list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"got {name!r}, expected some of {', '.join(known)}")
    return names


def found_cases(args: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """What was asked for, as it comes."""
    device = torch.device(args.device)
    if device.type == "cpu" and args.ranks == 1:
        yield from cpu_cases(clock, args.threads)
        return
    known = ON_RANKS if args.ranks > 1 else CANDIDATES
    without = names_of(args.without, known)
    names = [name for name in known if name not in without]
    recipes, lacking = device_cases.able(device)
    if args.recipes:
        recipes = names_of(args.recipes, RECIPES)
    for recipe, reason in lacking.items():
        if recipe not in recipes:
            print(f"{RECIPES[recipe]} is left out: {reason}\n")
    usual = device_cases.SIZES if args.ranks == 1 else device_cases.SIZES_ON_RANKS
    sizes = sizes_of(args.sizes) if args.sizes else usual
    if args.ranks == 1:
        yield from device_cases.cases(sizes, recipes, names, clock, device)
    else:
        yield from device_cases.cases_on_ranks(sizes, recipes, names, clock, device, args.ranks)


def first_cases(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """What the first calls of the smallest size cost: without a recipe, and in those asked for."""
    recipes = names_of(args.recipes, RECIPES) or ["none"]
    if args.device == "cpu":
        place, dtype, size = CPU, TINY.dtype, (TINY.rows, TINY.hidden, TINY.ffn)
    else:
        place, dtype = torch.device(args.device), torch.bfloat16
        size = min(sizes_of(args.sizes) if args.sizes else device_cases.SIZES)
        recipes = recipes if args.recipes else device_cases.able(place)[0]
    blocks, threads = first_call.blocks(size, recipes, dtype, place), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return first_call.cases(blocks, clock.repeats, clock.synchronize)
    finally:
        torch.set_num_threads(threads)


def clock_of(args: argparse.Namespace) -> Clock:
    """The clocks for a device; on GPUs a sample has few calls, and they are not waited for."""
    if args.device == "cpu":
        return Clock(args.repeats or 60, args.inner or 200, wall=0)
    synchronize = torch.cuda.synchronize
    return Clock(args.repeats or 30, args.inner or 5, args.steps, synchronize=synchronize)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs to split the block over")
    parser.add_argument("--repeats", type=int, help="samples; 60 on a CPU, 30 on GPUs")
    parser.add_argument("--inner", type=int, help="calls in a sample of the host; 200, on GPUs 5")
    parser.add_argument("--steps", type=int, default=20, help="calls in a sample of wall time")
    parser.add_argument("--threads", type=int, default=2, help="for the CPU's larger MLP")
    parser.add_argument("--sizes", default="", help="rows, hidden, ffn: 64x256x512,...")
    parser.add_argument("--recipes", default="", help=f"some of {', '.join(RECIPES)}")
    parser.add_argument("--without", default="", help="columns to leave out: Liger,te.ops")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--check", action="store_true", help="on a CPU: 1 if a limit is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a limit is missed and --check was given."""
    args = parse(arguments)
    if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
        print(f"got {torch.cuda.device_count()} CUDA devices, expected {args.ranks}")
        return 1
    on_cpu = args.device == "cpu" and args.ranks == 1
    name = "overhead" + ("" if on_cpu else "_cuda") + ("_ranks" if args.ranks > 1 else "")
    out = args.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    clock = clock_of(args)
    results: dict[str, Any] = {**facts(), "method": clock.method(), "cases": []}
    told = "" if results["replays"] else "; nothing is replayed by this build"
    print(f"{results['machine']}; {results['method']}{told}\n")
    for case in found_cases(args, clock):
        results["cases"].append(case)
        tables.show(case)
        out.write_text(json.dumps(results, indent=1) + "\n")  # what is there survives a crash
    if args.ranks == 1:
        results["first_calls"] = first_cases(args, clock)
        print(first_call.table(results["first_calls"]), end="\n\n")
        out.write_text(json.dumps(results, indent=1) + "\n")
    if not on_cpu:
        return 0
    results["planning_seconds"] = planning_seconds(clock.repeats)
    print(planning_table(results["planning_seconds"]))
    out.write_text(json.dumps(results, indent=1) + "\n")
    missed = misses(results)
    if missed:
        print(f"above the limit: {', '.join(missed)}")
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
