"""Quantizers: how one tensor becomes low-precision data and scales, and what a GEMM reads of it.

A GEMM of quantized operands is `a @ b.T`, both contracted over their rows' elements, along which
scales run. So a value has two copies: `row` for the product that contracts over its width (its own
pass's GEMM) and `col` for the one that contracts over its rows (the data or weight gradient's).
`col` is the copy of the transpose, data `[width, rows]`. Where the grid of scales transposes
exactly the two are one, and `row` alone is made.

The arithmetic is `kernels.reference.quantize` and `nvfp4`; the formulas stand there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..guards.cached import cached_property
from ..kernels.cpu.dequantize import decode, dequantize
from ..kernels.formats import FOUR, NVFP4, Format, Target, inverse_shape, layout_of
from ..kernels.reference import quantize
from ..op import ROWS, Spec, Storage
from .quantizable import verify_call, verify_fields

BF16 = torch.bfloat16
COPIES = ("row", "col")
ROLES = ("activation", "weight", "gradient")
"""What a quantizer is asked for, one each; delayed scaling has a column for each, in this order."""


class Copy(NamedTuple):
    """One quantized copy `[rows, cols]` for a product that contracts over `cols`.

    data and scale: as the quantizer's function returns them; amax: NVFP4's, of the whole tensor;
    inverse: `1 / scale`, with which scaled GEMMs multiply, as they read it (`inverted`).
    """

    quantizer: Quantizer
    data: Tensor
    scale: Tensor
    amax: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of."""
        return _parts(self)

    @property
    def multiplier(self) -> Tensor:
        """`1 / scale`: a GEMM multiplies with it what the quantizer multiplied with the scale."""
        if self.inverse is None or self.scale.dim():
            return self.scale.reciprocal()
        return self.inverse

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that a GEMM multiplies, `[rows, cols]`; NVFP4 fills cols up to blocks."""
        return self.quantizer.dequantize(self, dtype)


def _parts(copy: Copy) -> tuple[Tensor, ...]:
    """`copy.parts` for code that is compiled: Dynamo 2.9 sees no property of a NamedTuple."""
    tensors = [copy.data, copy.scale]
    if copy.amax is not None:
        tensors.append(copy.amax)
    if copy.quantizer.inverts_on(copy.data.device):
        inverse = copy.quantizer.inverted(copy.scale) if copy.inverse is None else copy.inverse
        tensors.append(inverse)
    return tuple(tensors)


class Operand(NamedTuple):
    """What a copy stands for as `values * factor`: bf16 `[rows, cols]`, rounded nowhere, and fp32.

    factor: as the quantizer's `factor` says, `[]` or `[rows, 1]`; None is 1. Values below 2^-126
    and products of two that are below it may count as zero on bf16 units.
    """

    values: Tensor
    factor: Tensor | None = None


class Quantized(NamedTuple):
    """A quantized value: its copies, None for one that is not used, and the dtype it stands for."""

    row: Copy | None
    col: Copy | None
    dtype: torch.dtype

    def at(self, device: torch.device, dtype: torch.dtype) -> Quantized:
        """The same on another device, standing for another dtype."""

        def moved(copy: Copy | None) -> Copy | None:
            if copy is None or copy.data.device == device:
                return copy
            return copy.quantizer.made(*(part.to(device) for part in copy.parts))

        return Quantized(moved(self.row), moved(self.col), dtype)


@dataclass(frozen=True)
class Quantizer:
    """How tensors of one role are quantized. Equal quantizers are interchangeable.

    A quantizer of your own gives `copy`, `dequantize`, `storage` and `specs`, sets `shared` where
    `col` is the transpose of `row`, and gives `factor` and `operand` where bf16 holds its values.
    One whose copies lie as those of a known format may give `format` in place of the middle two,
    and `by_kernels = False` where kernels would not compute the same bits.
    """

    shared: ClassVar[bool] = False
    delayed: ClassVar[bool] = False
    """Whether the scale is given, made from earlier amaxes, and each call's amax is handed out."""
    multiple: ClassVar[int] = 16
    """What the width of a GEMM's operand must be a multiple of."""
    by_kernels: ClassVar[bool] = False
    """Whether kernels may stand in for `copy`: by default in classes that give `format` themselves.
    A class that inherits it may quantize in a way of its own."""

    def __post_init__(self) -> None:
        verify_fields(self)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "by_kernels" not in vars(cls):
            cls.by_kernels = "format" in vars(cls)

    @property
    def format(self) -> Target | None:
        """How copies lie, as kernels know it; None for a layout of its own."""
        return None

    @cached_property
    def storage(self) -> Storage:
        """The layout of copies, for specs."""
        if self.format is None:
            raise NotImplementedError(f"{type(self).__name__}: it has no format of its own")
        return Storage(*layout_of(self.format)[:5])

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        """Quantize x `[rows, cols]` along rows; scale only where it is delayed.

        col: whether x is the transpose of a value, whose `col` copy is wanted.
        """
        raise NotImplementedError(f"{type(self).__name__}: it has no copy of its own")

    def inverts_on(self, device: torch.device) -> bool:
        """Whether `1 / scale` is a part of copies, made once for all products that read them."""
        return False

    def inverted(self, scale: Tensor) -> Tensor:
        """`1 / scale` of a copy as its products read it, where that is a part."""
        return scale.reciprocal()

    def made(self, data: Tensor, scale: Tensor, *more: Tensor) -> Copy:
        """The copy that is made of parts; `1 / scale` may be left out."""
        return Copy(self, data, scale, *more)

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        """The values of a copy."""
        raise NotImplementedError

    @property
    def factor(self) -> str | None:
        """What makes a copy's values bf16 numbers, if it is taken out: "tensor", a factor of all;
        "rows", one of each row; "none", nothing need be; None: no such factor does."""
        return None

    def operand(self, copy: Copy) -> Operand:
        """A copy for a product in bf16, where there is a `factor`."""
        raise NotImplementedError

    def specs(self, rows: int, cols: int, device: torch.device) -> tuple[Spec, ...]:
        """The spec of each part of a copy `[rows, cols]`; rows or cols may be `ROWS`."""
        to = self.format
        assert to is not None
        layout, number = layout_of(to), Spec((), torch.float32, device)
        down, blocks = _steps(rows, layout.height), _steps(cols, layout.block or 1)
        scale = Spec((down, blocks if layout.block else 1), layout.scale_dtype, device)
        if isinstance(to, NVFP4):
            return Spec((rows, blocks, layout.block // 2), torch.uint8, device), scale, number
        data = Spec((rows, cols), to.dtype, device)
        if to.scaling == "tensor":
            return data, number, number
        if not self.inverts_on(device):
            return data, scale
        shape = inverse_shape(to.scaling, rows, cols, _steps)
        return data, scale, Spec(shape, torch.float32, device)

    def reject(self, name: str, width: int) -> str | None:
        """Why it quantizes no value of that width, which errors call `name`; or None."""
        if width % self.multiple == 0:
            return None
        return f"got {name} {width}, expected a multiple of {self.multiple} for {self.storage.name}"

    def amax(self, x: Tensor) -> Tensor:
        """x's largest magnitude, fp32 `[]`, NaN if there is one."""
        return quantize.amax_of(x)

    # -- what plans call --

    def __call__(
        self, x: Tensor, want: Collection[str] = COPIES, scale: Tensor | None = None
    ) -> Quantized:
        """Quantize `[rows, width]`; of `want` are "row" and "col"."""
        verify_call(self, x, want, scale)
        value = x.float() if x.dtype == torch.float64 else x
        row = col = None
        if "row" in want or self.shared:
            row = self.copy(value, scale)
        if "col" in want:
            col = transposed(row) if row and self.shared else self.copy(value.t(), scale, True)
        return Quantized(row, col, x.dtype)

    def part_specs(self, spec: Spec, name: str) -> tuple[Spec, ...]:
        """Specs of the parts of one copy of a value of that spec."""
        rows, width = spec.shape
        sizes = (rows, width) if name == "row" or self.shared else (width, rows)
        found = self.specs(*sizes, spec.device)
        if name == "col" and self.shared:
            found = (*found[:2], *self.specs(width, rows, spec.device)[2:])
        return tuple(part.times(spec.factor) for part in found)

    def parts(self, value: Quantized, name: str) -> tuple[Tensor, ...]:
        """The parts of one copy; of a shared column copy data and scale are transposed."""
        copy = value.row if name == "row" else value.col
        assert copy is not None
        parts = _parts(copy)
        if name == "col" and self.shared:
            return parts[0].t(), parts[1].t(), *parts[2:]
        return parts

    def load(self, dtype: torch.dtype, **parts: Sequence[Tensor]) -> Quantized:
        """The value again from the parts of its copies: `load(dtype, row=(data, scale))`."""
        copies = {name: self.made(*tensors) for name, tensors in parts.items()}
        if "col" in copies and self.shared:
            col = copies["col"]
            copies["col"] = transposed(col)._replace(inverse=col.inverse)
        return Quantized(copies.get("row"), copies.get("col"), dtype)


def transposed(copy: Copy) -> Copy:
    """The copy of the transpose, where that is the transpose of the copy.

    `1 / scale` of blocks is not: it is filled up.
    """
    inverse = None if copy.scale.dim() else copy.inverse
    return copy._replace(data=copy.data.t(), scale=copy.scale.t(), inverse=inverse)


def _steps(size: int, block: int) -> int:
    """How many blocks there are in `size` rows or columns, for a Spec."""
    return -block if size == ROWS else -(-size // block)


@dataclass(frozen=True)
class TensorQuantizer(Quantizer):
    """FP8 with one scale for the tensor, from its own amax."""

    dtype: torch.dtype
    eps: float = 0.0
    power_of_two: bool = False
    shared: ClassVar[bool] = True

    @property
    def format(self) -> Target:
        return Format("tensor", self.dtype, self.eps, self.power_of_two)

    def inverts_on(self, device: torch.device) -> bool:
        return self.shared

    def made(self, data: Tensor, scale: Tensor, *more: Tensor) -> Copy:
        if not self.shared:
            return Copy(self, data, scale)
        return Copy(self, data, scale, None, more[0] if more else scale.reciprocal())

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        return self.made(*quantize.quantize_tensor(x, self.dtype, self.eps, self.power_of_two))

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        return decode(copy.data, dtype, copy.multiplier)

    @property
    def factor(self) -> str:
        return "tensor"

    def operand(self, copy: Copy) -> Operand:
        return Operand(decode(copy.data, BF16), copy.multiplier)


@dataclass(frozen=True)
class DelayedQuantizer(TensorQuantizer):
    """FP8 with one scale for the tensor, from the amaxes of earlier steps."""

    delayed: ClassVar[bool] = True
    format = TensorQuantizer.format

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        assert scale is not None
        return self.made(quantize.cast(x, scale, self.dtype), scale)


@dataclass(frozen=True)
class RowQuantizer(TensorQuantizer):
    """FP8 with one scale for each row of a copy, from its own amax."""

    shared: ClassVar[bool] = False

    @property
    def format(self) -> Target:
        return Format("rows", self.dtype, self.eps, self.power_of_two)

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        return self.made(*quantize.quantize_rows(x, self.dtype, self.eps, self.power_of_two))

    @property
    def factor(self) -> str:
        return "none" if self.power_of_two else "rows"

    def operand(self, copy: Copy) -> Operand:
        if self.power_of_two:
            return Operand(dequantize(copy.data, copy.scale, BF16, True))
        return super().operand(copy)


@dataclass(frozen=True)
class BlockQuantizer(Quantizer):
    """FP8 with an fp32 scale for each block of `height` rows (1 or 128) by 128 columns."""

    dtype: torch.dtype
    height: int = 1
    eps: float = 0.0
    power_of_two: bool = True

    @property
    def shared(self) -> bool:  # type: ignore[override]
        """Square blocks transpose exactly."""
        return self.height > 1

    @property
    def format(self) -> Target:
        scaling = "square" if self.shared else "blocks"
        return Format(scaling, self.dtype, self.eps, self.power_of_two)

    def inverts_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def inverted(self, scale: Tensor) -> Tensor:
        lines = scale if self.shared else scale.t()
        filled = torch.nn.functional.pad(lines.reciprocal(), (0, -lines.size(1) % FOUR), value=1.0)
        inverse: Tensor = filled.unflatten(1, (-1, FOUR))
        return inverse

    def made(self, data: Tensor, scale: Tensor, *more: Tensor) -> Copy:
        return Copy(self, data, scale, None, *more)

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        return Copy(
            self,
            *quantize.quantize_blocks(x, self.dtype, self.height, self.eps, self.power_of_two),
        )

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        return dequantize(copy.data, copy.scale, dtype)

    @property
    def factor(self) -> str | None:
        return "none" if self.power_of_two else None

    def operand(self, copy: Copy) -> Operand:
        return Operand(dequantize(copy.data, copy.scale, BF16, True))
