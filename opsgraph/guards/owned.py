"""Whether a tensor's memory is nobody else's, so that a result may be written over it.

Python's and PyTorch's counts of references tell: whoever else may read the memory, as autograd does
while a graph is retained, has a tensor or a storage of it. Memory of other libraries has a storage
that cannot be resized.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .torch_private import has_memory, storage_uses
from .watching import watching

# Without a global lock Python's counts are spread over threads: too little to go by.
_locked: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
use_count: Callable[[int], int] | None = storage_uses if _locked else None
"""As `storage_uses`; None where counts are too little to go by."""
_tensor_use_count = getattr(Tensor, "_use_count", None)
counted = use_count is not None and _tensor_use_count is not None
"""Whether owners can be counted."""


def owners(x: Tensor) -> tuple[int, ...]:
    """How many names a tensor and its storage have, and how many owners that Python cannot see."""
    assert use_count is not None
    assert _tensor_use_count is not None
    storage = x.untyped_storage()
    tensors, storages = _tensor_use_count(x), use_count(storage._cdata)
    return sys.getrefcount(x), tensors, sys.getrefcount(storage), storages


def _owners_of_one() -> tuple[int, ...]:
    """The same of a fresh tensor. A call counts its arguments twice where Dynamo watches frames."""
    x = torch.empty(1, device="cpu")
    return (lambda x: owners(x))(x)  # as `in_place_of` calls it


def in_place_of(x: Tensor) -> Tensor:
    """Memory for a result like x, contiguous: x's own if one variable of the caller is all that
    refers to it, and x is then overwritten.

    A pass that is recorded gets memory of its own; its replays decide again.
    """
    recorder = watching.recorder
    if recorder is None and counted and has_memory(x) and x.is_contiguous():
        if owners(x) == _owners_of_one() and x.untyped_storage().resizable():
            return x
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if recorder is not None:
        recorder.in_place(made, x)
    return made
