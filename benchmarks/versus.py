"""This checkout beside another one, in one run: host cost, steps, planning and import.

Each checkout has a process of its own, which waits while the other is measured. They take turns,
sample by sample; a ratio is the median over turns of this one's time by the other's.

    python -m benchmarks.versus OTHER_CHECKOUT [--repeats 40] [--cases tiny,planning] [--out FILE]
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent

RUN_THIS_FILE = f"import runpy; runpy.run_path({__file__!r}, run_name='worker')"


def mlp_calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """Calls of a LayerNormMLP of 64 x 128 on 4 rows, and how many make a sample."""
    import torch

    import opsgraph as og

    def training(recipe: Any = None) -> Callable[[], Any]:
        torch.manual_seed(0)
        module = og.LayerNormMLP(64, 128, device="cpu")
        x, dy = torch.randn(4, 1, 64, requires_grad=True), torch.randn(4, 1, 64)

        def step() -> None:
            x.grad = None
            module.zero_grad()
            with og.autocast(enabled=recipe is not None, recipe=recipe):
                y = module(x)
            y.backward(dy)

        return step

    return {
        "mlp": (training(), 100),
        "mlp-current": (training(og.recipe.Float8CurrentScaling()), 20),
        "mlp-delayed": (training(og.recipe.DelayedScaling(amax_history_len=16)), 20),
    }


def plan_calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """A first call of an MLP: its module is made, planned and run."""
    import torch

    import opsgraph as og
    from opsgraph.ops import Linear, RMSNorm, SwiGLU

    x = torch.randn(4, 64)

    def first_call() -> None:
        og.Sequential(RMSNorm(64), Linear(64, 256), SwiGLU(), Linear(128, 64))(x)

    return {"first-call": (first_call, 5)}


def overhead_calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """What `benchmarks.overhead` of that checkout measures: host cost, and plans made afresh."""
    from benchmarks.overhead import host_cases, planning_cases

    host = {f"overhead, {name}": (pair["opsgraph"], 50) for name, pair in host_cases().items()}
    plans = {f"planning, {name}": (call, 5) for name, call in planning_cases().items()}
    return host | {name: pair for name, pair in plans.items() if "MLP" in name}


def cuda_calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """Training steps of 8192 rows, 2048 x 5632 in bf16, which keep a GPU busy."""
    import torch

    import opsgraph as og
    from opsgraph.ops import GELU, LayerNorm, Linear, RMSNorm, SwiGLU

    if not torch.cuda.is_available():
        return {}
    place: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    gated = RMSNorm(2048), Linear(2048, 11264, bias=False), SwiGLU(), Linear(5632, 2048, bias=False)
    plain = LayerNorm(2048), Linear(2048, 5632), GELU(), Linear(5632, 2048)
    recipes = og.recipe
    found = {
        "swiglu": (og.Sequential(*gated, **place), None),
        "gelu": (og.Sequential(*plain, **place), None),
        "swiglu-current": (og.Sequential(*gated, **place), recipes.Float8CurrentScaling()),
        "swiglu-delayed": (og.Sequential(*gated, **place), recipes.DelayedScaling()),
        "swiglu-blocks": (og.Sequential(*gated, **place), recipes.Float8BlockScaling()),
    }
    x = torch.randn(8192, 2048, requires_grad=True, **place)
    dy = torch.randn(8192, 2048, **place)

    def step(module: Any, recipe: Any) -> None:
        x.grad = None
        module.zero_grad()
        with og.autocast(enabled=recipe is not None, recipe=recipe):
            y = module(x)
        y.backward(dy)

    return {f"cuda-{name}": (partial(step, *pair), 10) for name, pair in found.items()}


def calls_of(names: list[str]) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every case that begins with one of the names, or all of them."""
    from benchmarks.cpu import CASES, call_of, make_ours

    made: dict[str, Callable[[], tuple[Callable[[], Any], int]]] = {
        name: partial(lambda case: (call_of(case, make_ours(case)), case.inner), case)
        for name, case in CASES.items()
    }
    for name, call in (mlp_calls() | plan_calls() | overhead_calls() | cuda_calls()).items():
        made[name] = partial(lambda pair: pair, call)
    return {
        name: make() for name, make in made.items() if not names or name.startswith(tuple(names))
    }


def work(names: list[str], threads: int) -> None:
    """In a checkout's own process: answer each case's name with the seconds of one call."""
    import torch

    torch.set_num_threads(threads)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    calls = calls_of(names)
    for call, _ in calls.values():
        call()
    gc.collect()
    gc.disable()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        call, inner = calls[line.strip()]
        call()  # what ran before has left the caches to others
        synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize()
        print((time.perf_counter() - start) / inner, flush=True)
        gc.collect()


def environment(checkout: Path) -> dict[str, str]:
    """What makes a process import from a checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


class Checkout:
    """A process that runs a checkout's code when it is asked to."""

    def __init__(self, path: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-c", RUN_THIS_FILE, *arguments]
        self.process = subprocess.Popen(
            command, cwd=path, env=environment(path), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.cases: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with status {self.process.wait()}")
        return line

    def seconds(self, case: str) -> float:
        """One sample: the mean seconds of a call."""
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return float(self._line())


def import_seconds(path: Path) -> float:
    """Seconds that `import opsgraph` takes after torch is there, its bytecode being kept."""
    bytecode = {"PYTHONDONTWRITEBYTECODE": ""}  # empty: Python writes and reads .pyc files
    text = (
        "import torch, time; start = time.perf_counter(); import opsgraph; "
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=path,
        env=environment(path) | bytecode, text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return float(done.stdout)


def in_turns(
    name: str, calls: list[Callable[[], float]], repeats: int
) -> dict[str, float | list[float] | str]:
    """Medians of both, and of their ratios turn by turn with the middle half of these."""
    rows = []
    for turn in range(repeats):
        order = (0, 1) if turn % 2 else (1, 0)
        sample = {k: calls[k]() for k in order}
        rows.append((sample[0], sample[1]))
    ratios = [one / other for one, other in rows]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": name,
        "this": statistics.median(one for one, _ in rows),
        "other": statistics.median(other for _, other in rows),
        "ratio": middle,
        "middle half": [low, high],
    }


def row(found: dict[str, Any]) -> str:
    """One case for the eye."""
    low, high = found["middle half"]
    times = f"{found['this'] * 1e6:>14.1f}{found['other'] * 1e6:>14.1f}"
    return f"{found['case']:<28}{times}{found['ratio']:>8.3f}   {low:.3f} to {high:.3f}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout of opsgraph")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default="", help="some of the cases, with commas; else all")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    paths = [HERE, args.other.resolve()]
    both = [Checkout(path, [args.cases, str(args.threads)]) for path in paths]
    print(f"{'microseconds a call':<28}{'this':>14}{'other':>14}{'ratio':>8}   middle half")
    results = []
    for name in [c for c in both[0].cases if c in both[1].cases]:
        calls = [partial(checkout.seconds, name) for checkout in both]
        results.append(in_turns(name, calls, args.repeats))
        print(row(results[-1]), flush=True)
    if not args.cases or "import" in args.cases.split(","):
        imports = [partial(import_seconds, path) for path in paths]
        for seconds in imports:
            seconds()  # compiles what no call has compiled before
        results.append(in_turns("import", imports, max(5, args.repeats // 4)))
        print(row(results[-1]))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "worker":
    work([name for name in sys.argv[1].split(",") if name], int(sys.argv[2]))
elif __name__ == "__main__":
    main()
