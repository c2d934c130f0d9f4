"""Scaled GEMMs on the tensor cores' FP8 and FP4 units: they take what Quantize wrote, with scales.

PyTorch's calls multiply by the scales that they are given, where ours divide: they get 1 / scale.
What `FAMILIES` does not name for this chip stays with the reference, which emulates it.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.cublaslt.library import CublasError
from ...kernels.formats import E4M3, E5M2, FOUR, LAYOUTS, names_of
from ...kernels.lazy import Lazy
from ...kernels.reference.nvfp4 import tensor_multiplier
from ...kernels.reference.quantize import BLOCK
from ...op import Op, Spec, Storage
from ...ops import BasicLinear, Bias
from ...precision.products import product
from ...precision.quantizers import Copy, Quantized

ALIGNMENT = 16

native, gemm = Lazy("cublaslt.scaled_mm"), Lazy("cublaslt.gemm")


def chip() -> int:
    """The major number of the current device's compute capability, 0 without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def units() -> bool:
    """Whether the current device has FP8 units; true without one."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


def cuda() -> tuple[int, ...]:
    """The version that PyTorch is built with."""
    return tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))


class Family(NamedTuple):
    """Formats that the library multiplies with each other, by the names that layouts have.

    chip: the major number of the compute capability that has them, 0 for all with FP8 units. cuda:
    the least version. multiple: what in_features and out_features have to be a multiple of.
    dtypes: of the result.
    """

    about: str
    formats: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    chip: int = 0
    cuda: tuple[int, int] = (12, 0)
    multiple: int = 1

    def why_not(self) -> str | None:
        """Why such operands are emulated here, or None."""
        if not self.chip:
            return None if units() else "the device has no FP8 units (sm_89 has)"
        if chip() != self.chip:
            return f"units for it are those of sm_{self.chip}0"
        if cuda() < self.cuda or not hasattr(torch.nn.functional, "scaled_mm"):
            return f"it takes CUDA {self.cuda[0]}.{self.cuda[1]} and torch 2.10"
        return None


_HALF = torch.float16
FAMILIES = (
    Family("FP8, a scale per tensor", names_of("tensor"), (torch.bfloat16, torch.float32, _HALF)),
    Family("FP8, a scale per row", names_of("rows"), (torch.bfloat16,)),
    Family("FP8, blocks of 128", names_of("blocks", E4M3), chip=9, cuda=(12, 9), multiple=128),
    Family("MXFP8", names_of("mx"), chip=10, cuda=(12, 8)),
    Family("NVFP4", (LAYOUTS["nvfp4"].name,), chip=10, cuda=(12, 8)),
)


def _family(storage: Storage | None) -> Family | None:
    return next((f for f in FAMILIES if storage is not None and storage.name in f.formats), None)


def _formats(first: Storage, second: Storage) -> str | None:
    """Why two formats cannot be multiplied, or None."""
    if "e5m2" in first.name and "e5m2" in second.name:
        return "no unit multiplies E5M2 by E5M2"
    family, emulated = _family(first), f"{first.name} by {second.name} is emulated"
    if family is None or family is not _family(second):
        return emulated
    if reason := family.why_not():
        return f"{emulated}: {reason}"
    if first.height == second.height == BLOCK:
        return f"no unit multiplies two operands with blocks of {BLOCK} rows"
    return None


def reject_gradient_formats(x: Storage, weight: Storage, dy: Storage | None) -> str | None:
    """Why the two products of a backward cannot be scaled GEMMs, or None."""
    if dy is None:
        return "the recipe leaves the gradient in high precision"
    return _formats(dy, weight) or _formats(dy, x)


def reject_product(fc: Any, x: Spec) -> str | None:
    """Why a linear layer's products, of x as it is stored, cannot be such ones, or None."""
    family = _family(x.storage)
    if family is None:
        return None  # `_formats` says why
    if x.dtype not in family.dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in family.dtypes)
        return f"{family.about}: it writes {known}, not {x.dtype}"
    for name in ("in_features", "out_features"):
        size = getattr(fc, f"local_{name}")
        if size % family.multiple:
            return f"{family.about}: {name} {size} is not a multiple of {family.multiple}"
    return None


def scaled_mm(
    a: Copy | None, b: Copy | None, dtype: torch.dtype, fast: bool = False,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`a @ b.T (+ bias)` of copies `[rows, depth]` and `[cols, depth]`, in dtype.

    fast: accumulate in the tensor core's own, shorter sums, as forward passes may, but for formats
    with blocks.
    """
    assert a is not None and b is not None  # noqa: PT018
    rows, cols = a.data.size(0), b.data.size(0)
    if not a.data.numel() * cols:
        zeros = torch.zeros(rows, cols, dtype=dtype, device=a.data.device)
        return zeros if bias is None else zeros + bias
    if bias is not None and not gemm.takes_bias(bias, dtype):
        bias = bias.clone(memory_format=torch.contiguous_format)  # packed, aligned
    if _directly(a) and (bias is None or bias.dtype == dtype):
        try:
            return native.fp8(_factors(a, FOUR), _factors(b, 1), rows, dtype, fast, bias)  # type: ignore[no-any-return]
        except CublasError as error:
            gemm.warn(str(error))
    if a.quantizer.storage.block:
        y = native.multiply(_blocks(a), _blocks(b), rows, dtype)
        return y if bias is None else y.add_(bias)  # type: ignore[no-any-return]
    left, right = (native.filled(copy.data, 1, ALIGNMENT) for copy in (a, b))
    scale_a, scale_b = a.multiplier, b.multiplier
    if scale_b.dim():
        scale_b = scale_b.t()
    return torch._scaled_mm(
        left, right.t(), scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def _directly(copy: Copy) -> bool:
    """Whether our own call of the library takes such operands: those of FP8, as far as tried."""
    if copy.data.dtype not in (E4M3, E5M2) or copy.quantizer.storage.name.startswith("mx"):
        return False
    return gemm.there(copy.data) and (not copy.scale.dim() or (chip() == 9 and cuda() >= (12, 9)))


def _factors(copy: Copy, rows: int) -> Any:
    """A copy, FP8, as our own call takes it. rows: what theirs are a multiple of with blocks."""
    data, scale = copy.data, copy.scale
    if not scale.dim():
        return native.of_tensor(data, copy.multiplier)
    if not copy.quantizer.storage.block:
        return native.of_rows(data, scale)
    if copy.quantizer.storage.height == 1:
        return native.of_blocks(data, scale, copy.inverse, rows)
    return native.of_squares(data, scale, copy.inverse)


def _blocks(copy: Copy) -> Any:
    """A copy with scales of blocks, as the library takes it."""
    storage, data, scale = copy.quantizer.storage, copy.data, copy.scale
    if copy.amax is not None:
        return native.nvfp4(data.flatten(1), scale, tensor_multiplier(copy.amax).reciprocal())
    if storage.name.startswith("mx"):
        return native.mx(data, scale)
    depth = native.TORCH_DEPTH
    if storage.height == 1:
        return native.of_factors(native.of_blocks(data, scale, None, native.ROWS, depth))
    return native.of_factors(native.of_squares(data, scale, None, BLOCK, depth))


def scaled_product(a: Copy | None, b: Copy | None, dtype: torch.dtype) -> Tensor:
    """`scaled_mm` on a GPU; elsewhere, where Triton interprets, what it stands for."""
    assert a is not None and b is not None  # noqa: PT018
    if a.data.is_cuda:
        return scaled_mm(a, b, dtype)
    return product(a, b, dtype)


def scaled_wgrad(dy: Quantized, x: Quantized, sums: bool = False) -> Tensor:
    """`dy.T @ x`; with sums not rounded to dy's dtype, where the library can give them so."""
    assert x.col is not None
    family = _family(x.col.quantizer.storage)
    wide = sums and family is not None and torch.float32 in family.dtypes
    return scaled_product(dy.col, x.col, torch.float32 if wide else dy.dtype)


class _Scaled(Fuser):
    backend, quantized = "cublaslt", True

    def reject_formats(self, x: Storage, weight: Storage, dy: Storage | None) -> str | None:
        """Why it cannot multiply such operands, or None."""
        return _formats(x, weight)


@register
class ScaledLinear(_Scaled):
    """`x @ weight.T (+ bias)` of quantized x and weight, the bias in the GEMM's epilogue."""

    pattern = dict(fc=BasicLinear, bias=Bias | None)

    def reject(self, fc: Op, bias: Op | None, x: Spec) -> str | None:
        if bias is not None and x.dtype == torch.float32:
            return "its epilogue adds no fp32 bias"
        family = _family(x.storage)
        if bias is not None and family is not None and family.chip > 9:
            return f"{family.about}: its epilogue adds no bias"
        return reject_product(fc, x)

    def fwd(self, x: Quantized, fc_weight: Quantized, bias_bias: Tensor | None) -> Any:
        return scaled_mm(x.row, fc_weight.row, x.dtype, True, bias_bias), ()


@register
class ScaledLinearBackward(_Scaled):
    """The data and the weight gradient, of quantized gradients."""

    pattern = dict(fc=BasicLinear)

    def reject_formats(self, x: Storage, weight: Storage, dy: Storage | None) -> str | None:
        return reject_gradient_formats(x, weight, dy)

    def reject(self, fc: Op, x: Spec) -> str | None:
        return reject_product(fc, x)

    def bwd(
        self, dy: Quantized, fc: Any, fc_x: Quantized, fc_weight: Quantized,
        fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        dx = scaled_mm(dy.row, fc_weight.col, dy.dtype) if "x" in want else None
        if "fc_weight" not in want:
            return dx, (None,)
        return dx, (fc.wgrad_by(scaled_wgrad, dy, fc_x, fc_weight_stored),)
