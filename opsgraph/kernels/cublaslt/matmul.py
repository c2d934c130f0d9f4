"""Products `a @ b` by cublasLt's C interface, by the algorithm whose bits PyTorch's product has.

PyTorch takes 17 microseconds of the host for a product, the library's own call 7. A replay makes
that call, see `replay.recorder`. So that it gives the bits of the calls in Python, the library's
algorithms for these operands are tried in its order, on the operands, and one that does not give
PyTorch's bits is not taken. Constants and structs are those of NVIDIA's cublasLt.h, of CUDA 12 and
13, which keeps them.
"""

import ctypes
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

COMPUTE_32F, REAL_32F, REAL_16BF = 68, 0, 14
TRANSPOSE_A, TRANSPOSE_B = 3, 4
"""Attributes of a description."""
MOST_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)
"""Attributes of a preference: workspace in bytes, alignments of the four operands in bytes."""
WORKSPACE, ALIGNED, TRIED = 2**25, 16, 8
"""Bytes of the workspace that PyTorch gives a product on Hopper, alignment, algorithms to try."""


class _Algorithm(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


class CublasError(Exception):
    """A status of the library's that is no success."""


@cache
def library() -> ctypes.CDLL:
    """The library that PyTorch has loaded. Raises OSError."""
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '12').partition('.')[0]}")


@cache
def handle(device: int) -> int:
    """The library's handle on the current device, whose number is given."""
    made = ctypes.c_void_p()
    _call("cublasLtCreate", ctypes.byref(made))
    return made.value or 0


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(library(), name)(*arguments):
        raise CublasError(f"{name}: {status}")


def _made(kind: str, *arguments: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _call(f"cublasLt{kind}Create", ctypes.byref(made), *arguments)
    return made


def _layout(x: Tensor) -> tuple[ctypes.c_void_p, int]:
    """A matrix, stored by rows or by columns, as the library sees it, and whether by columns."""
    rows, cols = x.shape
    by_columns = x.stride(1) != 1
    if by_columns:
        sizes = rows, cols, x.stride(1)
    else:  # the transpose of it, stored by columns
        sizes = cols, rows, x.stride(0)
    numbers = (ctypes.c_uint64(sizes[0]), ctypes.c_uint64(sizes[1]), ctypes.c_int64(sizes[2]))
    return _made("MatrixLayout", ctypes.c_int(REAL_16BF), *numbers), int(by_columns)


class Matmul:
    """One product of the library's: what its call takes besides addresses."""

    def __init__(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """bf16 operands, on the current device; out: `[m, n]`, contiguous. Raises CublasError."""
        self.handle = handle(out.device.index)
        self.description = _made("MatmulDesc", ctypes.c_int(COMPUTE_32F), ctypes.c_int(REAL_32F))
        # It computes the transpose of out, which it sees stored by columns: `b.T @ a.T`.
        (self.first, turned_b), (self.second, turned_a) = _layout(b), _layout(a)
        self.result = _layout(out)[0]
        for attribute, turned in ((TRANSPOSE_A, turned_b), (TRANSPOSE_B, turned_a)):
            value = ctypes.c_int32(turned)
            _call(
                "cublasLtMatmulDescSetAttribute", self.description, ctypes.c_int(attribute),
                ctypes.byref(value), ctypes.c_size_t(4),
            )  # fmt: skip
        self.algorithm, self.workspace = _Algorithm(), 0
        layouts = self.first, self.second, self.result
        weakref.finalize(self, _forget, self.description, layouts).atexit = False

    def algorithms(self) -> Iterator[_Algorithm]:
        """The library's algorithms for it, the one that it expects to be fastest first."""
        preference = _made("MatmulPreference")
        try:
            limits: list[Any] = [(MOST_WORKSPACE, ctypes.c_uint64(WORKSPACE))]
            limits += [(attribute, ctypes.c_uint32(ALIGNED)) for attribute in ALIGNMENTS]
            for attribute, value in limits:
                _call(
                    "cublasLtMatmulPreferenceSetAttribute", preference, ctypes.c_int(attribute),
                    ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)),
                )  # fmt: skip
            found, count = (_Algorithm * TRIED)(), ctypes.c_int()
            _call(
                "cublasLtMatmulAlgoGetHeuristic", ctypes.c_void_p(self.handle), self.description,
                self.first, self.second, self.result, self.result, preference,
                ctypes.c_int(TRIED), found, ctypes.byref(count),
            )  # fmt: skip
        finally:
            library().cublasLtMatmulPreferenceDestroy(preference)
        yield from (each for each in found[: count.value] if not each.state)

    def run(self, algorithm: _Algorithm, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Compute it by an algorithm. Raises CublasError."""
        room = torch.empty(algorithm.workspace, dtype=torch.uint8, device=out.device)
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        stream = torch.cuda.current_stream(out.device).cuda_stream
        first, second, result, space = (
            ctypes.c_void_p(tensor.data_ptr()) for tensor in (b, a, out, room)
        )
        _call(
            "cublasLtMatmul", ctypes.c_void_p(self.handle), self.description, ctypes.byref(one),
            first, self.first, second, self.second, ctypes.byref(zero), result, self.result,
            result, self.result, ctypes.byref(algorithm), space,
            ctypes.c_size_t(algorithm.workspace), ctypes.c_void_p(stream),
        )  # fmt: skip


def _forget(description: ctypes.c_void_p, layouts: tuple[ctypes.c_void_p, ...]) -> None:
    for layout in layouts:
        library().cublasLtMatrixLayoutDestroy(layout)
    library().cublasLtMatmulDescDestroy(description)


def _matrix(x: Tensor) -> bool:
    """Whether it is one that the library reads: bf16, by rows or by columns, none of it twice."""
    (rows, cols), (down, across) = x.shape, x.stride()
    stored = (across == 1 and down >= cols) or (down == 1 and across >= rows)
    return x.dtype == torch.bfloat16 and stored and x.data_ptr() % ALIGNED == 0


def as_pytorch(out: Tensor, a: Tensor, b: Tensor) -> Matmul | None:
    """The library's product with the bits of out, which PyTorch made; None if there is none.

    a: `[m, k]`, b: `[k, n]`, out: `[m, n]`, on CUDA. Waits for the device; not while a graph is
    captured.
    """
    matrices = a.dim() == b.dim() == 2 and all(map(_matrix, (a, b, out))) and out.is_contiguous()
    current = out.device.index == torch.cuda.current_device()
    if not matrices or not current or torch.cuda.is_current_stream_capturing():
        return None
    try:
        made = Matmul(out, a, b)
        for algorithm in made.algorithms():
            again = torch.empty_like(out)
            made.run(algorithm, again, a, b)
            if torch.equal(again.view(torch.int16), out.view(torch.int16)):
                made.algorithm, made.workspace = algorithm, algorithm.workspace
                return made
    except (CublasError, OSError, AttributeError):
        pass  # the product stays PyTorch's
    return None
