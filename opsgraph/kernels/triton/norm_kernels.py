"""The kernels of RMSNorm and LayerNorm; `norms.py` says what they compute and launches them."""

import triton
import triton.language as tl

from .exponentials import inverse_root
from .ptx import rounded

STRIDES = ["rows", "x_stride", "other_stride"]
_BACKWARD_STRIDES = ["rows", "dy_stride", "x_stride", "dother_stride"]


@triton.jit
def _load(x, offset, mask):
    return tl.load(x + offset, mask, other=0.0).to(tl.float32)


@triton.jit
def _load_again(x, offset, mask):
    return tl.load(x + offset, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _load_weight(weight, cols, mask, ZERO_CENTERED: tl.constexpr):
    w = tl.load(weight + cols, mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    if ZERO_CENTERED == 2:
        w = w.to(weight.dtype.element_ty).to(tl.float32)
    return w


@triton.jit
def _affine(
    xc, rstd, weight, bias, cols, mask, ZERO_CENTERED: tl.constexpr,
    NORMALIZED: tl.constexpr = None, PRODUCT: tl.constexpr = None,
):  # fmt: skip
    y = rounded(xc * rstd, NORMALIZED)
    if weight is not None:
        w = _load_weight(weight, cols, mask, ZERO_CENTERED)
        if weight.dtype.element_ty == tl.float32 and NORMALIZED is None and PRODUCT is None:
            lost = tl.fma(xc, rstd, -y) * w  # what rounding took from y: up to a unit of fp32
            if bias is not None:
                lost += _load_weight(bias, cols, mask, False)
            return tl.fma(y, w, lost)
        if bias is not None and PRODUCT is None:
            return tl.fma(y, w, _load_weight(bias, cols, mask, False))
        y = rounded(y * w, PRODUCT)
    if bias is not None:
        y += _load_weight(bias, cols, mask, False)
    return y


@triton.jit
def load_first(x, other, row, x_stride, other_stride, inside, DTYPE: tl.constexpr):
    """The first value of rows, or of the sums of two, which DTYPE stores."""
    first = _load(x, row * x_stride, inside)
    if other is not None:
        first += _load(other, row * other_stride, inside)
        first = first.to(DTYPE).to(tl.float32)
    return first


@triton.jit
def mean_of(value, first, mask, count):
    """The mean, by the differences from a value: exact where all are equal, or nearly."""
    return first + tl.sum(tl.where(mask, value - first, 0.0), 0) / count


@triton.jit
def columns_of(WIDTH: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """The columns of a tile `[CHUNKS, rows, COLS]`, and which there are: all, or a mask.

    Threads, then warps, go along the last dimension; COLS is what one load of each thread covers. A
    row's chunks are then added within threads. Either CHUNKS or rows is 1: which of the two warps
    would go to first differs between Triton's versions.
    """
    cols = (tl.arange(0, CHUNKS) * COLS)[:, None, None] + tl.arange(0, COLS)[None, None, :]
    if CHUNKS * COLS == WIDTH:
        return cols, tl.full([1, 1, 1], True, tl.int1)
    else:
        return cols, cols < WIDTH


@triton.jit
def row_sum(value):
    """The sums of a tile's rows `[CHUNKS, rows, COLS]`, of their shape `[1, rows, 1]`."""
    return tl.sum(tl.sum(value, 0), 1)[None, :, None]


@triton.jit
def normalized(
    x, other, weight, bias, total, mean, rstd, row, rows, x_stride, other_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CENTER: tl.constexpr,
    CHUNKS: tl.constexpr, COLS: tl.constexpr, NORMALIZED: tl.constexpr = None,
    PRODUCT: tl.constexpr = None,
):  # fmt: skip
    """y of whole rows `[1, rows, 1]` in fp32, having stored the sum with other, mean and rstd."""
    cols, there = columns_of(WIDTH, CHUNKS, COLS)
    inside = row < rows
    mask = inside & there
    value = _load(x, row * x_stride + cols, mask)
    if other is not None:
        value += _load(other, row * other_stride + cols, mask)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + cols, stored, mask)
        value = stored.to(tl.float32)
    if CENTER:
        dtype: tl.constexpr = x.dtype.element_ty if total is None else total.dtype.element_ty
        first = load_first(x, other, row, x_stride, other_stride, inside, dtype)
        center = first + row_sum(tl.where(there, value - first, 0.0)) / WIDTH
        if dtype == tl.float32:  # whose differences from the first value were rounded
            center += row_sum(tl.where(there, value - center, 0.0)) / WIDTH
        value = tl.where(there, value - center, 0.0)
        if mean is not None:
            tl.store(mean + row, center, inside)
    scale = inverse_root(row_sum(value * value) / WIDTH + EPS)
    if rstd is not None:
        tl.store(rstd + row, scale, inside)
    # Offsets of the tile's shape: a smaller tensor's layout would differ, and go through memory.
    cols, _ = tl.broadcast(cols, value)
    return _affine(
        value, scale, weight, bias, cols, cols < WIDTH, ZERO_CENTERED, NORMALIZED, PRODUCT
    )


@triton.jit(do_not_specialize=STRIDES)
def forward_kernel(
    x, other, weight, bias, y, total, mean, rstd, rows, x_stride, other_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    CENTER: tl.constexpr, NORMALIZED: tl.constexpr, PRODUCT: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols, there = columns_of(WIDTH, CHUNKS, COLS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    out = normalized(
        x, other, weight, bias, total, mean, rstd, row, rows, x_stride.to(tl.int64) * UNIT,
        other_stride.to(tl.int64) * UNIT, WIDTH, EPS, ZERO_CENTERED, CENTER, CHUNKS, COLS,
        NORMALIZED, PRODUCT,
    )  # fmt: skip
    tl.store(y + row * WIDTH + cols, out.to(y.dtype.element_ty), (row < rows) & there)


@triton.jit
def _load_total(x, other, cols, mask, DTYPE: tl.constexpr):
    value = _load(x, cols, mask)
    if other is not None:
        value = (value + _load(other, cols, mask)).to(DTYPE).to(tl.float32)
    return value


@triton.jit
def _wide_statistics(
    x, other, WIDTH: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    """Mean and variance of a row, block by block, merged as Chan et al. do (no E[x^2] - mean^2)."""
    center = 0.0
    squares = 0.0
    if CENTER:
        center = load_first(x, other, 0, 0, 0, True, DTYPE)
    first = center
    for start in tl.range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = _load_total(x, other, cols, cols < WIDTH, DTYPE)
        if CENTER:
            count = tl.minimum(BLOCK, WIDTH - start).to(tl.float32)
            block_mean = mean_of(value, first, cols < WIDTH, count)
            value = tl.where(cols < WIDTH, value - block_mean, 0.0)
            delta = block_mean - center
            share = count / (start + count)
            center = tl.where(start == 0, block_mean, center + delta * share)
            squares += tl.where(start == 0, 0.0, delta * delta * start * share)
        squares += tl.sum(value * value, 0)
    return center, squares / WIDTH


@triton.jit(do_not_specialize=STRIDES)
def forward_wide_kernel(
    x, other, weight, bias, y, total, mean, rstd, rows, x_stride, other_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    CENTER: tl.constexpr, BLOCK: tl.constexpr, NORMALIZED: tl.constexpr = None,
    PRODUCT: tl.constexpr = None,
):  # fmt: skip
    """One row, read twice. Without y: the statistics, and the sum with other."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride * UNIT
    if other is not None:
        other += row * other_stride * UNIT
    dtype: tl.constexpr = x.dtype.element_ty if total is None else total.dtype.element_ty
    center, variance = _wide_statistics(x, other, WIDTH, CENTER, BLOCK, dtype)
    scale = inverse_root(variance + EPS)
    if mean is not None:
        tl.store(mean + row, center)
    if rstd is not None:
        tl.store(rstd + row, scale)
    for start in tl.range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < WIDTH
        value = _load_total(x, other, cols, mask, dtype)
        if total is not None:
            tl.store(total + row * WIDTH + cols, value.to(total.dtype.element_ty), mask)
        if y is not None:
            out = _affine(
                value - center, scale, weight, bias, cols, mask, ZERO_CENTERED, NORMALIZED, PRODUCT
            )
            tl.store(y + row * WIDTH + cols, out.to(y.dtype.element_ty), mask)


@triton.jit
def _load_rows(dy, x, mean, rstd, dy_stride, x_stride, tile, rows, cols, there, ROWS: tl.constexpr):
    """dy and x of a tile's rows, as they are in memory, their mean and rstd."""
    row = tl.arange(0, ROWS)[None, :, None].to(tl.int64) + tile * ROWS
    inside = row < rows
    value = tl.load(x + row * x_stride + cols, inside & there, other=0.0)
    grad = tl.load(dy + row * dy_stride + cols, inside & there, other=0.0)
    scale = _load(rstd, row, inside)
    center = 0.0
    if mean is not None:
        center = _load(mean, row, inside)
    return grad, value, center, scale


@triton.jit
def _dots(grad, value, CENTER: tl.constexpr):
    """`(sum(grad * value), sum(grad))` of each row, by one reduction; (.., 0) unless CENTER."""
    if CENTER:
        pair = tl.join(tl.sum(grad * value, 0), tl.sum(grad, 0))
        dot, plain = tl.split(tl.sum(pair, 1))
        return dot[None, :, None], plain[None, :, None]
    else:
        return row_sum(grad * value), 0.0


@triton.jit(do_not_specialize=_BACKWARD_STRIDES)
def backward_kernel(
    dy, x, mean, rstd, weight, dother, dx, dweight, dbias, rows, dy_stride, x_stride, dother_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    NORMALIZED: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HOIST: tl.constexpr, AHEAD: tl.constexpr, AGAIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the rows. HOIST: the weight stays in registers. AHEAD: so do the next rows."""
    cols, there = columns_of(WIDTH, CHUNKS, COLS)
    dweight_sum = tl.zeros([CHUNKS, ROWS, COLS], tl.float32)
    dbias_sum = tl.zeros([CHUNKS, ROWS, COLS], tl.float32)
    at, _ = tl.broadcast(cols, dweight_sum)
    dy_stride, x_stride = dy_stride.to(tl.int64) * UNIT, x_stride.to(tl.int64) * UNIT
    if HOIST:
        held = _load_weight(weight, at, at < WIDTH, ZERO_CENTERED)
    first, step = tl.program_id(0), tl.num_programs(0)
    if AHEAD:
        grad, value, center, scale = _load_rows(
            dy, x, mean, rstd, dy_stride, x_stride, first, rows, cols, there, ROWS
        )
    for tile in tl.range(first, tl.cdiv(rows, ROWS), step, num_stages=STAGES):
        row = tl.arange(0, ROWS)[None, :, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & there
        if AHEAD:
            next_grad, next_value, next_center, next_scale = _load_rows(
                dy, x, mean, rstd, dy_stride, x_stride, tile + step, rows, cols, there, ROWS
            )
        else:
            grad, value, center, scale = _load_rows(
                dy, x, mean, rstd, dy_stride, x_stride, tile, rows, cols, there, ROWS
            )
        # Beside the columns 0 - center may be so large that its multiple is infinite.
        n = tl.where(there, (value.to(tl.float32) - center) * scale, 0.0)
        m = grad.to(tl.float32)
        if dweight is not None:
            dweight_sum += m * rounded(n, NORMALIZED)
        if dbias is not None:
            dbias_sum += m
        if dx is not None:
            w = 1.0
            if HOIST:
                w = held
            elif weight is not None:
                w = _load_weight(weight, at, at < WIDTH, ZERO_CENTERED)
            dot, plain = _dots(m * w, n, mean is not None)
            if AGAIN:
                # Two sums, x and dy of the widest rows do not fit in registers together. These
                # loads hit the cache; the other eviction policy keeps them from being merged.
                n = (_load_again(x, row * x_stride + cols, mask) - center) * scale
                m = _load_again(dy, row * dy_stride + cols, mask)
                if weight is not None:
                    w = _load_weight(weight, at, at < WIDTH, ZERO_CENTERED)
            if WIDTH == 1 and mean is not None:
                # A column is its mean: 0 is left, and where anything is infinite a NaN. Of terms
                # that cancel a multiply-add would leave what rounding took from `m * w`.
                out = scale * (0.0 * (m * w))
            elif dx.dtype.element_ty == tl.float32:
                # `m * w` is not rounded, so both wait in registers; 16 bits would not show it.
                out = scale * tl.fma(m, w, tl.fma(-(dot / WIDTH), n, -(plain / WIDTH)))
            else:
                out = scale * tl.fma(-(dot / WIDTH), n, m * w)
                if mean is not None:
                    out -= scale * (plain / WIDTH)
            if dother is not None:
                out += _load(dother, row * dother_stride * UNIT + cols, mask)
            tl.store(dx + row * WIDTH + cols, out.to(dx.dtype.element_ty), mask)
        if AHEAD:
            grad, value, center, scale = next_grad, next_value, next_center, next_scale
    partial = tl.program_id(0).to(tl.int64) * WIDTH + cols
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dweight_sum, 1, keep_dims=True), cols < WIDTH)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbias_sum, 1, keep_dims=True), cols < WIDTH)


@triton.jit(do_not_specialize=["dy_stride", "x_stride"])
def backward_wide_dots_kernel(
    dy, x, mean, rstd, weight, dots, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two scalars of each row: `dots[row] = (b, a)` of the module's formula."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(rstd + row)
    center = 0.0
    if mean is not None:
        center = tl.load(mean + row)
    dot = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < WIDTH
        grad = _load(dy, row * dy_stride * UNIT + cols, mask)
        if weight is not None:
            grad *= _load_weight(weight, cols, mask, ZERO_CENTERED)
        n = (_load(x, row * x_stride * UNIT + cols, mask) - center) * scale
        dot += grad * tl.where(mask, n, 0.0)
        plain += grad
    tl.store(dots + row * 2, -tl.sum(dot, 0) / WIDTH)
    if mean is not None:
        tl.store(dots + row * 2 + 1, -tl.sum(plain, 0) / WIDTH)


@triton.jit(do_not_specialize=_BACKWARD_STRIDES)
def backward_wide_kernel(
    dy, x, mean, rstd, weight, dother, dx, dweight, dbias, dots, rows, dy_stride, x_stride,
    dother_stride, UNIT: tl.constexpr, WIDTH: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    NORMALIZED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of columns over a share of the rows, the rows' scalars being known."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=2):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        inside = row < rows
        mask = inside & (cols < WIDTH)
        value = _load(x, row * x_stride * UNIT + cols, mask)
        grad = _load(dy, row * dy_stride * UNIT + cols, mask)
        scale = _load(rstd, row, inside)
        if mean is not None:
            value -= _load(mean, row, inside)
        value *= scale
        if dweight is not None:
            dweight_sum += grad * rounded(value, NORMALIZED)
        if dbias is not None:
            dbias_sum += grad
        if dx is not None:
            w = 1.0
            if weight is not None:
                w = _load_weight(weight, cols, cols < WIDTH, ZERO_CENTERED)
            a = 0.0
            if mean is not None:
                a = _load(dots, row * 2 + 1, inside)
            out = scale * tl.fma(grad, w, tl.fma(_load(dots, row * 2, inside), value, a))
            if dother is not None:
                out += _load(dother, row * dother_stride * UNIT + cols, mask)
            tl.store(dx + row * WIDTH + cols, out.to(dx.dtype.element_ty), mask)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial = tl.program_id(1).to(tl.int64) * WIDTH + columns
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dweight_sum, 0), columns < WIDTH)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbias_sum, 0), columns < WIDTH)
