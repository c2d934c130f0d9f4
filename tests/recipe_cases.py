"""The recipes that tests walk over, and the layers that they run."""

from typing import Any

import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU
from opsgraph.precision import recipe as r

HIDDEN, FFN, ROWS = 64, 128, 40


def by_hand(role: str) -> og.quantizers.Quantizer:
    """A custom recipe: MXFP8 forward, E5M2 by rows for gradients."""
    if role == "gradient":
        return og.quantizers.RowQuantizer(torch.float8_e5m2)
    return og.quantizers.MXQuantizer()


FP8 = {
    "current": r.Float8CurrentScaling(),
    "rows": r.Float8CurrentScaling(row_wise=True),
    "powers": r.Float8CurrentScaling(use_power_2_scales=True, amax_epsilon=1e-3),
    "delayed": r.DelayedScaling(amax_history_len=4),
    "blocks": r.Float8BlockScaling(),
    "f32 blocks": r.Float8BlockScaling(use_f32_scales=True),
    "mx": r.MXFP8BlockScaling(),
    "custom": r.CustomRecipe(by_hand),
    "high precision": r.Float8CurrentScaling(backward_override="high_precision"),
    "dequantized": r.Float8BlockScaling(backward_override="dequantized"),
}
FP4 = {
    "nvfp4": r.NVFP4BlockScaling(),
    "nvfp4 plain": r.NVFP4BlockScaling(
        disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True
    ),
    "nvfp4 dequantized": r.NVFP4BlockScaling(backward_override="dequantized"),
}
RECIPES = FP8 | FP4


def mlp(dtype: torch.dtype = torch.bfloat16, **options: Any) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(
        RMSNorm(HIDDEN), Linear(HIDDEN, 2 * FFN), SwiGLU(), Linear(FFN, HIDDEN), dtype=dtype,
        **options,
    )  # fmt: skip


def results(
    module: Any, recipe: og.recipe.Recipe | None, x: Tensor, call: Any = None
) -> list[Tensor]:
    """The output, dx and the gradients of all parameters."""
    x = x.detach().requires_grad_()
    with og.autocast(enabled=recipe is not None, recipe=recipe):
        y = (call or module)(x)
    torch.manual_seed(2)  # of the gradient, and of stochastic rounding
    dy = torch.randn_like(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def example(rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, HIDDEN, dtype=dtype)
