"""LayerNormMLP on 2 and 4 ranks against the fp64 formula in one process: every combination."""

import os
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opsgraph as og
from opsgraph.base import config
from opsgraph.testing.distributed import Ranks
from tests.layernorm_mlp.test_module import Setting, formula

HIDDEN, FFN, SHAPE = 8, 16, (8, 4, 8)
NORM = ("layer_norm_weight", "layer_norm_bias", "fc2_bias")
"""Parameters that every rank has in full."""


class Case(NamedTuple):
    sequence_parallel: bool = False
    activation: str = "gelu"
    bias: bool = True
    return_bias: bool = False
    returned: str = "out"
    normalization: str = "RMSNorm"

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            sequence_parallel=self.sequence_parallel,
            activation=self.activation,
            bias=self.bias,
            normalization=self.normalization,
            return_bias=self.return_bias,
            return_layernorm_output=self.returned != "out",
            return_layernorm_output_gathered=self.returned == "gathered",
        )


CASES = [
    Case(*values)
    for values in product(
        (False, True), ("gelu", "swiglu"), (True, False), (False, True),
        ("out", "norm", "gathered"), ("RMSNorm", "LayerNorm"),
    )
]  # fmt: skip


def parameters(case: Case) -> dict[str, Tensor]:
    """The whole layer's, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    rows = FFN * (2 if case.activation == "swiglu" else 1)
    shapes = {
        "layer_norm_weight": (HIDDEN,),
        "layer_norm_bias": (HIDDEN,),
        "fc1_weight": (rows, HIDDEN),
        "fc1_bias": (rows,),
        "fc2_weight": (HIDDEN, FFN),
        "fc2_bias": (HIDDEN,),
    }
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
        if (case.bias or not name.startswith("fc") or name.endswith("weight")) and not (
            case.normalization == "RMSNorm" and name == "layer_norm_bias"
        ):
            made[name] = value
    return made


def share(name: str, value: Tensor, case: Case, rank: int, size: int) -> Tensor:
    """A rank's share of a parameter or of its gradient: gate and value are split separately."""
    if name in NORM:
        return value
    if name == "fc2_weight":
        return value.chunk(size, 1)[rank]
    if case.activation == "swiglu":
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    return value.chunk(size)[rank]


def noise(name: str, shape: Any, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(value: Tensor, case: Case, rank: int, size: int) -> Tensor:
    """What a rank sees of a value between layers."""
    return value.chunk(size)[rank] if case.sequence_parallel else value


def expected(case: Case, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the whole layer, by formula and autograd."""
    p = {name: value.requires_grad_() for name, value in parameters(case).items()}
    x = noise("x", SHAPE).requires_grad_()
    setting = Setting(case.normalization, case.activation, case.bias)
    y, normed = formula(setting, x, p, {})
    outputs, dys = {"out": y}, {"out": noise("dout", SHAPE)}
    if case.bias and case.return_bias:
        outputs["bias"] = p["fc2_bias"]
        each = [noise("dbias", HIDDEN, r) for r in range(size)]
        dys["bias"] = torch.stack(each).sum(0) if case.sequence_parallel else each[0]
    elif case.bias:
        outputs["out"] = y + p["fc2_bias"]
    if case.returned != "out":
        outputs["norm"] = normed
        dys["norm"] = noise("dnorm", SHAPE)
        if case.returned == "gathered" and case.sequence_parallel:
            dys["norm"] = torch.stack([noise("dnorm", SHAPE, r) for r in range(size)]).sum(0)
    leaves = {"x": x, **p}
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [dys[name] for name in outputs],
        allow_unused=True,
    )  # fmt: skip
    return outputs, {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def local_gradients(case: Case, outputs: dict[str, Tensor], rank: int, size: int) -> list[Tensor]:
    """What this rank's backward starts from."""
    found = []
    for name in outputs:
        if name == "out":
            dy = rows(noise("dout", SHAPE), case, rank, size)
        elif name == "bias":
            dy = noise("dbias", HIDDEN, rank if case.sequence_parallel else 0)
        elif case.returned == "gathered" and case.sequence_parallel:
            dy = noise("dnorm", SHAPE, rank)
        else:
            dy = rows(noise("dnorm", SHAPE), case, rank, size)
        found.append(dy.to(outputs[name].dtype))
    return found


def make(case: Case, rank: int, size: int, group: Any = None, **more: Any) -> og.LayerNormMLP:
    """The rank's module with its share of the parameters."""
    more = {"params_dtype": torch.float64, "set_parallel_mode": True, "device": "cpu"} | more
    group = dist.group.WORLD if group is None else group
    mlp = og.LayerNormMLP(
        HIDDEN, FFN, tp_group=group, tp_size=size, **case.options, **more
    )  # fmt: skip
    full = parameters(case)
    assert [n for n, _ in mlp.named_parameters()] == list(full)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            parameter.copy_(share(name, full[name], case, rank, size))
    return mlp


def named(case: Case, result: Any) -> dict[str, Tensor]:
    """A module's outputs by name."""
    values = list(result) if isinstance(result, tuple) else [result]
    names = ["out"] + ["bias"] * case.return_bias + ["norm"] * (case.returned != "out")
    outputs = dict(zip(names, values, strict=True))
    if case.return_bias and not case.bias:
        assert outputs.pop("bias") is None
    return outputs


def summed(gradient: Tensor) -> Tensor:
    """The caller's reduction over the group."""
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def compare(case: Case, mlp: Any, rank: int, size: int, tolerance: float = 1e-9) -> None:
    """Outputs and every gradient with the whole layer's."""
    right, gradients = expected(case, size)
    parameters = dict(mlp.named_parameters())
    dtype = parameters["fc1_weight"].dtype
    x = rows(noise("x", SHAPE), case, rank, size).to(dtype).requires_grad_()
    outputs = named(case, mlp(x))
    assert outputs.keys() == right.keys()
    leaves = {"x": x, **parameters}
    dys = local_gradients(case, outputs, rank, size)
    if case.return_bias and case.bias:
        assert outputs["bias"].data_ptr() == parameters["fc2_bias"].data_ptr()
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), dys, allow_unused=True
    )

    def close(value: Tensor, wanted: Tensor, name: str) -> None:
        text = f"{case} {name}"
        torch.testing.assert_close(
            value.double(), wanted, rtol=tolerance, atol=tolerance, msg=lambda m: f"{text}: {m}"
        )

    for name, value in outputs.items():
        whole = name == "bias" or (name == "norm" and case.returned == "gathered")
        wanted = right[name].detach()
        close(value.detach(), wanted if whole else rows(wanted, case, rank, size), name)
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is None:
            assert name not in gradients, name
            continue
        if name == "x":
            close(gradient, rows(gradients[name], case, rank, size), "dx")
        elif name in NORM and case.sequence_parallel:
            close(summed(gradient), gradients[name], f"d {name}, summed")
        else:
            close(gradient, share(name, gradients[name], case, rank, size), f"d {name}")


def all_cases(rank: int, size: int, step: int) -> None:
    for case in CASES[::step]:
        mlp = make(case, rank, size)
        compare(case, mlp, rank, size)
        with torch.no_grad():
            outputs = named(case, mlp(rows(noise("x", SHAPE), case, rank, size)))
        wanted = rows(expected(case, size)[0]["out"].detach(), case, rank, size)
        torch.testing.assert_close(outputs["out"], wanted, rtol=1e-9, atol=1e-9)


def reference_ops(rank: int, size: int) -> None:
    """Without the fusers that overlap exchanges with products."""
    os.environ["OPSGRAPH_BACKENDS"] = "reference"
    config.touch()
    try:
        for case in CASES[:: len(CASES) // 16 + 1]:
            mlp = make(case, rank, size)
            assert "overlap" not in str(mlp.plan())
            compare(case, mlp, rank, size)
    finally:
        del os.environ["OPSGRAPH_BACKENDS"]
        config.touch()


def test_combinations(ranks: Ranks) -> None:
    """Every value of an option with each of another one: options have two or three values."""
    ranks.run(all_cases, 4, 5, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_combination(ranks: Ranks, size: int) -> None:
    ranks.run(all_cases, size, 1, timeout=300)


def test_the_reference_ops_alone(ranks: Ranks) -> None:
    ranks.run(reference_ops, 2, timeout=300)
