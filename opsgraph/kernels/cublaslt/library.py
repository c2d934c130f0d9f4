"""cublasLt's C interface, as much of it as products take, without its headers.

Names, values and structs are those of NVIDIA's cublasLt.h, of CUDA 12 and 13, which keeps them.
"""

import ctypes
from functools import cache
from typing import Any

import torch

COMPUTE_32F, REAL_32F = 68, 0
TYPES = {
    torch.float32: 0, torch.float16: 2, torch.bfloat16: 14,
    torch.float8_e4m3fn: 28, torch.float8_e5m2: 29,
}  # fmt: skip
"""CUDA's numbers of dtypes."""
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS = 3, 4, 7, 8
SCALE_A, SCALE_B, FAST_ACCUM, BIAS_TYPE, MODE_A, MODE_B = 17, 18, 25, 26, 31, 32
"""Attributes of a description."""
TENSOR, ROW, BLOCK, SQUARE = 0, 3, 4, 5
"""What an fp32 scale covers: all, a row, 1 x 128 values of a row, 128 x 128 values."""
PLAIN, RELU, WITH_BIAS, GELU = 1, 2, 4, 32
"""Epilogues, to be combined by `|`; the first stands alone."""
MOST_WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)
"""Attributes of a preference: workspace in bytes, ways to add up the parts of a split depth,
alignments of the four operands in bytes."""
WORKSPACE = 2**25
"""Bytes of the workspace that PyTorch gives a product on Hopper."""
IN_FP32 = 2
"""The way to add up parts that gives repeatable results of fp32's precision: in a workspace."""


class Algorithm(ctypes.Structure):
    """One of the library's for a product, and what it says of it."""

    _fields_ = [
        ("words", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip

    @property
    def name(self) -> str:
        """What a file of choices calls it: its workspace and its words."""
        return f"{self.workspace} {bytes(self.words).hex()}"

    @classmethod
    def of(cls, name: str) -> "Algorithm":
        """The algorithm of a name. Raises ValueError where that is none."""
        workspace, _, words = name.partition(" ")
        if not 0 <= int(workspace) <= WORKSPACE:
            raise ValueError(f"got a workspace of {workspace} bytes, expected at most {WORKSPACE}")
        made, content = cls(workspace=int(workspace)), bytes.fromhex(words)
        if len(content) != ctypes.sizeof(made.words):
            raise ValueError(f"got words of {len(content)} bytes")
        made.words[:] = memoryview(content).cast("Q").tolist()
        return made


_STATUSES = {
    1: "not initialized", 3: "out of memory", 7: "invalid value", 8: "not on this chip",
    11: "memory cannot be read", 13: "execution failed", 14: "internal error", 15: "not supported",
}  # fmt: skip
_LASTING = (7, 8, 15)
"""Statuses that a product of the same class has at the next call too."""


class CublasError(Exception):
    """What the library cannot compute. lasting: whether that holds for all products of a class."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting

    @classmethod
    def of(cls, name: str, status: int) -> "CublasError":
        """The error of a function that returned a status."""
        reason = _STATUSES.get(status, "unknown")
        return cls(f"{name}: status {status}, {reason}", status in _LASTING)


_WORD, _INT = ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "cublasLtMatmul": [_WORD] * 14 + [ctypes.c_size_t, _WORD],
    "cublasLtMatmulDescSetAttribute": [_WORD, _INT, _WORD, ctypes.c_size_t],
    "cublasLtMatmulPreferenceSetAttribute": [_WORD, _INT, _WORD, ctypes.c_size_t],
    "cublasLtMatmulAlgoGetHeuristic": [_WORD] * 7 + [_INT, _WORD, _WORD],
    "cublasLtMatmulAlgoCheck": [_WORD] * 8,
    "cublasLtMatmulDescInit_internal": [_WORD, ctypes.c_size_t, _INT, _INT],
    "cublasLtMatrixLayoutCreate": [_WORD, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
    "cublasLtMatmulPreferenceCreate": [_WORD],
    "cublasLtCreate": [_WORD],
    "cublasLtMatmulPreferenceDestroy": [_WORD],
}


WORDS = 64
"""Room for a description, in words of 8 bytes: CUDA 12 and 13 fill 32 at most."""


@cache
def library() -> Any:
    """The library that PyTorch has loaded. Raises OSError."""
    found = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '12').partition('.')[0]}")
    for name, types in _SIGNATURES.items():
        getattr(found, name).argtypes = types
    found.cublasLtGetVersion.restype = ctypes.c_size_t
    return found


def call(name: str, *arguments: Any) -> None:
    """Call a function. Raises CublasError."""
    if status := getattr(library(), name)(*arguments):
        raise CublasError.of(name, status)


def made(kind: str, *arguments: Any) -> int:
    """A new object of the library's."""
    address = ctypes.c_void_p()
    call(f"cublasLt{kind}Create", ctypes.byref(address), *arguments)
    return address.value or 0


def description() -> Any:
    """A new description of a product, as words. It may be copied: none of them is an address."""
    words = (ctypes.c_uint64 * WORDS)()
    size = ctypes.sizeof(words)
    call("cublasLtMatmulDescInit_internal", ctypes.byref(words), size, COMPUTE_32F, REAL_32F)
    return words


@cache
def handle(device: int) -> int:
    """The library's handle on the current device, whose number is given."""
    address = ctypes.c_void_p()
    call("cublasLtCreate", ctypes.byref(address))
    return address.value or 0


def assign(kind: str, target: int, attribute: int, value: Any) -> None:
    """Set an attribute, whose value is one of ctypes' numbers."""
    name, size = f"cublasLt{kind}SetAttribute", ctypes.sizeof(value)
    call(name, target, attribute, ctypes.byref(value), size)
