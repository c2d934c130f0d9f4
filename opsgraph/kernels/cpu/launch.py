"""What every call of a C++ kernel needs: its library, one packed record, tensors that it can read.

A kernel takes one record of 8-byte fields (the structs in `source/`), packed by `struct`: that
costs a quarter of what ctypes takes to convert as many arguments.
"""

import ctypes
import os
import re
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import OpError
from ...guards.torch_private import dispatch_modes, top_transform
from ...guards.watching import watching
from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that the kernels compute on, with their codes."""
_PLAIN = (Tensor, nn.Parameter)


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors have memory that a kernel may read, past PyTorch's dispatcher.

    Under a dispatch mode or a functorch transform, and with subclasses (fake tensors among them),
    kernels leave the work to the reference formulas, which any of these can see through.
    """
    if dispatch_modes() or top_transform() is not None or type(x) not in _PLAIN:
        return False
    for other in others:  # noqa: SIM110 - all() takes twice as long
        if other is not None and type(other) not in _PLAIN:
            return False
    return True


def rows_of(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """x as `lines` gives it, in the shape and the dtype given.

    Raises RuntimeError where it cannot be expanded so.
    """
    return lines(x if x.dtype is dtype and x.shape == shape else x.to(dtype).expand(shape))


def lines(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy where the elements of a row are not adjacent, and the stride of its rows."""
    if x.is_contiguous():
        return x, x.size(1)
    if x.stride(1) == 1 and x.stride(0) >= 0:
        return x, x.stride(0)
    return x.contiguous(), x.size(1)


def verify_length(tensor: Tensor, length: int, of: str = "column") -> None:
    """Raises OpError unless a parameter, or a row's statistic, has one element for each."""
    if tensor.numel() != length:
        expected = f"{length} elements, one for each {of} of the input"
        raise OpError("kernel", f"an operand of shape {tuple(tensor.shape)}", expected)


def vector(parameter: Tensor | None, width: int) -> tuple[Tensor | None, int, int]:
    """A weight or a bias of a dtype that kernels read, with its address and its dtype's code.

    Raises OpError for one that is not as long as a row.
    """
    if parameter is None:
        return None, 0, 0
    verify_length(parameter, width)
    code = DTYPES.get(parameter.dtype)
    if code is None:
        parameter, code = parameter.float(), 0
    parameter = parameter.contiguous()
    return parameter, parameter.data_ptr(), code


def floats(bias: Tensor | None, width: int) -> Tensor | None:
    """A bias in fp32, contiguous. Raises OpError for one that is not as long as a row."""
    if bias is None:
        return None
    verify_length(bias, width)
    return bias.float().contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Kernel:
    """A function of a library, looked up (and the library built) at its first call.

    name: of the C function. fields: the record's, as `struct` writes them, P for an address.
    library: see `build`.
    """

    def __init__(self, name: str, fields: str, library: str) -> None:
        self.name, self.library = name, library
        self.pack = struct.Struct(f"={fields.replace('P', 'q')}").pack
        kinds = "".join(kind * int(n or 1) for n, kind in re.findall(r"(\d*)([qPd])", fields))
        self.addresses = [k for k, kind in enumerate(kinds) if kind == "P"]

    def __call__(self, *values: Any) -> None:
        """Run on the calling thread and as many others as `values` says."""
        record = self.pack(*values)
        self.function(record)
        if watching.recorder is not None:
            watching.recorder.kernel(self.at, record, [(k, values[k]) for k in self.addresses])

    def __getattr__(self, name: str) -> Any:
        if name != "function":
            raise AttributeError(name)
        self.function = getattr(library(self.library), self.name)
        self.function.argtypes, self.function.restype = [ctypes.c_char_p], None
        self.at = ctypes.cast(self.function, ctypes.c_void_p).value
        return self.function


@cache
def library(name: str) -> ctypes.CDLL:
    """A library, with the address of the function by which PyTorch's OpenMP starts threads."""
    found = build.library(name)
    found.opsgraph_threads.argtypes, found.opsgraph_threads.restype = [ctypes.c_void_p], None
    found.opsgraph_threads(_fork_join())
    # A process forked after OpenMP has started its threads has none of them, and waits for them
    # forever: kernels run on one thread there.
    os.register_at_fork(after_in_child=lambda: found.opsgraph_threads(None))
    return found


def _fork_join() -> int | None:
    """The address of GOMP_parallel as PyTorch finds it (LLVM's runtime has it too), or None."""
    for name in (None, _torch_library()):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _torch_library() -> str:
    suffix = "libtorch_cpu.dylib" if os.uname().sysname == "Darwin" else "libtorch_cpu.so"
    return os.path.join(os.path.dirname(torch.__file__), "lib", suffix)
