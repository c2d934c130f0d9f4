"""Training steps and inference of peers, checked against each other, called and sampled in turns.

A sample has two clocks. `host` is the wall time of enqueueing a few steps on a device that is idle
at the first of them, nothing being waited for: so few that their launches fit the device's queue
(1,024 on CUDA), after which the host would wait for the device. `wall` is that of more steps, from
an idle device to an idle device, by the step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import opsgraph as og
from benchmarks.peers import Block, Candidate, Context, Peer, make_weights, replay
from benchmarks.timing import spread, take_turns
from opsgraph.base import config

TRAINING, INFERENCE, FORWARD = "training", "inference", "forward with gradients"
KINDS = (TRAINING, INFERENCE)
WARM = 3
"""Calls before anything is compared: delayed scales come from what earlier steps saw."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
QUANTIZED_LIMIT = 0.5
"""The most relative error, by the norm: a wrong layout or another function has more than 1."""


def training_step(
    module: nn.Module,
    parameters: list[nn.Parameter],
    x: Tensor,
    dy: Tensor,
    context: Context | None = None,
) -> Tensor | None:
    """A training step without an optimizer, its gradients made anew. Returns that of x."""
    x.grad = None
    for parameter in parameters:
        parameter.grad = None
    forward(module, x, context).backward(dy)
    return x.grad


def forward(module: nn.Module, x: Tensor, context: Context | None = None) -> Tensor:
    """A forward, for gradients if x wants one."""
    if context is None:
        y: Tensor = module(x)
        return y
    with context():
        y = module(x)
    return y


def inference(module: nn.Module, x: Tensor, context: Context | None = None) -> Tensor:
    """A forward without gradients."""
    with torch.no_grad():
        return forward(module, x, context)


class Captured:
    """A call as a CUDA graph, captured after it ran on a stream of its own. It keeps the call."""

    def __init__(self, call: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        self.call, self.graph = call, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.result = call()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own stream there

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def calls_of(peer: Peer, x: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    """Every kind of call of a peer, on a leaf of its own."""
    leaf = x.clone().requires_grad_()
    parameters = list(peer.module.parameters())
    return {
        TRAINING: partial(training_step, peer.module, parameters, leaf, dy, peer.context),
        INFERENCE: partial(inference, peer.module, x, peer.context),
        FORWARD: partial(forward, peer.module, leaf, peer.context),
    }


def inputs(block: Block) -> tuple[Tensor, Tensor]:
    """This rank's rows of an input and of a gradient."""
    generator = torch.Generator(block.device).manual_seed(2)
    shape = block.rows // block.ranks, block.hidden
    made = (torch.randn(shape, generator=generator, device=block.device) for _ in range(2))
    x, dy = (tensor.to(block.dtype) for tensor in made)
    return x, dy


def _by_kind() -> dict[str, dict[str, Any]]:
    return {kind: {} for kind in (TRAINING, INFERENCE, FORWARD)}


@dataclass
class Prepared:
    """Calls by kind and candidate; the plans of opsgraph's; why others cannot be called."""

    calls: dict[str, dict[str, Callable[[], Any]]] = field(default_factory=_by_kind)
    activate: dict[str, Callable[[], Any]] = field(default_factory=dict)
    plans: dict[str, dict[str, str]] = field(default_factory=_by_kind)
    refused: dict[str, dict[str, str]] = field(default_factory=_by_kind)
    epochs: set[int] = field(default_factory=set)
    """`config.epoch` after each of opsgraph's modules was planned."""


def prepare(
    candidates: Mapping[str, Candidate],
    block: Block,
    kinds: Sequence[str] = KINDS,
    agree: Callable[[bool], bool] = lambda failed: failed,
) -> Prepared:
    """Build, warm up and compare. agree: whether a candidate failed on any rank."""
    made, weights = Prepared(), make_weights(block)
    x, dy = inputs(block)
    expected: dict[str, Tensor] = {}
    for name, candidate in candidates.items():
        with replay(candidate.replay):
            found, reason = attempt(partial(candidate.build, block, weights), agree)
            if reason is None:
                calls = calls_of(found, x, dy)
                made.activate[name] = found.activate
                found.activate()
            for kind in kinds:
                call, why = None, reason
                if reason is None:
                    ready = partial(_ready, candidate, calls[kind], block, expected, kind)
                    call, why = attempt(ready, agree)
                if why is not None:
                    made.refused[kind][name] = why
                    continue
                made.calls[kind][name] = call
                if isinstance(found.module, og.Sequential):
                    made.plans[kind][name] = _plan_of(found, kind, x)
                    made.epochs.add(config.epoch)
    return made


def attempt(
    make: Callable[[], Any], agree: Callable[[bool], bool] = lambda failed: failed
) -> tuple[Any, str | None]:
    """What was made, or why it was not: whatever a library says of itself or of the device."""
    try:
        made, reason = make(), None
    except Exception as error:
        told = str(error).strip().splitlines() or [""]
        made, reason = None, f"{type(error).__name__}: {told[0]}"
    if agree(reason is not None) and reason is None:
        made, reason = None, "it failed on another rank"
    return made, reason


def _ready(
    candidate: Candidate,
    call: Callable[[], Tensor],
    block: Block,
    expected: dict[str, Tensor],
    kind: str,
) -> Callable[[], Any]:
    """The call, warm and compared with the first candidate's; captured where that is asked for.

    Raises ValueError where the results are others'.
    """
    for _ in range(WARM):
        result = call()
    expected.setdefault(kind, result.detach().clone())
    limit = LIMITS[block.dtype] if block.recipe == "none" else QUANTIZED_LIMIT
    verify(result, expected[kind], limit)
    if not candidate.graph:
        return call
    graph = Captured(call)
    verify(graph(), expected[kind], limit)
    return graph


def verify(found: Tensor, expected: Tensor, limit: float) -> None:
    """Raises ValueError where the norm of the difference is more than `limit` of the norm."""
    found, expected = found.detach().float(), expected.float()
    error = float((found - expected).norm() / expected.norm())
    if not error <= limit:
        raise ValueError(f"the result is wrong: relative error {error:.3g}, at most {limit} is due")


def _plan_of(peer: Peer, kind: str, x: Tensor) -> str:
    """What a module of opsgraph runs."""
    with peer.context() if peer.context else nullcontext():
        return str(peer.module.plan(kind != INFERENCE, x))


class Sample(NamedTuple):
    """Seconds of one step by both clocks."""

    host: float
    wall: float


@dataclass(frozen=True)
class Clock:
    """How to sample. host, wall: steps by each clock; wall=0: one clock, as on a CPU."""

    repeats: int = 30
    host: int = 5
    wall: int = 20
    synchronize: Callable[[], Any] = lambda: None
    together: Callable[[], Any] = lambda: None
    """Waits for the other ranks, before a clock starts."""

    def sample(self, call: Callable[[], Any], activate: Callable[[], Any]) -> Sample:
        """One sample, after a call that warms caches."""
        activate()
        call()
        host = self._timed(call, self.host, False)
        return Sample(host, self._timed(call, self.wall, True) if self.wall else host)

    def _timed(self, call: Callable[[], Any], steps: int, finish: bool) -> float:
        self.synchronize()
        self.together()
        start = time.perf_counter()
        for _ in range(steps):
            call()
        if finish:
            self.synchronize()
        elapsed = time.perf_counter() - start
        self.synchronize()
        return elapsed / steps

    def method(self) -> str:
        """What was done, for the results."""
        told = (
            f"{self.repeats} samples of each candidate in alternation, garbage collector off, "
            f"medians and quartiles of seconds a call; host: {self.host} calls"
        )
        if not self.wall:
            return told
        return (
            f"{told} enqueued on an idle device, none waited for; "
            f"wall: {self.wall} calls and one synchronization at their end"
        )


def samples_of(prepared: Prepared, kind: str, clock: Clock) -> dict[str, list[Sample]]:
    """All samples of all candidates.

    Raises RuntimeError where modules planned anew meanwhile, and so all for one environment.
    """
    samplers = {
        name: partial(clock.sample, call, prepared.activate[name])
        for name, call in prepared.calls[kind].items()
    }
    found = take_turns(samplers, clock.repeats)
    if prepared.epochs - {config.epoch}:
        raise RuntimeError("modules of opsgraph planned anew after the first call of one of them")
    return found


def case_of(
    block: Block,
    kind: str,
    samples: Mapping[str, Sequence[Sample]],
    refused: Mapping[str, str],
    plans: Mapping[str, str],
) -> dict[str, Any]:
    """One record of the results."""
    return {
        "kind": kind,
        "recipe": block.recipe,
        "dtype": str(block.dtype).removeprefix("torch."),
        "rows": block.rows,
        "hidden": block.hidden,
        "ffn": block.ffn,
        "ranks": block.ranks,
        "seconds": {
            name: {
                "host": spread([sample.host for sample in each]),
                "wall": spread([sample.wall for sample in each]),
            }
            for name, each in samples.items()
        },
        "refused": dict(refused),
        "plans": dict(plans),
    }
