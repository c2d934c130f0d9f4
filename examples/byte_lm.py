"""Train a small Llama-style byte-level language model in bf16 and fp32, with opsgraph and without.

All runs start from the same weights, see the same batches and take turns. In opsgraph's, every
norm+MLP block is one Sequential with the residual inside it, and so are the attention's norm and
projection; the others are plain PyTorch, as it is and under torch.compile. The text is the English
of Python's own manual, `pydoc_data.topics`, so nothing is downloaded. `byte_lm_report.py` shows
speed, memory and losses, while it trains and in one picture.

    python examples/byte_lm.py                        # about two minutes on two cores
    python examples/byte_lm.py --steps 20 --layers 1  # a quick look

The exit code is 1 if the loss curves of opsgraph and PyTorch differ by more than the tolerances
below, or if a plan saves something else than it says.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import byte_lm_report as report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Add, Linear, RMSNorm, SwiGLU, Tee

EPS = 1e-5
HEAD_WIDTH = 32
EARLY_STEPS = 50
SETTLED = 3
"""Steps that no time is taken of: allocators and choices settle."""
# Largest allowed difference of the two training losses, in nats: within the first EARLY_STEPS
# steps, and anywhere. Two correct implementations round differently, and training amplifies that:
# measured in fp32 on two threads, 5e-6 in the first 50 steps, 8e-2 in 306. So the second bound is
# wider; the first is the one that a wrong gradient breaks, within a few steps. In bf16 PyTorch and
# torch.compile differ by 6e-2 in the first 50 steps, and PyTorch by 5e-2 from its own fp32.
TOLERANCE = {torch.float32: (1e-4, 3e-1), torch.bfloat16: (1.5e-1, 3e-1)}


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

    def __init__(self, qkv: nn.Module, mlp: nn.Module, hidden: int, head_width: int) -> None:
        super().__init__()
        self.qkv, self.mlp, self.head_width = qkv, mlp, head_width
        self.projection = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_width))
        # [batch, length, 3, heads, head_width]
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
        head_width: int = HEAD_WIDTH,
    ) -> None:
        super().__init__()
        ffn = (8 * hidden // 3 + 31) // 32 * 32
        self.embedding = nn.Embedding(256, hidden)
        self.blocks = nn.ModuleList(
            Block(*parts(hidden, ffn), hidden, head_width) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden, eps=EPS)
        self.head = nn.Linear(hidden, 256, bias=False)
        rate = 10_000 ** -torch.linspace(0, 1, head_width // 2 + 1)[:-1]
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
    dtype: torch.dtype
    model: ByteLM
    optimizer: torch.optim.Optimizer
    call: nn.Module
    """What is called: the model, or what torch.compile makes of it."""
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved: int = 0
    """Bytes kept from a step's forward to its backward."""
    held_out: float = math.nan

    @property
    def title(self) -> str:
        """`opsgraph, bf16`."""
        return f"{self.name}, {'bf16' if self.dtype is torch.bfloat16 else 'fp32'}"

    @property
    def step_seconds(self) -> float:
        """The median of the steps so far."""
        return statistics.median(self.seconds[SETTLED:] or self.seconds or [math.nan])

    def warm_up(self, batch: Tensor) -> None:
        """Plan or compile, and count what is saved, without a step."""
        loss_of(self.call, batch).backward()
        self.saved = saved_bytes(self.model, lambda: loss_of(self.call, batch))

    def step(self, batch: Tensor, learning_rate: float) -> None:
        """One step of training, timed until its loss is on the host."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.call, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def make_runs(args: argparse.Namespace) -> list[Run]:
    """Models of the same weights: of each name in bf16, of opsgraph and PyTorch in fp32 too."""
    torch.manual_seed(args.seed)
    sizes = args.hidden, args.layers, args.context, args.head_width
    first = ByteLM(plain_parts, *sizes)
    for parameter in first.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.02)
    runs = []
    for name, dtype in itertools.product(("opsgraph", "torch.compile", "PyTorch"), TOLERANCE):
        if name == "torch.compile" and (dtype is torch.float32 or not args.compile):
            continue
        model = ByteLM(fused_parts if name == "opsgraph" else plain_parts, *sizes)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), first.parameters(), strict=True):
                ours.copy_(theirs)
        model.to(device=args.device, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        call = torch.compile(model) if name == "torch.compile" else model
        runs.append(Run(name, dtype, model, optimizer, call))
    return sorted(runs, key=lambda run: run.dtype is torch.float32)


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


def train(runs: list[Run], data: Tensor, args: argparse.Namespace) -> None:
    """Train all on the same batches; which of them steps first changes at every step."""
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    with report.progress(runs, args) as told:
        first = draw_batch(data, args.batch, args.context, generator)
        for run in runs:
            told(f"{'compiling' if run.call is not run.model else 'planning'} {run.title}", 0)
            run.warm_up(first)
        began, limit = time.perf_counter(), start + args.seconds
        for step in range(args.steps):
            # Where the time ends before the steps do, the schedule still reaches its end.
            now = time.perf_counter()
            if now >= limit and step:
                break
            done = max(step / args.steps, (now - began) / max(limit - began, 1))
            batch = draw_batch(data, args.batch, args.context, generator)
            turn = step % len(runs)
            for run in runs[turn:] + runs[:turn]:
                run.step(batch, learning_rate(args.learning_rate, step, min(done, 1)))
            told("training", step + 1)
    if len(runs[0].losses) < args.steps:
        report.line(f"the time was up after {len(runs[0].losses)} steps of {args.steps}")


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


def pairs(runs: list[Run]) -> Iterator[tuple[Run, Run]]:
    """opsgraph's run and PyTorch's of each dtype."""
    for ours, theirs in itertools.combinations(runs, 2):
        if (ours.name, theirs.name) == ("opsgraph", "PyTorch") and ours.dtype is theirs.dtype:
            yield ours, theirs


def differences(ours: Run, theirs: Run) -> list[float]:
    """The absolute difference of the two training losses, step by step."""
    return [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]


def curves_agree(ours: Run, theirs: Run) -> Iterator[tuple[str, bool]]:
    """The largest differences of two curves beside what is allowed, and whether they are."""
    early, anywhere = TOLERANCE[ours.dtype]
    gaps = differences(ours, theirs)
    checks = (
        (f"in the first {min(EARLY_STEPS, len(gaps))} steps", max(gaps[:EARLY_STEPS]), early),
        (f"in all {len(gaps)} steps", max(gaps), anywhere),
    )
    for where, gap, allowed in checks:
        # False for a NaN too.
        yield f"{where}: {gap:.1e} nats (allowed {allowed:g})", gap <= allowed


def block_saves(run: Run, batch: Tensor) -> float:
    """Bytes per token that autograd's hooks count in one norm+MLP block."""
    block = run.model.blocks[0].mlp
    weight = next(block.parameters())
    x = torch.randn(batch.shape[0], batch.shape[1] - 1, weight.numel()).to(weight)
    x.requires_grad_()
    return saved_bytes(block, lambda: block(x)) / (x.shape[0] * x.shape[1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seconds", type=float, default=115, help="stop training after this long")
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of --head-width")
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="bytes per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--sample", type=int, default=200, help="bytes of text to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the pictures go")
    args = parser.parse_args(arguments)
    if args.hidden % args.head_width or args.head_width % 2:
        parser.error("--hidden is a multiple of --head-width, which is even")
    if min(args.steps, args.layers, args.seconds) <= 0:
        parser.error("steps, layers and seconds are positive")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print and draw; the exit code."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    data, held_out = load_text(args.device)
    runs = make_runs(args)
    report.header(runs[0].model, len(data), args)
    train(runs, data, args)
    for run in runs:
        run.held_out = held_out_loss(run.model, held_out, args.context)
    batch = draw_batch(data, args.batch, args.context, torch.Generator().manual_seed(args.seed))
    ours, theirs = next(pairs(runs))
    plan = ours.model.blocks[0].mlp.plan(training=True)
    plan.draw(args.out / "plan.html")
    counted = block_saves(ours, batch)
    report.block(plan, counted, block_saves(theirs, batch))
    if args.sample:
        report.line("\nA sample of the opsgraph model:", style="bold")
        print(sample(ours.model, "The ", args.sample, args.context, args.seed))
    report.summary(runs, args)
    problems = []
    for ours, theirs in pairs(runs):
        for text, good in curves_agree(ours, theirs):
            report.line(f"losses of {ours.title} and {theirs.name} differ {text}")
            problems += (
                [] if good else [f"the loss curves of {ours.title} and {theirs.name} differ"]
            )
    if counted != plan.saved_bytes_per_row:
        problems.append("the plan saves something else than it says")
    report.draw(runs, args.out / "demo.png")
    report.write(runs, args, args.out / "demo.json")
    names = ("demo.png", "demo.json", "plan.html")
    report.line(f"\nwrote {', '.join(str(args.out / name) for name in names)}")
    for problem in problems:
        report.line(f"FAILED: {problem}", style="red")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
