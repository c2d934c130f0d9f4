"""PyTorch's C interface, as code that AOTInductor compiles calls it: addresses and codes.

Its functions keep their names and arguments from version to version (`aoti_torch/c/shim.h`).
"""

import ctypes
import os
from functools import cache

import torch

PREFIX = "aoti_torch_"


@cache
def library(name: str) -> ctypes.CDLL:
    """One of PyTorch's own libraries, `torch_cpu` or `torch_cuda`. Raises OSError."""
    ending = "dylib" if os.uname().sysname == "Darwin" else "so"
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    return ctypes.CDLL(os.path.join(folder, f"lib{name}.{ending}"))


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a function begins. Raises AttributeError."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


@cache
def dtype_code(dtype: torch.dtype) -> int | None:
    """What the interface calls a dtype; None for one that this version does not know."""
    name = f"{PREFIX}dtype_{str(dtype).removeprefix('torch.')}"
    function = getattr(library("torch_cpu"), name, None)
    return None if function is None else int(function())


@cache
def device_code(kind: str) -> int:
    """What the interface calls a kind of device."""
    return int(getattr(library("torch_cpu"), f"{PREFIX}device_type_{kind}")())
