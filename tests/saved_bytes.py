"""What autograd keeps: the measure against which a plan's own account is checked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call saves for its backward.

    Views of one storage count once, as the largest of them; parameters and scalars (seeds) do not
    count. An expanded tensor counts as what it stands for.
    """
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base  # of `weight.t()` the weight
        if tensor.dim() and not isinstance(whole, nn.Parameter):
            storage = tensor.untyped_storage().data_ptr()
            found[storage] = max(found.get(storage, 0), tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(found.values())
