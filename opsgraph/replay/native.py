"""The C library that replays, and the programs of words that it reads (`source/replay.cpp`)."""

import ctypes
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import cache

import torch

from ..kernels.cpu import build
from ..kernels.cublaslt import library as cublaslt
from . import shim
from .events import Aten, Event, Exchange, Kernel, Launch, Matmul, Operand, Place, Wait

END, KERNEL, LAUNCH, ATEN, MATMUL = range(5)
NONE, ARENA = -2, -1
"""In the place of a buffer's number; the arena is one that the library provides."""
KINDS = ("mm", "addmm", "bmm", "copy", "zero", "baddbmm")
"""Ops of PyTorch, in the order of the library's codes."""
_COMMON = ("create_tensor_from_blob", "delete_tensor_object", "copy_", "zero_")
_CONTEXT = ("cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
_PRODUCTS = ("mm_out", "addmm_out", "bmm_out", "baddbmm_out")

Replay = Callable[[int, bytes, int], int]


@cache
def replay(kind: str) -> Replay:
    """The library's function, for devices of that kind. Raises BuildError, OSError, AttributeError.

    It takes the address of a program, where each buffer begins, and CUDA's stream; it returns 0, or
    the number of the step that failed, plus 1, plus the error's code times 2^32.
    """
    library = build.library("replay")
    cpu = shim.library("torch_cpu")
    cuda = shim.library("torch_cuda") if torch.cuda.is_available() else None

    def addresses(where: ctypes.CDLL | None, *names: str) -> list[int]:
        return [shim.address(where, name) if where else 0 for name in names]

    table = addresses(cpu, *(shim.PREFIX + name for name in _COMMON))
    for name in _PRODUCTS:
        table += addresses(cpu, f"{shim.PREFIX}cpu_{name}")
        table += addresses(cuda, f"{shim.PREFIX}cuda_{name}")
    driver = ctypes.CDLL("libcuda.so.1") if cuda else None
    table += addresses(driver, "cuLaunchKernel")
    table += addresses(cublaslt.library() if cuda else None, "cublasLtMatmul")
    table += addresses(cublaslt.library() if cuda else None, "cublasLtMatmulDescSetAttribute")
    table += addresses(driver, *_CONTEXT)
    library.opsgraph_replay_bind((ctypes.c_void_p * len(table))(*table))
    if kind == "cuda" and cuda is None:
        raise OSError("no CUDA device")
    function = library.opsgraph_replay
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function


def why_not(kind: str) -> str | None:
    """Why nothing is replayed on devices of that kind, or None."""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and torch.version.hip):
        return f"replays are for CPUs and CUDA, not for {'ROCm' if torch.version.hip else kind}"
    try:
        replay(kind)
    except build.BuildError as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f"what replays call is not there: {error}"
    return None


Locate = Callable[[Place], tuple[int, int]]
"""Where a place is for a program: the number of the buffer that it is handed, and an offset."""


def program(
    events: Sequence[tuple[int, Event]], locate: Locate, arena: int, device: torch.device
) -> "array[int]":
    """The words of events, each with the number of its line, for the library.

    arena: bytes that the library is to provide. It names what must live as long as it does.
    """
    words = array("q", (arena, device.index if device.type == "cuda" else -1))
    for step, event in events:
        opcode, numbers, own = _encoded(event, locate)
        words.extend((opcode, step, len(numbers) + len(own) // 8, *numbers))
        words.frombytes(own)
    words.append(END)
    return words


def _encoded(event: Event, locate: Locate) -> tuple[int, list[int], bytes]:
    """Its opcode and its words: numbers first, then those that it has as bytes."""
    if isinstance(event, Aten):
        return ATEN, _aten(event, locate), b""
    if isinstance(event, Matmul):
        return MATMUL, _matmul(event, locate), b""
    assert not isinstance(event, Exchange | Wait), "the library has no exchanges"
    head = [event.function, 0, 0, 0, 0, 0]
    if isinstance(event, Launch):
        head = [event.function, *event.grid, event.threads, event.shared]
    places = [number for word, place in event.places for number in (word, *locate(place))]
    numbers = [*head, len(event.words) // 8, len(event.places), *places]
    return (KERNEL if isinstance(event, Kernel) else LAUNCH), numbers, event.words


def _matmul(event: Matmul, locate: Locate) -> list[int]:
    made, nowhere = event.product, (NONE, 0)
    fixed = [made.handle, made.description, made.first, made.second, made.added]
    places = [nowhere if place is None else locate(place) for place in event.places]
    pointers = [number for key, place in event.pointers for number in (key, *locate(place))]
    flat = [number for place in places for number in place]
    count = len(event.pointers)
    fixed += [made.result, made.address, made.alpha, made.beta, made.workspace]
    return [*fixed, *flat, count, *pointers]


def _aten(event: Aten, locate: Locate) -> list[int]:
    first = event.operands[0]
    assert first is not None
    tensors = [word for operand in event.operands for word in _operand(operand, locate)]
    scalars = struct.unpack("=2q", struct.pack("=2d", *event.scalars))
    on_cuda = first.device.type == "cuda"
    return [KINDS.index(event.kind), on_cuda, len(event.operands), *tensors, *scalars]


def _operand(operand: Operand | None, locate: Locate) -> list[int]:
    if operand is None:
        return [NONE, 0, 0, 0, 0, 0]
    device, sizes = operand.device, operand.sizes
    dtype, kind = shim.dtype_code(operand.dtype), shim.device_code(device.type)
    assert dtype is not None
    described = [dtype, kind, device.index or 0, len(sizes)]
    return [*locate(operand.place), *described, *sizes, *operand.strides]
