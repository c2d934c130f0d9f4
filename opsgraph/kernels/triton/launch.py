"""What every launch needs: layout, alignment, device, and the reductions of partial results.

`kernel[grid](...)` works out anew, at every launch, which compiled kernel suits its arguments:
`launch` remembers that.
"""

import re
import struct
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...guards.watching import watching

_HERE: AbstractContextManager[Any] = nullcontext()
_launchable: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
"""By all that tells compiled kernels apart: the compiled kernel, and the constants of its call."""


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold `size` elements; `triton.cdiv` takes microseconds."""
    return -(-size // block)


def _trait(operand: Any) -> Any:
    """What Triton compiles a kernel for, of a tensor, an int or None."""
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() % 16 == 0
    if type(operand) is int:
        return operand % 16 == 0, operand == 1, -(2**31) <= operand < 2**31
    return operand if operand is None else type(operand)


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """`kernel[grid](*operands, **constants)`: first the run-time arguments, then the constants.

    Constants are those of the kernel and compile options. Triton's interpreter, and other vendors'
    chips, for which kernels are compiled for more traits, go Triton's way.
    """
    device = next(operand.device for operand in operands if operand is not None)
    key = kernel.fn, device, *map(_trait, operands), *constants.items()
    known = _launchable.get(key)
    if known is not None:
        compiled, values = known
        whole = grid + (1, 1)[: 3 - len(grid)]
        scratch = None
        if size := getattr(compiled.metadata, "global_scratch_size", 0):
            scratch = _bytes(size * whole[0] * whole[1] * whole[2], device)
            _with_scratch(scratch, compiled[whole], *operands, *values)
        else:
            compiled[whole](*operands, *values)
        if watching.recorder is not None:
            _tell(kernel, compiled, whole, operands, scratch)
        return
    compiled = _with_scratch(device, kernel[grid], *operands, **constants)
    if watching.recorder is not None:
        watching.recorder.refuse("a kernel was compiled, or is interpreted")
    if not isinstance(kernel, triton.JITFunction) or compiled is None:
        return  # interpreted, or only looked at
    if compiled.metadata.target.backend == "cuda":
        rest = kernel.params[len(operands) :]
        _launchable[key] = compiled, tuple(constants.get(p.name, p.default) for p in rest)


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _with_scratch(scratch: Any, run: Any, *operands: Any, **constants: Any) -> Any:
    """Run a launch whose kernel makes descriptors in scratch memory, given or on a device.

    Triton asks an allocator that is set for a context: the user's, in the user's, stays.
    """

    def launched() -> Any:
        given = isinstance(scratch, Tensor)
        if hasattr(triton, "set_allocator"):
            triton.set_allocator(lambda size, *_: scratch if given else _bytes(size, scratch))
        return run(*operands, **constants)

    return copy_context().run(launched)


_INTEGERS = re.compile("[iu][0-9]+")


@cache
def _form(kernel: Any, compiled: Any) -> tuple[str, tuple[str, ...]]:
    """How parameters lie that a compiled kernel takes: a struct's format, the type of each.

    A type that is not known ends them; what the kernel was compiled for is "constexpr".
    """
    form, kinds = "=", list[str]()
    for name in kernel.arg_names:
        kinds.append(kind := compiled.src.signature[name])
        if kind.startswith("*") or _INTEGERS.fullmatch(kind):
            form += "q"
        elif kind == "fp32":
            form += "f4x"
        elif kind != "constexpr":
            break
    return form, tuple(kinds)


def _tell(
    kernel: Any, compiled: Any, grid: tuple[int, ...], operands: tuple[Any, ...],
    scratch: Tensor | None,
) -> None:  # fmt: skip
    """Tell the recorder of a launch, with the parameters that Triton's own launcher hands over.

    They are the arguments that the kernel was not compiled for, and the addresses of two scratch
    areas (`triton/backends/nvidia/driver.c`, 3.6 to 3.9): the first one's is for descriptors that a
    kernel makes, the second one's our kernels do not use.
    """
    metadata, (form, kinds) = compiled.metadata, _form(kernel, compiled)
    if len(kinds) < len(kernel.arg_names):
        watching.recorder.refuse(f"a kernel has a parameter of type {kinds[-1]}")
        return
    values, addresses = list[Any](), []
    for kind, operand in zip(kinds, operands, strict=False):
        if kind[0] == "*":
            addresses.append((len(values), operand.data_ptr()))
            values.append(0)
        elif kind != "constexpr":
            values.append(operand)
    words = struct.pack(form, *values)
    if scratch is not None:
        addresses.append((len(words) // 8, scratch.data_ptr()))
    extras = "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"
    if any(getattr(metadata, name, 0) for name in extras) or getattr(metadata, "num_ctas", 1) != 1:
        watching.recorder.refuse("a kernel needs more than plain launches give")
        return
    watching.recorder.launch(
        compiled.function, grid, metadata.num_warps * 32, metadata.shared, words + bytes(16),
        addresses,
    )  # fmt: skip


def room(given: Tensor | None, x: Tensor, width: int) -> Tensor:
    """Memory for `[rows, width]` of x's dtype: what is given, if it is such and contiguous."""
    shape = x.size(0), width
    if given is not None and given.dtype == x.dtype and given.shape == shape:
        if given.is_contiguous():
            return given
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def row_major(x: Tensor) -> Tensor:
    """`x` itself when each row's elements are adjacent, else a contiguous copy."""
    return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()


def packed(vector: Tensor | None) -> Tensor | None:
    """`vector` (a weight, a bias, a statistic) with its elements adjacent; None stays None."""
    return None if vector is None else vector.contiguous()


def stride_unit(*tensors: Tensor | None) -> int:
    """8 when all row strides are multiples of 8, else 1.

    Kernels take strides divided by this unit and multiply again, so that the compiler sees the
    alignment of 16-byte loads without recompiling for every stride (Triton's own specialization
    looks for multiples of 16 and misses widths such as 1000).
    """
    for tensor in tensors:
        if tensor is not None and tensor.stride(0) % 8:
            return 1
    return 8


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels launch on the device of `x`; free when it is the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


@cache
def multiprocessors(device: torch.device) -> int:
    """The device's number of multiprocessors; 4 for Triton's interpreter on the CPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; Hopper's where there is no device."""
    if device.type != "cuda":
        return 227 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@triton.jit
def _sum_column_block(
    partials, out, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < count) & (cols[None, :] < WIDTH)
        total += tl.load(partials + row.to(tl.int64) * WIDTH + cols[None, :], mask, other=0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), cols < WIDTH)


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(
    first, first_out, second, second_out, count,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns, of the first tensor or, further along the grid, of the second."""
    if second is None:
        _sum_column_block(first, first_out, count, WIDTH, ROWS, BLOCK)
    elif first is None:
        _sum_column_block(second, second_out, count, WIDTH, ROWS, BLOCK)
    elif tl.program_id(1) == 0:
        _sum_column_block(first, first_out, count, WIDTH, ROWS, BLOCK)
    else:
        _sum_column_block(second, second_out, count, WIDTH, ROWS, BLOCK)


SUM_CONFIG = {"ROWS": 256, "BLOCK": 16, "num_warps": 8, "enable_fp_fusion": False}
SUM_FEW_CONFIG = {"ROWS": 128, "BLOCK": 32, "num_warps": 8, "enable_fp_fusion": False}


def sum_partials(
    first: Tensor | None, first_out: Tensor | None, second: Tensor | None, second_out: Tensor | None
) -> None:
    """Column sums of one or two fp32 `[count, width]` tensors of partial sums, in a fixed order."""
    given = first if first is not None else second
    if given is None:
        return
    count, width = given.shape
    both = first is not None and second is not None
    options = SUM_CONFIG if count > 256 else SUM_FEW_CONFIG
    grid = (ceil_div(width, options["BLOCK"]), 2 if both else 1)
    launch(
        sum_partials_kernel, grid, first, first_out, second, second_out, count,
        WIDTH=width, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def max_partials_kernel(
    partials, out, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)[None, :]
    if WIDTH > BLOCK:
        cols += tl.program_id(0) * BLOCK
    row = tl.arange(0, ROWS)[:, None]
    largest = tl.zeros([ROWS, BLOCK], tl.int32)
    whole = count // ROWS * ROWS
    # These rows need no mask, and so are loaded 16 bytes at a time even where WIDTH is 1.
    for start in tl.range(0, whole, ROWS):
        index = (start + row).to(tl.int64) * WIDTH + cols
        value = tl.load(partials + index, cols < WIDTH, other=0.0)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True))
    index = (whole + row).to(tl.int64) * WIDTH + cols
    value = tl.load(partials + index, (whole + row < count) & (cols < WIDTH), other=0.0)
    largest = tl.maximum(largest, value.to(tl.int32, bitcast=True))
    found = tl.max(largest, 0, keep_dims=True).to(tl.float32, bitcast=True)
    tl.store(out + cols, found, cols < WIDTH)


MAX_CONFIG = {"ROWS": 8192, "BLOCK": 1, "num_warps": 16}
MAX_COLUMNS_CONFIG = {"ROWS": 32, "BLOCK": 32, "num_warps": 8}


def max_partials(partials: Tensor) -> Tensor:
    """The amax of partial amaxes, fp32: `[count]` to `[]`, `[count, width]` to `[width]`.

    None of them is negative, so their bits order as they do, and a NaN's are the largest.
    """
    count, *widths = partials.shape
    options = MAX_COLUMNS_CONFIG if widths else MAX_CONFIG
    out = torch.empty(widths, dtype=torch.float32, device=partials.device)
    width = out.numel()
    grid = (ceil_div(width, options["BLOCK"]),)
    launch(max_partials_kernel, grid, partials, out, count, WIDTH=width, **options)
    return out
