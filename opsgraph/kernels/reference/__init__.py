"""The formulas in plain PyTorch, on any device: arithmetic in fp32 (fp64 for fp64 tensors)."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic is done in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
