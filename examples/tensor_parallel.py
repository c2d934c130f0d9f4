"""Train the language model of `byte_lm.py` with its weights split over ranks, then in one process.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py            # about a minute on two cores
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --steps 20 --layers 1

Attention heads and MLPs are tensor-parallel: each rank holds a share of their weights. Between
them the model is sequence-parallel: each rank holds its own rows of the batch, which a
column-parallel Linear gathers and a row-parallel one scatters. Both models start from the same
weights and see the same batches. On CPUs the ranks talk through Gloo, on GPUs through NCCL.

The exit code is 1 if the two loss curves differ by more than is allowed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch._dynamo  # which, imported while there is a group, keeps its threads past its end
import torch.distributed as dist
from byte_lm import (
    EARLY_STEPS,
    EPS,
    HEAD_WIDTH,
    TOLERANCE,
    ByteLM,
    draw_batch,
    fused_parts,
    learning_rate,
    load_text,
    loss_of,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import opsgraph as og
from opsgraph.ops import Add, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.parallel import gather_state_dict, shard_state_dict

COLUMN = dict(tensor_parallel_mode="column", sequence_parallel=True, bias=False)
ROW = dict(tensor_parallel_mode="row", sequence_parallel=True, bias=False)


def parallel_parts(hidden: int, ffn: int) -> tuple[nn.Module, nn.Module]:
    """`byte_lm.fused_parts`, split over all ranks; all that differs is in COLUMN and ROW.

    partition_stride: query, key and value are split separately, and so are gate and value.
    """
    qkv = og.Sequential(
        RMSNorm(hidden, eps=EPS), Linear(hidden, 3 * hidden, partition_stride=3, **COLUMN)
    )
    mlp = og.Sequential(
        Tee("residual"),
        RMSNorm(hidden, eps=EPS),
        Linear(hidden, 2 * ffn, partition_stride=2, **COLUMN),
        SwiGLU(),
        Linear(ffn, hidden, **ROW),
        Add("residual"),
    )
    return qkv, mlp


def parallel_model(hidden: int, layers: int, context: int) -> ByteLM:
    """The model of one rank: its heads, its share of the MLPs, all of embedding and head."""
    model = ByteLM(parallel_parts, hidden, layers, context)
    for block in model.blocks:
        block.projection = Linear(hidden, hidden, **ROW)
    return model


def parallel_step(model: nn.Module, batch: Tensor) -> float:
    """Gradients of the mean loss over all ranks' rows, clipped as in one process; the loss.

    What ranks do not split (norms, embedding, head) has seen this rank's rows alone: those
    gradients are summed. The norm of all gradients counts every share once.
    """
    ranks = dist.get_world_size()
    loss = loss_of(model, batch.chunk(ranks)[dist.get_rank()]) / ranks
    loss.backward()
    shares, whole = [], []
    for parameter in model.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            shares.append(parameter.grad)
        else:
            dist.all_reduce(parameter.grad)
            whole.append(parameter.grad)
    square = get_total_norm(shares).square()
    dist.all_reduce(square)
    norm = (square + get_total_norm(whole).square()).sqrt()
    clip_grads_with_norm_(model.parameters(), 1.0, norm)
    total = loss.detach()
    dist.all_reduce(total)
    return total.item()


def whole_step(model: nn.Module, batch: Tensor) -> float:
    """The same in one process."""
    loss = loss_of(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def train(
    model: nn.Module, step: Callable[[nn.Module, Tensor], float], args: argparse.Namespace
) -> list[float]:
    """The loss of every step."""
    device = next(model.parameters()).device
    data = load_text(str(device))[0]
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for k in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, k, k / args.steps)
        optimizer.zero_grad(set_to_none=True)
        losses.append(step(model, draw_batch(data, args.batch, args.context, generator)))
        optimizer.step()
    return losses


def show(parallel: list[float], alone: list[float], every: int) -> bool:
    """Print both curves and what they differ by; whether that is allowed."""
    gaps = [abs(a - b) for a, b in zip(parallel, alone, strict=True)]
    ranks = f"{dist.get_world_size()} ranks"
    print(f"{'step':>6}{ranks:>12}{'one process':>14}{'difference':>14}")
    for k, (ours, theirs) in enumerate(zip(parallel, alone, strict=True)):
        if k % every == 0 or k + 1 == len(gaps):
            print(f"{k:>6}{ours:>12.4f}{theirs:>14.4f}{gaps[k]:>14.1e}")
    early, anywhere = TOLERANCE[torch.float32]
    print(
        f"largest difference in the first {min(EARLY_STEPS, len(gaps))} steps: "
        f"{max(gaps[:EARLY_STEPS]):.1e} nats (allowed {early:g}), "
        f"in all {len(gaps)}: {max(gaps):.1e} (allowed {anywhere:g})"
    )
    return max(gaps[:EARLY_STEPS]) <= early and max(gaps) <= anywhere


def weight_gap(parallel: ByteLM, alone: ByteLM) -> float:
    """The largest difference between the gathered weights and those of one process."""
    whole = gather_state_dict(parallel)
    return max(float((v - whole[k]).abs().max()) for k, v in alone.state_dict().items())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=128, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="bytes per row")
    parser.add_argument("--batch", type=int, default=16, help="rows per step, over all ranks")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=10, help="steps between printed losses")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    ranks = int(os.environ["WORLD_SIZE"])
    if args.batch % ranks or args.hidden % (HEAD_WIDTH * ranks) or args.steps < 1:
        parser.error(f"{ranks} ranks must divide --batch and --hidden / {HEAD_WIDTH}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Train on all ranks, then on the first alone, and compare; the exit code."""
    args = parse(arguments)
    here = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", here) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    first = dist.get_rank() == 0
    sizes = args.hidden, args.layers, args.context

    torch.manual_seed(args.seed)
    whole = ByteLM(fused_parts, *sizes).to(device)
    parallel = parallel_model(*sizes).to(device)
    parallel.load_state_dict(shard_state_dict(whole.state_dict(), parallel))
    if first:
        counts = [sum(p.numel() for p in model.parameters()) for model in (whole, parallel)]
        print(f"{counts[0]:,} parameters, {counts[1]:,} of them on each rank, {device.type}\n")
        print("The plan of one MLP block on a rank:")
        print(parallel.blocks[0].mlp.plan(), "\n")

    losses = train(parallel, parallel_step, args)
    agree = True
    if first:  # the others wait in the broadcast
        agree = show(losses, train(whole, whole_step, args), args.every)
    result = torch.tensor([agree], device=device)
    dist.broadcast(result, 0)
    gap = weight_gap(parallel, whole)
    if first:
        print(f"largest difference of a weight afterwards: {gap:.1e}")
        if not agree:
            print("FAILED: the two loss curves differ by more than is allowed")
    dist.destroy_process_group()
    return 0 if result.item() else 1


if __name__ == "__main__":
    sys.exit(main())
