"""What tests of tools share: a block as opsgraph's modules and as torch.nn's, with one state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU

WIDTH, INNER, ROWS = 32, 48, 6


class Gate(nn.Module):
    """SwiGLU in torch.nn."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return F.silu(first) * second


def plain() -> nn.Sequential:
    """The block of torch.nn's modules."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, 2 * INNER), Gate(), nn.Linear(INNER, WIDTH)
    )


def sequence() -> og.Sequential:
    """The same of ops."""
    layers = RMSNorm(WIDTH, 1e-5), Linear(WIDTH, 2 * INNER), SwiGLU(), Linear(INNER, WIDTH)
    module = og.Sequential(*layers)
    module.load_state_dict(plain().state_dict())
    return module


NAMES = ("layer_norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
"""LayerNormMLP's, in the order of the sequence's."""


def block() -> og.LayerNormMLP:
    """The same as one module."""
    module = og.LayerNormMLP(
        WIDTH, INNER, normalization="RMSNorm", activation="swiglu", device="cpu"
    )
    module.load_state_dict(dict(zip(NAMES, plain().state_dict().values(), strict=True)))
    return module
