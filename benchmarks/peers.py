"""RMSNorm, Linear, SwiGLU, Linear without biases, as each library has its users build them.

A builder takes a Block and its weights and gives a Peer. Libraries are imported by their builders
alone: one that is missing, or refuses the device, costs its own column and nothing else.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU

EPS = 1e-5
REPLAY = "OPSGRAPH_REPLAY"
OVERLAP = ("ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad")
RECIPES = {
    "none": "",
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blocks": "Float8BlockScaling",
    "mx": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
"""Classes of opsgraph.recipe, and of TransformerEngine's recipes, by a short name."""

NEEDS = {"current": (8, 9), "delayed": (8, 9), "blocks": (9, 0), "mx": (10, 0), "nvfp4": (10, 0)}
"""The compute capability from which on a GPU multiplies what a recipe quantizes to."""

# torch 2.13 and 2.14 deprecate the older names, 2.15 does not.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Weights = tuple[Tensor, Tensor, Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Block:
    """One size of the block. rows: of all ranks together; recipe: a key of RECIPES."""

    rows: int
    hidden: int
    ffn: int
    dtype: torch.dtype
    device: torch.device
    recipe: str = "none"
    ranks: int = 1

    @property
    def place(self) -> dict[str, Any]:
        """Where parameters and inputs are."""
        return {"device": self.device, "dtype": self.dtype}


class Peer(NamedTuple):
    """A module, and what its calls run under: `with context():`, or nothing where it is None.

    activate: puts this peer's part of its library's global state in place; called out of the clock.
    """

    module: nn.Module
    context: Context | None = None
    activate: Callable[[], Any] = lambda: None


Builder = Callable[[Block, Weights], Peer]


class TorchSwiGLU(nn.Module):
    """silu(a) * b of the two halves, as one writes it in PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `[*, 2 * width]`."""
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


class _Gather(torch.autograd.Function):
    """`[rows, width]` to `[ranks * rows, width]`; gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0] * dist.get_world_size(), *x.shape[1:])
        all_gather(y, x.contiguous())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        dx = dy.new_empty(dy.shape[0] // dist.get_world_size(), *dy.shape[1:])
        reduce_scatter(dx, dy.contiguous())
        return dx


class _Scatter(torch.autograd.Function):
    """The sum over ranks, of which each has its rows; gradients are gathered."""

    forward = staticmethod(_Gather.backward)
    backward = staticmethod(_Gather.forward)


class GatherRows(nn.Module):
    """All ranks' rows, by a plain all-gather."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `[rows, width]`, this rank's."""
        return _Gather.apply(x)


class ScatterRows(nn.Module):
    """This rank's rows of the sum over ranks, by a plain reduce-scatter."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `[ranks * rows, width]`."""
        return _Scatter.apply(x)


def make_weights(block: Block) -> Weights:
    """The norm's `[hidden]`, and this rank's parts of FC1 and FC2, all from one seed."""
    rank = dist.get_rank() if block.ranks > 1 else 0
    shared, own = (torch.Generator(block.device).manual_seed(seed) for seed in (0, 1 + rank))
    normal = partial(torch.randn, device=block.device)
    ffn = block.ffn // block.ranks
    return (
        (1 + 0.1 * normal(block.hidden, generator=shared)).to(block.dtype),
        (normal(2 * ffn, block.hidden, generator=own) / block.hidden**0.5).to(block.dtype),
        (normal(block.hidden, ffn, generator=own) / block.ffn**0.5).to(block.dtype),
    )


def load(module: nn.Module, weights: Iterable[Tensor]) -> None:
    """Copy weights into parameters of the same shapes, the first into the first.

    Raises ValueError for a parameter that no weight fits, and for weights that are left.
    """
    left = list(weights)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fits = [k for k, weight in enumerate(left) if weight.shape == parameter.shape]
            if not fits:
                raise ValueError(f"got no weight for {name} of shape {tuple(parameter.shape)}")
            parameter.copy_(left.pop(fits[0]))
    if left:
        raise ValueError(f"got {len(left)} weights more than parameters")


def eager(block: Block, weights: Weights) -> Peer:
    """torch.nn; over ranks with NCCL's (or Gloo's) all-gather and reduce-scatter."""
    ffn = block.ffn // block.ranks
    split = block.ranks > 1
    module = nn.Sequential(
        nn.RMSNorm(block.hidden, eps=EPS, **block.place),
        *([GatherRows()] if split else []),
        nn.Linear(block.hidden, 2 * ffn, bias=False, **block.place),
        TorchSwiGLU(),
        nn.Linear(ffn, block.hidden, bias=False, **block.place),
        *([ScatterRows()] if split else []),
    )
    load(module, weights)
    return Peer(module)


def compiled(block: Block, weights: Weights) -> Peer:
    """The same under torch.compile."""
    made: Any = torch.compile(eager(block, weights).module)
    return Peer(made)


def liger(block: Block, weights: Weights) -> Peer:
    """Liger's norm and its SwiGLU MLP, which has the gate and the value as two Linears."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    config = SimpleNamespace(
        hidden_size=block.hidden, intermediate_size=block.ffn, hidden_act="silu"
    )
    with block.device:
        module = nn.Sequential(LigerRMSNorm(block.hidden, eps=EPS), LigerSwiGLUMLP(config))
    module.to(**block.place)
    norm, fc1, fc2 = weights
    load(module, (norm, *fc1.chunk(2), fc2))
    return Peer(module)


def quack(block: Block, weights: Weights) -> Peer:
    """QuACK's norm and MLP, whose first weight has gate and value rows in turns."""
    from quack.mlp import MLP
    from quack.rmsnorm import QuackRMSNorm

    module = nn.Sequential(
        QuackRMSNorm(block.hidden, eps=EPS),
        MLP(block.hidden, block.ffn, activation="swiglu", **block.place),
    ).to(**block.place)
    norm, fc1, fc2 = weights
    load(module, (norm, torch.stack(fc1.chunk(2), 1).flatten(0, 1), fc2))
    return Peer(module)


def torchao(block: Block, weights: Weights) -> Peer:
    """torch.nn under torchao's current scaling by tensors, compiled as its users are told to."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    module = convert_to_float8_training(eager(block, weights).module, config=config)
    made: Any = torch.compile(module)
    return Peer(made)


def engine_mlp(block: Block, weights: Weights) -> Peer:
    """TransformerEngine's LayerNormMLP."""
    import transformer_engine.pytorch as te

    split: dict[str, Any] = {}
    if block.ranks > 1:
        group = dist.group.WORLD
        split = dict(tp_group=group, tp_size=block.ranks)
        split |= dict(set_parallel_mode=True, sequence_parallel=True)
    module = te.LayerNormMLP(
        block.hidden,
        block.ffn,
        eps=EPS,
        bias=False,
        normalization="RMSNorm",
        activation="swiglu",
        params_dtype=block.dtype,
        device=block.device,
        **split,
    )
    load(module, weights)
    return _engine_peer(block, module)


def engine_ops(block: Block, weights: Weights) -> Peer:
    """TransformerEngine's Sequential of ops."""
    from transformer_engine.pytorch import ops

    column, row = _split(block)
    module = ops.Sequential(
        ops.RMSNorm(block.hidden, eps=EPS, **block.place),
        ops.Linear(block.hidden, 2 * block.ffn, bias=False, **block.place, **column),
        ops.SwiGLU(),
        ops.Linear(block.ffn, block.hidden, bias=False, **block.place, **row),
    )
    load(module, weights)
    return _engine_peer(block, module)


def _split(block: Block) -> tuple[dict[str, Any], dict[str, Any]]:
    """How FC1 and FC2 are split, in the words that opsgraph and TransformerEngine's ops share."""
    if block.ranks == 1:
        return {}, {}
    shared = dict(tensor_parallel_group=dist.group.WORLD, sequence_parallel=True)
    column, row = dict(tensor_parallel_mode="column"), dict(tensor_parallel_mode="row")
    return column | shared, row | shared


def _engine_peer(block: Block, module: nn.Module) -> Peer:
    """With a recipe's context, and a global state of the module's own.

    TransformerEngine updates the delayed scales of all modules there are whenever a context ends:
    each peer would pay for the others.
    """
    if block.recipe == "none":
        return Peer(module)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    made = getattr(recipes, RECIPES[block.recipe])()
    group = dist.group.WORLD if block.ranks > 1 else None
    context = partial(te.autocast, enabled=True, recipe=made, amax_reduction_group=group)
    field = "quantization_state"
    if not hasattr(FP8GlobalStateManager, field):  # older ones have no object that holds it all
        return Peer(module, context)
    own = type(getattr(FP8GlobalStateManager, field))()
    return Peer(module, context, partial(setattr, FP8GlobalStateManager, field, own))


_shorter = count()


def ours(
    block: Block, weights: Weights, overlap: tuple[str, ...] = (), prefix: str = "", **options: Any
) -> Peer:  # fmt: skip
    """opsgraph's Sequential. prefix: of the names of its ops; options: how it plans."""
    column, row = _split(block)
    layers = (
        RMSNorm(block.hidden, eps=EPS, **block.place),
        Linear(block.hidden, 2 * block.ffn, bias=False, overlap=overlap, **column, **block.place),
        SwiGLU(),
        Linear(block.ffn, block.hidden, bias=False, overlap=overlap, **row, **block.place),
    )
    named = OrderedDict((f"{prefix}{k}", each) for k, each in enumerate(layers))
    module = og.Sequential(named, **options)
    load(module, weights)
    if block.recipe == "none":
        return Peer(module)
    kind = getattr(og.recipe, RECIPES[block.recipe])
    # All modules under equal recipes are updated at once: each peer would pay for the others. So
    # each has a recipe of its own, which asks for a history one update shorter.
    delayed = block.recipe == "delayed"
    made = kind(amax_history_len=1024 - next(_shorter)) if delayed else kind()
    group = dist.group.WORLD if block.ranks > 1 else None
    return Peer(module, partial(og.autocast, True, made, group))


@contextmanager
def replay(on: bool) -> Iterator[None]:
    """Modules that are made and first called inside replay their passes natively, or do not.

    A module reads the environment when it is planned, and again after `config.touch`, which is
    why nothing here calls that: it would make modules of another setting plan anew.
    """
    before = os.environ.get(REPLAY)
    os.environ[REPLAY] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[REPLAY]
        else:
            os.environ[REPLAY] = before


class Candidate(NamedTuple):
    """A column. replay: of opsgraph's passes; graph: its calls are captured as CUDA graphs."""

    build: Builder
    replay: bool = True
    graph: bool = False
    recipes: bool = True
    """Whether it knows recipes. nn.Sequential does not, and stands beside them all the same."""


CANDIDATES = {
    "nn.Sequential": Candidate(eager),
    "torch.compile": Candidate(compiled, recipes=False),
    "Liger": Candidate(liger, recipes=False),
    "TE LayerNormMLP": Candidate(engine_mlp),
    "te.ops": Candidate(engine_ops),
    "opsgraph (Python)": Candidate(ours, replay=False),
    "opsgraph": Candidate(ours),
    "opsgraph (CUDA graph)": Candidate(ours, graph=True),
}
ON_RANKS = {
    name: CANDIDATES[name]
    for name in ("nn.Sequential", "TE LayerNormMLP", "te.ops", "opsgraph (Python)")
} | {
    "opsgraph": Candidate(ours),
    "opsgraph (recompute=False)": Candidate(partial(ours, recompute=False)),
    "opsgraph (symmetric)": Candidate(partial(ours, overlap=OVERLAP)),
}
ON_CPU = {name: CANDIDATES[name] for name in ("nn.Sequential", "opsgraph (Python)")} | {
    "opsgraph": Candidate(ours)
}


EXTRAS = {"quack": Candidate(quack, recipes=False)}
BY_RECIPE = {"current": {"torchao": Candidate(torchao)}}
"""Columns of `benchmarks.gpu` beside those of CANDIDATES; the latter under one recipe alone."""


def candidates_for(known: dict[str, Candidate], recipe: str) -> dict[str, Candidate]:
    """The columns under a recipe."""
    return {name: each for name, each in known.items() if each.recipes or recipe == "none"}


def lacking(recipe: str, device: torch.device) -> str | None:
    """Why a device cannot run a recipe in hardware, or None."""
    if recipe == "none" or device.type != "cuda":
        return None
    there, needed = torch.cuda.get_device_capability(device), NEEDS[recipe]
    if there >= needed:
        return None
    return f"compute capability is {there[0]}.{there[1]}, expected {needed[0]}.{needed[1]} or later"
