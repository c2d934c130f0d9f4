"""The device under test: the CPU when Triton interprets, else a GPU."""

from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from kernel_checks import INTERPRETING
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from opsgraph.kernels.triton import launch

DEVICES = ["cpu"] if INTERPRETING else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def bf16_rounds_to_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates fp32 to bf16 (as of 3.9), where the hardware rounds.

    Without this, no kernel that rounds on the way can be compared bit for bit.
    """
    convert = interpreter._convert_float

    def rounding(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(value, source, target, mode)
        bits = torch.from_numpy(numpy.array(value)).bfloat16().view(torch.int16)
        return bits.numpy().view(numpy.uint16)

    if INTERPRETING:
        monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other, and takes as long for a small block."""
    if INTERPRETING:
        for options in (launch.SUM_CONFIG, launch.SUM_FEW_CONFIG):
            monkeypatch.setitem(options, "BLOCK", 512)


@pytest.fixture(autouse=True)
def no_mask_is_made_of_a_block_and_a_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.9 makes an int32 of such a mask, and loads and stores refuse it.

    Others accept it: without this, nothing else than that version would tell of a new one.
    """
    for name in ("and_", "or_", "xor_"):
        combine = getattr(TritonSemantic, name)

        def checked(self: Any, one: Any, other: Any, combine: Any = combine) -> Any:
            kinds = {x.type.is_block() for x in (one, other) if isinstance(x, tl.tensor)}
            if len(kinds) > 1 and one.type.scalar.is_int1() and other.type.scalar.is_int1():
                raise TypeError("got a block of int1 and a scalar int1, expected two of a kind")
            return combine(self, one, other)

        if INTERPRETING:
            monkeypatch.setattr(TritonSemantic, name, checked)


@pytest.fixture(autouse=True)
def bounds_of_loops_are_ints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 makes an int of a one-element array; NumPy 2.5 refuses that."""
    patch = interpreter._patch_lang_tensor

    def patching(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    if INTERPRETING:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patching)
