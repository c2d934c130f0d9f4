"""Train the byte-level language model of `byte_lm.py` in bf16 and under every recipe.

With a seed all runs start from the same weights and see the same batches; weights are fp32, under
bf16 autocast. The linear layers of the attention's input and of the MLP blocks are opsgraph's, and
a recipe quantizes the operands of their three products. Where the device has no FP8 GEMM, as a CPU,
the same bits of data and scale are multiplied by an exact emulation.

    python examples/fp8_training.py                                  # 20 minutes on two cores
    python examples/fp8_training.py --steps 10 --layers 1 --seeds 1  # a quick look

Each recipe has to end within 3% of the loss in bf16 (the mean of the last 20 steps and of all
seeds: one seed's runs end up to 4% apart); the exit code is 1 if one does not. The loss curves go
into `demo/fp8_loss.png`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from byte_lm import ByteLM, draw_batch, fused_parts, learning_rate, load_text, loss_of
from torch import nn

import opsgraph as og
from opsgraph.precision import recipe

RECIPES = {
    "bf16": None,
    "Float8CurrentScaling": recipe.Float8CurrentScaling(),
    "DelayedScaling": recipe.DelayedScaling(amax_history_len=16),
    "Float8BlockScaling": recipe.Float8BlockScaling(),
    "MXFP8BlockScaling": recipe.MXFP8BlockScaling(),
    "NVFP4BlockScaling": recipe.NVFP4BlockScaling(),
}
ALLOWED = 0.03
LAST = 20


def make_model(args: argparse.Namespace, seed: int) -> ByteLM:
    """The same weights for every run with a seed."""
    torch.manual_seed(seed)
    model = ByteLM(fused_parts, args.hidden, args.layers, args.context)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return model.to(args.device)


def train(
    chosen: recipe.Recipe | None, data: torch.Tensor, args: argparse.Namespace, seed: int
) -> list[float]:
    """The loss of every step."""
    model = make_model(args, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    batches = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, step, step / args.steps)
        batch = draw_batch(data, args.batch, args.context, batches)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, torch.bfloat16), og.autocast(chosen is not None, chosen):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_plan(args: argparse.Namespace) -> None:
    """One MLP block under delayed scaling: which steps quantize, and what multiplies."""
    block = make_model(args, 0).blocks[0].mlp
    with torch.autocast(args.device, torch.bfloat16), og.autocast(recipe=RECIPES["DelayedScaling"]):
        print(block.plan())


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The loss curves, means of all seeds, and each one's ratio to that of bf16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    for name, losses in curves.items():
        top.plot(losses, lw=1, label=name)
        if name != "bf16":
            ratios = [a / b for a, b in zip(losses, curves["bf16"], strict=True)]
            bottom.plot(ratios, lw=0.8)
        else:
            bottom.plot([1.0] * len(losses), lw=0.8)
    top.set_ylabel("training loss, nats per byte")
    top.legend()
    bottom.set_ylabel("loss / bf16's")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="bytes per row")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the picture goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, draw; the exit code."""
    args = parse(arguments)
    data, _ = load_text(args.device)
    show_plan(args)
    print(f"\n{'recipe':<24}{'last loss':>12}{'over bf16':>12}{'seconds':>10}")
    curves: dict[str, list[float]] = {}
    good = True
    for name, chosen in RECIPES.items():
        start = time.perf_counter()
        runs = [train(chosen, data, args, seed) for seed in range(args.seeds)]
        curves[name] = [statistics.mean(losses) for losses in zip(*runs, strict=True)]
        last, plain = (statistics.mean(curves[n][-LAST:]) for n in (name, "bf16"))
        seconds = time.perf_counter() - start
        print(f"{name:<24}{last:>12.4f}{last / plain - 1:>12.2%}{seconds:>10.0f}", flush=True)
        good = good and abs(last / plain - 1) <= ALLOWED
    args.out.mkdir(parents=True, exist_ok=True)
    draw(curves, args.out / "fp8_loss.png")
    print(f"wrote {args.out / 'fp8_loss.png'}")
    if not good:
        print(f"FAILED: a recipe ends more than {ALLOWED:.0%} from bf16")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
