"""Random sequences, split over ranks by `TensorParallel`, against the formulas of the whole."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import opsgraph as og
from opsgraph import ops
from opsgraph.parallel import TensorParallel
from opsgraph.testing import formulas
from opsgraph.testing.distributed import Ranks

WIDTH = 8


def between(pick: random.Random, ffn: int) -> tuple[int, list[nn.Module]]:
    """The width before and what stands between a column- and a row-parallel Linear."""
    gated = pick.choice([ops.SwiGLU, ops.GEGLU, ops.ClampedSwiGLU, ops.GLU])
    plain = pick.choice([ops.GELU, ops.SiLU, ops.SReLU])
    made: list[nn.Module] = [gated() if (two := pick.random() < 0.5) else plain()]
    if pick.random() < 0.3:
        made.insert(pick.randint(1, len(made)), ops.ConstantScale(0.7))
    if pick.random() < 0.3:
        made.append(ops.SiLU())
    return ffn * (1 + two), made


def block(pick: random.Random, serial: int) -> list[nn.Module]:
    """A norm or none, two Linears, and a residual or none, by name or nested."""
    ffn = pick.choice([4, 12, 16])
    wide, inner = between(pick, ffn)
    bias = pick.random() < 0.6
    made: list[nn.Module] = [
        ops.Linear(WIDTH, wide, bias),
        *inner,
        ops.Linear(ffn, WIDTH, pick.random() < 0.6),
    ]
    norm = pick.choice([None, ops.RMSNorm, ops.LayerNorm])
    if norm is not None:
        made.insert(0, norm(WIDTH, zero_centered_gamma=pick.random() < 0.5))
    if pick.random() < 0.3:
        made.append(ops.ConstantScale(0.5))
    residual = pick.random()
    if residual < 0.3:
        return [ops.Residual(*made)]
    if residual < 0.6:
        return [ops.Tee(f"r{serial}"), *made, ops.Add(f"r{serial}")]
    return [ops.Tee(), *made] if residual < 0.7 else made


def random_sequence(seed: int) -> og.Sequential:
    pick = random.Random(seed)
    blocks = [module for k in range(pick.randint(1, 3)) for module in block(pick, k)]
    options: dict[str, Any] = dict(
        planner=pick.choice(["greedy", "optimal"]),
        checkpoint=pick.random() < 0.2,
        backends=pick.choice([None, ("reference",), ("aten", "reference")]),
    )
    made = og.Sequential(*blocks, dtype=torch.float64, **options)
    torch.manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    return made


def gradients(y: Any, outputs: Any, leaves: list[Tensor], pick: Any) -> list[Tensor]:
    """From one random gradient of each output, of which `pick` takes a rank's part."""
    generator = torch.Generator().manual_seed(3)
    every = [y, *outputs]
    dys = [torch.randn(16, 2, WIDTH, generator=generator, dtype=torch.float64) for _ in every]
    return list(torch.autograd.grad(every, leaves, [pick(dy) for dy in dys]))


def compare(rank: int, size: int, seeds: range) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for seed in seeds:
        module = random_sequence(seed)
        whole = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
        x = torch.randn(16, 2, WIDTH, dtype=torch.float64, requires_grad=True)
        y, outputs = formulas.run(module, x, whole)
        right = gradients(y, outputs, [x, *whole.values()], lambda t: t)
        sequence_parallel = seed % 2 == 0

        def part(t: Tensor, split: bool = sequence_parallel) -> Tensor:
            return t.chunk(size)[rank] if split else t

        parallelize_module(module, mesh, TensorParallel(sequence_parallel=sequence_parallel))
        mine = part(x).detach().requires_grad_()
        result = module(mine)
        out, *more = result if isinstance(result, tuple) else (result,)
        found = gradients(out, more, [mine, *module.parameters()], part)
        values = [v.full_tensor() if isinstance(v, DTensor) else v for v in (out, *more, *found)]
        wanted = [part(y), *map(part, outputs), part(right[0]), *right[1:]]
        names = ["y", *(f"output {k}" for k in range(len(outputs))), "dx", *whole]
        assert len(values) == len(wanted)
        for name, value, expected in zip(names, values, wanted, strict=True):
            torch.testing.assert_close(
                value.reshape(expected.shape), expected, rtol=1e-8, atol=1e-8,
                msg=lambda m, n=name, s=seed: f"seed {s}, {n}: {m}",
            )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_random_sequences(ranks: Ranks, size: int) -> None:
    ranks.run(compare, size, range(40 // size), timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_many_random_sequences(ranks: Ranks, size: int) -> None:
    ranks.run(compare, size, range(20, 400), timeout=900)
