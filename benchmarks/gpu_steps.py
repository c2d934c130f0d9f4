"""Training steps of RMSNorm, Linear, SwiGLU, Linear without biases, beside other libraries.

All recipes and libraries of a size take turns, and so do the step's six products as PyTorch
computes them, which is what a step in bf16 cannot be much faster than.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import device_time
from benchmarks.calls import (
    LIMITS,
    QUANTIZED_LIMIT,
    TRAINING,
    WARM,
    Captured,
    attempt,
    calls_of,
    forward,
    inputs,
    verify,
)
from benchmarks.gpu_parts import DEVICE, Case, Options, Size, Task, free, synchronize
from benchmarks.peers import (
    BY_RECIPE,
    CANDIDATES,
    EXTRAS,
    Block,
    Candidate,
    Weights,
    candidates_for,
    lacking,
    make_weights,
    replay,
)
from benchmarks.timing import alternate

OURS, REFERENCE, PRODUCTS = "opsgraph", "nn.Sequential", "six products"
OTHER_KINDS = ("opsgraph (Python)", "opsgraph (CUDA graph)")
"""Columns of `benchmarks.overhead`: ours too, called in other ways."""
KNOWN = CANDIDATES | EXTRAS
SLOW_TO_COMPILE = ("torch.compile", "Liger", "torchao", "quack")
WALL_CALLS = 3


class Column(NamedTuple):
    """A library under a recipe, warm and compared."""

    recipe: str
    peer: str
    module: nn.Module
    step: Callable[[], Any]
    forward: Callable[[], Any]
    half: Callable[[], Any]
    """The forward of the first half of the rows."""
    activate: Callable[[], Any]

    @property
    def name(self) -> str:
        """`current/opsgraph`."""
        return f"{self.recipe}/{self.peer}"


def block_of(size: Size, recipe: str) -> Block:
    """The block of a size on the GPU."""
    known = "none" if recipe == "bf16" else recipe
    return Block(*size, torch.bfloat16, DEVICE, known)


def candidates(recipe: str, options: Options) -> dict[str, Candidate]:
    """What is measured under a recipe."""
    known = KNOWN | (BY_RECIPE.get(recipe, {}))
    chosen = candidates_for(known, "none" if recipe == "bf16" else recipe)
    left_out = {*options.without, *(OTHER_KINDS if recipe == "bf16" else (*OTHER_KINDS, REFERENCE))}
    return {
        name: each
        for name, each in chosen.items()
        if name not in left_out and (options.peers or name == OURS)
    }


def build(
    block: Block,
    recipe: str,
    name: str,
    candidate: Candidate,
    weights: Weights,
    expected: list[Any],
) -> Column:
    """A column; the first that is built says what the others are compared with."""
    x, dy = inputs(block)
    with replay(candidate.replay):
        peer = candidate.build(block, weights)
        calls = calls_of(peer, x, dy)
        peer.activate()
        for _ in range(WARM):
            result = calls[TRAINING]()
        if not expected:
            expected.append(result.detach().clone())
        limit = LIMITS[block.dtype] if block.recipe == "none" else QUANTIZED_LIMIT
        verify(result, expected[0], limit)
    leaf = x.clone().requires_grad_()
    half = x[: len(x) // 2].clone().requires_grad_()
    whole, part = (partial(forward, peer.module, given, peer.context) for given in (leaf, half))
    return Column(recipe, name, peer.module, calls[TRAINING], whole, part, peer.activate)


def columns(
    size: Size, options: Options, expected: list[Any], refused: dict[str, str]
) -> Iterator[Column]:
    """All columns that can be built."""
    weights = make_weights(block_of(size, "bf16"))
    for recipe in options.recipes:
        block = block_of(size, recipe)
        why = lacking(block.recipe, block.device)
        if why is not None:
            refused[recipe] = why
            continue
        for name, candidate in candidates(recipe, options).items():
            made, reason = attempt(
                partial(build, block, recipe, name, candidate, weights, expected)
            )
            if reason is not None:
                refused[f"{recipe}/{name}"] = reason
            else:
                yield made


def products(size: Size) -> Callable[[], Any]:
    """The six products of a step, each as PyTorch's autograd calls it."""
    rows, hidden, ffn = size
    new = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    x, dy, y, dz = new(rows, hidden), new(rows, hidden), new(rows, ffn), new(rows, 2 * ffn)
    fc1, fc2 = new(2 * ffn, hidden) / hidden**0.5, new(hidden, ffn) / ffn**0.5

    def call() -> None:
        F.linear(x, fc1)
        F.linear(y, fc2)
        dy.mm(fc2)
        dy.t().mm(y)
        dz.mm(fc1)
        dz.t().mm(x)

    return call


def saved_bytes(module: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps, parameters apart."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    del y
    return sum(held.values())


def saved_by_rows(column: Column) -> int:
    """Of the bytes that autograd keeps, those that go with the rows."""
    whole, half = (saved_bytes(column.module, call) for call in (column.forward, column.half))
    return 2 * (whole - half)


def memory(column: Column) -> dict[str, Any]:
    """Bytes: saved, held between forward and backward but for the output, and a step's peak.

    Saved are those that go with the rows: weights in low precision are saved once for all rows.
    The two others are what the allocator gave beyond what was there before, without gradients.
    """
    column.activate()
    saved, reason = attempt(partial(saved_by_rows, column))
    column.module.zero_grad(set_to_none=True)
    synchronize()
    before = torch.cuda.memory_allocated()
    y = column.forward()
    kept = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    del y
    column.module.zero_grad(set_to_none=True)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    column.step()
    synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found = {"saved_bytes": saved, "held_bytes": kept, "peak_bytes": peak}
    return found if reason is None else found | {"saved_refused": reason}


def graph_of(column: Column, expected: Tensor) -> Callable[[], Any]:
    """The step as a CUDA graph. Raises what the capture raises."""
    if column.recipe != "bf16" and column.peer != OURS:
        raise NotImplementedError("its recipes are captured by its own make_graphed_callables only")
    column.activate()
    graph = Captured(column.step)
    verify(
        graph(), expected, LIMITS[torch.bfloat16] if column.recipe == "bf16" else QUANTIZED_LIMIT
    )
    return graph


def activated(column: Column) -> Callable[[], Any]:
    """A step with this column's global state."""

    def call() -> None:
        column.activate()
        column.step()

    return call


def measure(size: Size, options: Options) -> dict[str, Any]:
    """The record of one size; milliseconds and bytes."""
    torch._dynamo.reset()
    refused: dict[str, str] = {}
    expected: list[Any] = []
    if not options.peers:  # still compared, but not timed
        block = block_of(size, "bf16")
        build(block, "bf16", REFERENCE, CANDIDATES[REFERENCE], make_weights(block), expected)
    found = {column.name: column for column in columns(size, options, expected, refused)}
    records: dict[str, dict[str, Any]] = {name: {} for name in (*found, PRODUCTS)}
    for name, column in found.items():
        told, reason = attempt(partial(memory, column))
        records[name] |= told if reason is None else {}
        if reason is not None:
            refused[f"{name}, memory"] = reason
    steps = {name: activated(column) for name, column in found.items()}
    steps[PRODUCTS] = products(size)
    # What runs before a sample is the same for all, too: a chip's clock follows it.
    before = steps[PRODUCTS]
    for name, samples in device_time.measure(steps, options.repeats, before).items():
        records[name] |= device_time.summary(samples)
    graphs: dict[str, Callable[[], Any]] = {}
    for name in steps:
        make = partial(graph_of, found[name], expected[0]) if name in found else None
        graph, reason = attempt(make or partial(Captured, steps[name]))
        if reason is None:
            graphs[name] = graph
        else:
            refused[f"{name}, as a graph"] = reason
    for key, calls in (("wall_ms", steps), ("graph_ms", graphs)):
        seconds = alternate(calls, options.walls, WALL_CALLS, synchronize)
        for name, each in seconds.items():
            records[name][key] = each * 1e3
    rows, hidden, ffn = size
    del found, steps, graphs
    free()
    return {"rows": rows, "hidden": hidden, "ffn": ffn, "columns": records, "refused": refused}


def cases(options: Options) -> Iterator[Case]:
    """One for each size."""
    for size in options.sizes:
        rows, hidden, ffn = size
        step = rows * hidden * ffn * 18 / 7e14  # seconds of the six products
        wanted = sum(len(candidates(recipe, options)) for recipe in options.recipes)
        calls = 2 * options.repeats + 2 * options.walls * (WALL_CALLS + 1) + 10
        seconds = 2 + wanted * (0.3 + calls * step) + (6 if options.peers else 0)
        yield Case("x".join(map(str, size)), seconds, partial(measure, size, options))


def compile_one(size: Size, recipe: str, name: str) -> None:
    """Compile what a column needs, by building it."""
    block = block_of(size, recipe)
    candidate = (KNOWN | BY_RECIPE.get(recipe, {}))[name]
    build(block, recipe, name, candidate, make_weights(block), [])
    synchronize()


def tasks(options: Options) -> Iterator[Task]:
    """What compiles kernels: opsgraph under each recipe, torch.compile and Liger."""
    for size in options.sizes:
        for recipe in options.recipes:
            for name in candidates(recipe, options):
                if name == OURS or name in SLOW_TO_COMPILE:
                    label = f"{'x'.join(map(str, size))} {recipe}/{name}"
                    yield Task(label, compile_one, (size, recipe, name))
