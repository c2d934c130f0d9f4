"""Quantizers whose scales are themselves of few bits: MXFP8 and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.cpu.dequantize import dequantize_mxfp8
from ..kernels.formats import E4M3, NVFP4, Format, Target
from ..kernels.reference import nvfp4, quantize
from .quantizers import BF16, Copy, Operand, Quantizer


@dataclass(frozen=True)
class MXQuantizer(Quantizer):
    """MXFP8: an E8M0 scale for each 32 columns of a row."""

    dtype: torch.dtype = E4M3
    multiple: ClassVar[int] = quantize.MX_BLOCK

    @property
    def format(self) -> Target:
        return Format("mx", self.dtype)

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        return Copy(self, *quantize.quantize_mxfp8(x, self.dtype))

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        return dequantize_mxfp8(copy.data, copy.scale, dtype)

    @property
    def factor(self) -> str:
        return "none"

    def operand(self, copy: Copy) -> Operand:
        return Operand(self.dequantize(copy, BF16))


@dataclass(frozen=True)
class NVFP4Quantizer(Quantizer):
    """NVFP4: E2M1 data, an E4M3 scale for each block of `height` (1 or 16) by 16, one amax.

    stochastic: round stochastically. hadamard: transform `col` copies first, along the dimension
    that is contracted; both operands of a product have to. Data is `[rows, blocks, 8]` bytes.
    """

    height: int = 1
    stochastic: bool = False
    hadamard: bool = False

    @property
    def format(self) -> Target:
        return NVFP4(self.height, self.stochastic, self.hadamard)

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        if col and self.hadamard:
            x = nvfp4.hadamard(x.contiguous())
        else:
            x = torch.nn.functional.pad(x, (0, -x.size(1) % nvfp4.BLOCK))
        seed = torch.randint(2**62, (), device=x.device) if self.stochastic else None
        amax = quantize.amax_of(x)
        data, scale = nvfp4.quantize_nvfp4(x, amax, self.height, seed)
        blocks = x.size(1) // nvfp4.BLOCK
        return Copy(self, data.view(data.size(0), blocks, nvfp4.BLOCK // 2), scale, amax)

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        data, amax = copy.data.flatten(1), copy.amax
        assert amax is not None
        return nvfp4.dequantize_nvfp4(data, copy.scale, amax, 2 * data.size(1), dtype)

    @property
    def factor(self) -> str:
        return "tensor"

    def operand(self, copy: Copy) -> Operand:
        data, amax = copy.data.flatten(1), copy.amax
        assert amax is not None
        values = nvfp4.block_values(data, copy.scale.to(BF16), 2 * data.size(1))
        return Operand(values, nvfp4.tensor_multiplier(amax).reciprocal())
