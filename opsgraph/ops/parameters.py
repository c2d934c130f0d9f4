"""How ops make their parameters: now, or at the first call where a size is not known yet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter


def empty_parameter(
    shape: Sequence[int | None], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """A parameter to be initialized; an uninitialized one if a size is None."""
    if any(size is None for size in shape):
        made: Any = UninitializedParameter
        return made(device=device, dtype=dtype)  # type: ignore[no-any-return]
    return nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))  # type: ignore[arg-type]


def mark_sharded(parameter: nn.Parameter | None, dim: int, stride: int) -> None:
    """Say that ranks of a tensor-parallel group hold shares of a parameter, split along dim.

    stride: in how many pieces it is before each is split, the shares of one rank lying one after
    the other. The attributes are those that Megatron-LM reads.
    """
    if parameter is not None:
        attributes = {"tensor_model_parallel": True, "partition_dim": dim}
        for name, value in (attributes | {"partition_stride": stride}).items():
            setattr(parameter, name, value)
