"""Train a small Llama-style byte-level language model twice, with opsgraph and without it.

Both models start from the same weights and see the same batches. In the first, every norm+MLP
block is one opsgraph Sequential with the residual inside it, and so are the attention's norm and
projection; the second is plain PyTorch. The text is the English of Python's own manual,
`pydoc_data.topics`, so nothing is downloaded. On the CPU everything is fp32, on CUDA bf16.

    python examples/byte_lm.py                        # about two minutes on two cores
    python examples/byte_lm.py --steps 20 --layers 1  # a quick look

The exit code is 1 if the two loss curves differ by more than the tolerances below.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Add, Linear, RMSNorm, SwiGLU, Tee

EPS = 1e-5
HEAD_WIDTH = 32
STEPS = 800
EARLY_STEPS = 50
# Largest allowed difference of the two training losses, in nats: within the first EARLY_STEPS
# steps, and anywhere. Two correct implementations round differently, and training amplifies that:
# measured in fp32, 5e-7 in the first 50 steps, 1e-3 (at worst 5e-3) after 400. So the second bound
# is wider; the first is the one that a wrong gradient breaks, within a few steps.
TOLERANCE = {torch.float32: (1e-4, 5e-2), torch.bfloat16: (5e-2, 3e-1)}

console = Console(highlight=False)


def fused_parts(hidden: int, ffn: int) -> tuple[nn.Module, nn.Module]:
    """The attention's norm and projection, and the whole norm+MLP block, as opsgraph runs.

    This and `plain_parts` are all that differs between the two models.
    """
    qkv = og.Sequential(RMSNorm(hidden, eps=EPS), Linear(hidden, 3 * hidden, bias=False))
    mlp = og.Sequential(
        Tee("residual"),
        RMSNorm(hidden, eps=EPS),
        Linear(hidden, 2 * ffn, bias=False),
        SwiGLU(),
        Linear(ffn, hidden, bias=False),
        Add("residual"),
    )
    return qkv, mlp


class PlainMLP(nn.Module):
    """x + W2 (silu(gate) * value), where gate is the first half of W1 norm(x)."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=EPS)
        self.fc1 = nn.Linear(hidden, 2 * ffn, bias=False)
        self.fc2 = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(self.norm(x)).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * value)


def plain_parts(hidden: int, ffn: int) -> tuple[nn.Module, nn.Module]:
    """The same two modules in plain PyTorch, their parameters in the same order."""
    norm = nn.RMSNorm(hidden, eps=EPS)
    qkv = nn.Sequential(norm, nn.Linear(hidden, 3 * hidden, bias=False))
    return qkv, PlainMLP(hidden, ffn)


class Block(nn.Module):
    """Causal attention with rotary positions, then the norm+MLP block."""

    def __init__(self, qkv: nn.Module, mlp: nn.Module, hidden: int) -> None:
        super().__init__()
        self.qkv, self.mlp = qkv, mlp
        self.projection = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH))  # [batch, length, 3, heads, width]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mlp(x + self.projection(mixed.transpose(1, 2).flatten(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turn the pairs (x[i], x[i + width/2]) by the position's angle."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class ByteLM(nn.Module):
    """Logits of the next byte, [batch, length, 256], from bytes [batch, length]."""

    def __init__(
        self,
        parts: Callable[[int, int], tuple[nn.Module, nn.Module]],
        hidden: int,
        layers: int,
        context: int,
    ) -> None:
        super().__init__()
        ffn = (8 * hidden // 3 + 31) // 32 * 32
        self.embedding = nn.Embedding(256, hidden)
        self.blocks = nn.ModuleList(Block(*parts(hidden, ffn), hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=EPS)
        self.head = nn.Linear(hidden, 256, bias=False)
        rate = 10_000 ** -torch.linspace(0, 1, HEAD_WIDTH // 2 + 1)[:-1]
        angle = torch.outer(torch.arange(context), rate)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each byte of `batch` [rows, context + 1] but the first."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@dataclass
class Run:
    """A model, its optimizer, and what training it has shown so far."""

    name: str
    model: ByteLM
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved: int = 0

    def step(self, batch: Tensor, learning_rate: float) -> None:
        """One step of training, timed until its loss is on the host."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def make_runs(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[Run, Run]:
    """The opsgraph model and the plain one, from the same weights."""
    torch.manual_seed(args.seed)
    plain = ByteLM(plain_parts, args.hidden, args.layers, args.context)
    fused = ByteLM(fused_parts, args.hidden, args.layers, args.context)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
        for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
            ours.copy_(theirs)
    runs = []
    for name, model in (("opsgraph", fused), ("PyTorch", plain)):
        model.to(device=device, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        runs.append(Run(name, model, optimizer))
    return runs[0], runs[1]


def load_text(device: str) -> tuple[Tensor, Tensor]:
    """The bytes of Python's manual, in two pieces: to train on, and the last tenth to test on."""
    text = "\n\n".join(topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def draw_batch(data: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """`rows` random pieces of context + 1 bytes."""
    starts = torch.randint(len(data) - context, (rows,), generator=generator)
    return data[starts.to(data.device)[:, None] + torch.arange(context + 1, device=data.device)]


def learning_rate(peak: float, step: int, done: float) -> float:
    """A linear warm-up over 20 steps, then half a cosine down to a twentieth of the peak."""
    warm = min(1.0, (step + 1) / 20)
    return peak * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def train(runs: tuple[Run, Run], data: Tensor, args: argparse.Namespace) -> None:
    """Train both on the same batches; which of the two steps first changes at every step."""
    generator = torch.Generator().manual_seed(args.seed)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console.print(f"{'step':>6}{'opsgraph':>12}{'PyTorch':>12}{'difference':>14}")
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            # Where the time ends before the steps do, the schedule still reaches its end.
            done = max(step / args.steps, (time.perf_counter() - start) / args.seconds)
            if done >= 1:
                progress.update(task, total=step)
                console.print(f"the time is up after {step} steps of {args.steps}")
                break
            batch = draw_batch(data, args.batch, args.context, generator)
            for run in runs if step % 2 == 0 else runs[::-1]:
                run.step(batch, learning_rate(args.learning_rate, step, done))
            progress.update(task, completed=step + 1)
            if step % args.every == 0 or step + 1 == args.steps:
                ours, theirs = (run.losses[-1] for run in runs)
                console.print(f"{step:>6}{ours:>12.4f}{theirs:>12.4f}{abs(ours - theirs):>14.1e}")


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes kept from forward to backward: each storage once, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor.detach()  # an output kept with its grad_fn would be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, context: int) -> float:
    """The mean loss over the held-out text, cut into pieces that do not overlap."""
    pieces = data[: (len(data) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = sum(loss_of(model, rows).item() * len(rows) for rows in pieces.split(32))
    return total / len(pieces)


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int, context: int, seed: int) -> str:
    """`length` more bytes after the prompt, drawn at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    device = next(model.parameters()).device
    for _ in range(length):
        logits = model(tokens[:, -context:].to(device))[:, -1].float().cpu()
        chosen = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, chosen), 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def differences(runs: tuple[Run, Run]) -> list[float]:
    """The absolute difference of the two training losses, step by step."""
    return [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]


def draw_losses(runs: tuple[Run, Run], path: Path) -> None:
    """Both curves, and below them their difference on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    for run, style in zip(runs, (dict(lw=3, alpha=0.45), dict(lw=1, color="black")), strict=True):
        top.plot(run.losses, label=run.name, **style)
    top.set_ylabel("training loss, nats per byte")
    top.legend()
    bottom.semilogy([max(d, 1e-8) for d in differences(runs)], lw=0.8, color="tab:red")
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_plan(runs: tuple[Run, Run], batch: Tensor, path: Path) -> bool:
    """Print and draw the plan of one norm+MLP block; True if it saves what it says it does."""
    ours, theirs = (run.model.blocks[0].mlp for run in runs)
    plan = ours.plan(training=True)
    console.print("The plan of one norm+MLP block:", style="bold")
    print(plan)
    plan.draw(path)
    weight = next(ours.parameters())
    x = torch.randn(batch.shape[0], batch.shape[1] - 1, weight.numel()).to(weight)
    x.requires_grad_()
    rows = x.shape[0] * x.shape[1]
    counted, plain = (saved_bytes(m, lambda m=m: m(x)) / rows for m in (ours, theirs))
    for run in runs:
        run.saved = saved_bytes(run.model, lambda model=run.model: loss_of(model, batch))
    console.print(
        f"It says that it saves {plan.saved_bytes_per_row} bytes per token; "
        f"autograd's hooks count {counted:g}, and {plain:g} for the plain block.\n",
        soft_wrap=True,
    )
    return counted == plan.saved_bytes_per_row


def summarize(runs: tuple[Run, Run], held_out: Tensor, args: argparse.Namespace) -> None:
    """Print what the two runs have reached and what they cost."""
    tokens = args.batch * args.context
    console.print(f"\n{'':<28}{runs[0].name:>12}{runs[1].name:>12}", style="bold")
    rows = (
        ("last training loss", "12.4f", lambda run: run.losses[-1]),
        ("held-out loss", "12.4f", lambda run: held_out_loss(run.model, held_out, args.context)),
        ("steps per second (median)", "12.2f", lambda run: 1 / statistics.median(run.seconds)),
        ("saved bytes per token", "12,.0f", lambda run: run.saved / tokens),
    )
    for title, form, value in rows:
        console.print(f"{title:<28}" + "".join(format(value(run), form) for run in runs))


def curves_agree(runs: tuple[Run, Run], dtype: torch.dtype) -> bool:
    """Print the largest differences of the two curves beside what is allowed."""
    early, anywhere = TOLERANCE[dtype]
    gaps = differences(runs)
    checks = (
        (f"in the first {min(EARLY_STEPS, len(gaps))} steps", max(gaps[:EARLY_STEPS]), early),
        (f"in all {len(gaps)} steps", max(gaps), anywhere),
    )
    for where, gap, allowed in checks:
        console.print(f"largest difference {where}: {gap:.1e} nats (allowed {allowed:g})")
    return all(gap <= allowed for _, gap, allowed in checks)  # false for a NaN too


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--seconds", type=float, default=150, help="stop training after this long")
    parser.add_argument("--hidden", type=int, default=128, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="bytes per row")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=50, help="steps between printed losses")
    parser.add_argument("--sample", type=int, default=300, help="bytes of text to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the pictures go")
    args = parser.parse_args(arguments)
    if args.hidden % HEAD_WIDTH or min(args.steps, args.layers, args.seconds) <= 0:
        parser.error(f"--hidden is a multiple of {HEAD_WIDTH}; steps, layers, seconds are positive")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print and draw; the exit code."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    data, held_out = load_text(args.device)
    runs = make_runs(args, args.device, dtype)
    size = sum(p.numel() for p in runs[0].model.parameters())
    console.print(
        f"{size:,} parameters, {str(dtype).removeprefix('torch.')} on {args.device}, "
        f"{len(data):,} bytes of text, {args.batch} x {args.context} bytes a step\n",
        soft_wrap=True,
    )
    first = draw_batch(data, args.batch, args.context, torch.Generator().manual_seed(args.seed))
    saves_as_told = show_plan(runs, first, args.out / "plan.svg")
    train(runs, data, args)
    summarize(runs, held_out, args)
    agree = curves_agree(runs, dtype)
    draw_losses(runs, args.out / "loss.png")
    if args.sample:
        console.print("\nA sample of the opsgraph model:", style="bold")
        print(sample(runs[0].model, "The ", args.sample, args.context, args.seed))
    console.print(f"\nwrote {args.out / 'loss.png'} and {args.out / 'plan.svg'}")
    if not agree:
        console.print("FAILED: the two loss curves differ by more than is allowed", style="red")
    if not saves_as_told:
        console.print("FAILED: the plan saves something else than it says", style="red")
    return 0 if agree and saves_as_told else 1


if __name__ == "__main__":
    sys.exit(main())
