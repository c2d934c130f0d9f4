"""Native calls as Python makes them: with tensors as they are, past `ctypes`.

Where each tensor begins is found in C (`source/replay.cpp`), in a tenth of the time that it takes
in Python. CPython calls these functions as it calls its own. Where PyTorch does not tell C where a
tensor begins, functions in Python do the same.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from itertools import chain
from operator import or_
from typing import Any

from torch import Tensor

from ..guards.launching import Hosts
from ..guards.launching import unmoved as in_python
from ..guards.torch_private import begins, held
from ..kernels.cpu import build
from . import shim
from .native import Replay, replay, why_not

PAGE = 4096
"""No memory of a tensor begins at an address below."""
_FASTCALL = 0x80
_FUNCTIONS = (
    "PyLong_AsLongLong", "PyLong_FromLongLong", "PyEval_SaveThread", "PyEval_RestoreThread",
    "PyErr_SetString", "PyTuple_GetItem", "PyTuple_Size", "PyDict_GetItem", "PyBytes_AsString",
    "PyBool_FromLong",
)  # fmt: skip
_OF_TENSORS = "get_storage_size", "get_storage_offset", "get_numel"

Call = Callable[..., int]


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )  # fmt: skip


_make: Any = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.POINTER(_Method), ctypes.py_object, ctypes.c_void_p
)(("PyCFunction_NewEx", ctypes.pythonapi))


_methods: dict[str, _Method] = {}


def _method(name: str) -> _Method:
    """A function of the library, for CPython: one for ever, whichever thread made it first."""
    if name in _methods:
        return _methods[name]
    library, python = build.library("replay"), ctypes.pythonapi
    called = [ctypes.cast(getattr(python, name), ctypes.c_void_p).value for name in _FUNCTIONS]
    error = ctypes.c_void_p.in_dll(python, "PyExc_RuntimeError").value
    torch = shim.library("torch_cpu")
    told = [shim.address(torch, shim.PREFIX + name) for name in _OF_TENSORS]
    table = begins, *called, error, *told, held
    library.opsgraph_python_bind((ctypes.c_void_p * len(table))(*table))
    made = _Method(name.encode(), ctypes.cast(library[name], ctypes.c_void_p), _FASTCALL)
    return _methods.setdefault(name, made)


def caller(program: "array[int]", kind: str) -> Call:
    """What replays a program that somebody holds, on devices of a kind: `call(stream, *tensors)`.

    It returns 0, or what `native.replay` says failed. Raises RuntimeError for tensors that have no
    memory.
    """
    run, (start, _) = replay(kind), program.buffer_info()
    if begins is None:
        return partial(_call, run, start)
    made: Call = _make(_method("opsgraph_call"), start, None)
    return made


def _call(run: Replay, start: int, stream: int, *tensors: Tensor) -> int:
    return run(start, array("q", map(Tensor.data_ptr, tensors)).tobytes(), stream)


def launcher(program: "array[int]", bits: Sequence[int], kind: str) -> Call:
    """The same, which does nothing and returns -1 where a tensor begins below `PAGE`, or where its
    bits, of the address, are not all 0. bits: of each tensor.
    """
    run, (start, _) = replay(kind), program.buffer_info()
    if begins is None:
        return partial(_launch, run, start, bits)
    known = start, PAGE, array("q", bits).tobytes()
    made: Call = _make(_method("opsgraph_launch"), known, None)
    return made


def _launch(run: Replay, start: int, bits: Sequence[int], stream: int, *tensors: Tensor) -> int:
    at = [*map(Tensor.data_ptr, tensors)]
    if any(each < PAGE or each & own for each, own in zip(at, bits, strict=True)):
        return -1
    return run(start, array("q", at).tobytes(), stream)


@cache
def bits() -> Call:
    """What joins the low bits of where tensors begin, below `PAGE`; -1 where one begins there.

    Raises RuntimeError for tensors that have no memory.
    """
    if begins is None:
        return _bits
    made: Call = _make(_method("opsgraph_bits"), PAGE, None)
    return made


def unmoved(hosts: Hosts, names: Sequence[str], buffers: Sequence[Tensor]) -> Callable[[], bool]:
    """`guards.launching.unmoved`."""
    if begins is None or held is None or why_not("cpu") is not None:
        return in_python(hosts, names, buffers)
    numbers = [array("q", map(of, buffers)).tobytes() for of in (Tensor.data_ptr, Tensor.numel)]
    known = (*hosts,), ("_buffers", *names), (*buffers,), *numbers
    made: Callable[[], bool] = _make(_method("opsgraph_unmoved"), known, None)
    return made


def short(needed: Sequence[tuple[int, int]]) -> Callable[..., bool]:
    """What tells whether the storage of one of some tensors ends before the tensor does.

    needed: the bytes of an element, and from the first to the last one's end, of each.
    """
    if begins is None or held is None:
        return partial(_short, needed)
    bytes_ = array("q", chain.from_iterable(needed)).tobytes()
    made: Callable[..., bool] = _make(_method("opsgraph_short"), bytes_, None)
    return made


def _short(needed: Sequence[tuple[int, int]], *tensors: Tensor) -> bool:
    return any(
        len(t.untyped_storage()) - t.storage_offset() * size < count
        for t, (size, count) in zip(tensors, needed, strict=True)
    )


def _bits(*tensors: Tensor) -> int:
    addresses = [*map(Tensor.data_ptr, tensors)]
    return -1 if min(addresses) < PAGE else reduce(or_, addresses) % PAGE
