"""Trains for a long time while everything changes, and looks whether anything grows.

python -m benchmarks.soak [--minutes 60] [--seed 0]

A model is trained to copy another one. Between its steps its options, attributes, ops, dtypes'
autocast and recipes change at random, fusers come and go, and so do shapes, copies, checkpoints,
state dicts, threads and other modules, of which each is used a few times and dropped. After each
round what the process holds is counted: memory, open files, threads, Python objects, the plans,
tables and sources there are, recipes and scales that are known, and files in the cache. The exit
status is 1 if one of them grew from the second third of the rounds to the last, or the model
learnt nothing.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import linecache
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph import ops, recipe
from opsgraph.fuser import registered
from opsgraph.kernels.cpu import memory
from opsgraph.kernels.directories import directories
from opsgraph.precision import delayed, interned
from opsgraph.run import table

WIDTHS = (32, 64, 96)
ROWS = (1, 3, 16, 33, 64, 128, 160)
RECIPES: tuple[Callable[[], Any], ...] = (
    recipe.Float8CurrentScaling,
    recipe.DelayedScaling,
    lambda: recipe.DelayedScaling(amax_history_len=4, margin=1),
    recipe.Float8BlockScaling,
    recipe.MXFP8BlockScaling,
)
SLACK = {"MiB": 24, "objects": 4000}
"""By how much a count may grow and still be flat; others not at all."""


class Scaled(og.Fuser):
    """Comes and goes."""

    backend, pattern = "reference", dict(bias=ops.Bias, act=ops.SiLU)

    def fwd(self, x: Tensor, bias_bias: Tensor) -> Any:
        """Gives `silu(x + bias)`."""
        return torch.nn.functional.silu(x + bias_bias), ()


def held() -> dict[str, int]:
    """What the process holds, by name."""
    memory.pool.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps is no leak
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    caches = [path for path in directories() if path.is_dir()]
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
        "tables": len(table._tables),
        "plans": sum(len(found.plans) for found in table._tables.values()),
        "sources": sum(name.startswith("<opsgraph") for name in linecache.cache),
        "recipes": len(interned._entries),
        "scales": sum(len(delayed.states_of(key)) for key in [*delayed._registered]),
        "fusers": len(registered()),
        "cached files": sum(len(os.listdir(path)) for path in caches),
    }


class Soak:
    """The model that is trained, and what happens meanwhile."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        layers = ops.RMSNorm(64), ops.Linear(64, 256), ops.SwiGLU(), ops.Linear(128, 64)
        self.model = og.Sequential(*layers)
        self.target = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 64)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.handles: list[Any] = []

    def step(self) -> None:
        """Train a step, under anything."""
        one = self.random.choice
        x = torch.randn(one(ROWS[2:]), 64)
        if one((True, False)):
            x = x.view(-1, 1, 64).expand(-1, 2, -1)
        with torch.no_grad():
            wanted = self.target(x)
        chosen = one((None, None, *RECIPES))
        rows = x.numel() // 64
        if chosen is not None and rows % 32 == 0:
            context: Any = og.autocast(recipe=chosen())
        else:
            context = one((nullcontext(), torch.autocast("cpu", torch.bfloat16)))
        with context:
            if one((True, False, False)):
                more = {"context_fn": og.checkpoint_contexts, "use_reentrant": False}
                y = checkpoint(self.model, x, **more)
            else:
                y = self.model(x)
            loss = (y.float() - wanted).square().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=one((True, False)))
        self.losses.append(float(loss.detach()))

    def change(self) -> None:
        """Have the model plan again."""
        one = self.random.choice
        kind = one(("planner", "recompute", "eps", "interleave", "fuser", "insert", "load", "eval"))
        if kind == "planner":
            self.model.planner = one(("greedy", "optimal"))
        elif kind == "recompute":
            self.model.recompute = one((True, False))
        elif kind == "eps":
            self.model[0].eps = self.random.uniform(1e-6, 1e-4)
        elif kind == "interleave":
            self.model[2].round_gate = one((True, False))
        elif kind == "fuser" and self.handles:
            self.handles.pop().unregister()
        elif kind == "fuser":
            self.handles.append(og.register(Scaled))
        elif kind == "insert":
            self.model.insert(4, ops.ConstantScale(self.random.uniform(0.9, 1.1)))
            with torch.no_grad():
                self.model(torch.randn(2, 64))
            del self.model[4]
        elif kind == "load":
            self.model.load_state_dict(self.model.state_dict())
        else:
            self.model.eval()
            with torch.inference_mode():
                self.model(torch.randn(3, 64))
            self.model.train()

    def visitor(self) -> None:
        """Another module, which is used a few times and dropped."""
        one = self.random.choice
        width = one(WIDTHS)
        slope = self.random.uniform(0.0, 0.2)
        kinds = (
            lambda: ops.Linear(width, width), lambda: ops.LayerNorm(width), lambda: ops.Bias(width),
            ops.SiLU, lambda: ops.LeakyReLU(slope), lambda: ops.Residual(ops.GELU()),
            lambda: ops.Dropout(0.3), ops.Tanh,
        )  # fmt: skip
        module: Any = og.Sequential(*(one(kinds)() for _ in range(self.random.randint(1, 6))))
        if one((True, False)):
            module = copy.deepcopy(module)
        if one((True, False, False)):
            module = og.LayerNormMLP(width, 2 * width, activation=one(("gelu", "swiglu")))
        x = torch.randn(one(ROWS), width, requires_grad=True)

        def use() -> None:
            module(x).sum().backward()

        if one((True, False, False)):
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        else:
            use()
        with og.autocast(recipe=one(RECIPES)()), torch.no_grad():
            module(torch.randn(32, width))

    def round(self) -> None:
        """A few of each."""
        for _ in range(4):
            self.step()
        self.change()
        self.visitor()


def grown(counts: Sequence[dict[str, int]]) -> list[str]:
    """What grew from the second third of the counts to the last."""
    third = len(counts) // 3
    found = []
    for name in counts[0]:
        before, after = (
            [count[name] for count in part]
            for part in (counts[third : 2 * third], counts[2 * third :])
        )
        if min(after) > max(before) + SLACK.get(name, 0):
            found.append(f"{name}: {max(before)} at most, then {min(after)} at least")
    return found


def soak(seed: int, rounds: int, minutes: float = 0.0, every: int = 1) -> list[str]:
    """Live `rounds` rounds and at least so long; what grew, and what else is wrong."""
    live, counts = Soak(seed), []
    start, done = time.monotonic(), 0
    while done < rounds or time.monotonic() - start < 60 * minutes:
        live.round()
        done += 1
        if done % every == 0:
            counts.append(held())
            if sys.stderr.isatty():
                told = ", ".join(f"{name} {count}" for name, count in counts[-1].items())
                print(
                    f"\r{done} rounds, loss {live.losses[-1]:.3f}, {told}", end="", file=sys.stderr
                )
    while live.handles:
        live.handles.pop().unregister()
    wrong = grown(counts)
    quarter = len(live.losses) // 4
    first, last = (sum(part) / quarter for part in (live.losses[:quarter], live.losses[-quarter:]))
    if not last < first:
        wrong.append(f"the loss went from {first:.3f} to {last:.3f}")
    print(f"{done} rounds, {len(live.losses)} steps, loss {first:.4f} to {last:.4f}")
    print(f"in the second third: {counts[len(counts) // 3]}\nat the end: {counts[-1]}")
    return wrong


def main() -> int:
    """Soak, and say what grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wrong = soak(given.seed, 300, given.minutes, every=10)
    print("\n".join(wrong) or "nothing grew")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
