"""The backends that come with opsgraph, in order of preference, and what each needs."""

import importlib.util

import torch

from ..base.backend import Backend, add_backend
from .triton import interpreting


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def _overlap() -> str | None:
    return None if torch.distributed.is_available() else "this PyTorch has no torch.distributed"


def _symmetric() -> str | None:
    if torch.distributed.is_available() and torch.cuda.is_available():
        return None
    return _overlap() or "no CUDA device, whose memory other ranks could read"


def _cublaslt() -> str | None:
    if interpreting():
        return None  # so that plans are a GPU's; PyTorch multiplies in the library's place
    if not torch.cuda.is_available() or torch.version.hip:
        return "no CUDA device; recipes are emulated exactly"
    from .cublaslt import library  # only where there is a device

    try:
        library.library()
    except (OSError, AttributeError) as error:
        return f"cuBLASLt is not there: {error}"
    return None


def _cpu() -> str | None:
    from .cpu import build  # only where a backend is asked for

    return build.why_not()


for _backend in (
    Backend("symmetric", "PyTorch's symmetric memory over NVLink", ("cuda",), _symmetric),
    Backend("overlap", "collectives in pieces, behind matrix products", None, _overlap),
    Backend("triton", "Triton kernels", ("cuda",), _triton, interpreting),
    Backend("cublaslt", "products of cuBLASLt, measured", ("cuda",), _cublaslt, interpreting),
    Backend("cpu", "C++ kernels, compiled here at first use", ("cpu",), _cpu),
    Backend("aten", "PyTorch's own fused calls (cuBLASLt, oneDNN)"),
):
    add_backend(_backend)
