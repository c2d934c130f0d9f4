"""Faults in the kernels: C++ for the CPU, and Triton, which its interpreter runs."""

from .form import Fault, fault

NORMS, ACTIVATIONS = "kernels/cpu/source/norms.h", "kernels/cpu/source/activations.h"
ROWS, PARALLEL = "kernels/cpu/source/activation_rows.h", "kernels/cpu/source/parallel.h"
QUANTIZE, DELAYED = "kernels/cpu/source/quantize.h", "kernels/cpu/source/delayed.cpp"
KERNELS, EDGES = "kernels/test_cpu_kernels.py", "kernels/test_edge_numbers.py"
QUANTIZED = "kernels/test_cpu_quantize.py"

CPU: tuple[Fault, ...] = (
    fault(
        "norm-epsilon", "A norm ignores its epsilon.",
        NORMS, "__builtin_sqrt(square + n.eps)", "__builtin_sqrt(square)", KERNELS,
    ),
    fault(
        "norm-zero-centred", "The forward of a norm adds no 1 to a zero-centred weight.",
        NORMS,
        "n.width, n.zero_centered ? 1 : 0, 1, n.zero_centered == 2);\n"
        "    Parameter beta(n.bias, n.bias_dtype, Center ? n.width",
        "n.width, 0, 1, n.zero_centered == 2);\n"
        "    Parameter beta(n.bias, n.bias_dtype, Center ? n.width",
        KERNELS,
    ),
    fault(
        "norm-mean-gradient", "The input gradient of LayerNorm lacks the mean of dy * weight.",
        NORMS, "        if (Center) sum += m;\n", "", KERNELS,
    ),
    fault(
        "norm-residual-gradient", "A norm's backward drops the residual's gradient.",
        NORMS, "Add ? d + widen(other[j]) : d", "Add ? d : d", KERNELS,
    ),
    fault(
        "norm-stride", "A norm reads rows as if they were adjacent.",
        NORMS, "row * n.x_stride;\n            if (n.other)",
        "row * n.width;\n            if (n.other)",
        KERNELS,
    ),
    fault(
        "norm-bias-gradient", "The bias's gradient of LayerNorm is that of the first share alone.",
        NORMS, "if (dbias) add_columns(dy, dbias, width);",
        "if (dbias && row < 8) add_columns(dy, dbias, width);", KERNELS,
    ),
    fault(
        "norm-overflow", "A row in bf16 whose squares overflow fp32 is normalized to 0.",
        NORMS, "found.second <= LARGEST && found.second >= 16 * shift",
        "found.second >= 16 * shift", EDGES,
    ),
    fault(
        "sums-second-share", "Sums over rows leave the second share of them out.",
        PARALLEL, "int64_t share = 1; share < shares.count",
        "int64_t share = 2; share < shares.count",
        KERNELS,
    ),
    fault(
        "rows-last-share", "Rows that fill no whole share are not computed.",
        PARALLEL, "count = (rows + step - 1) / step;", "count = rows / step;", KERNELS,
    ),
    fault(
        "gelu-slope", "The slope of GELU has the constant of its value.",
        ACTIVATIONS, "fmadd(0.214064438f, square, 1.59576912f)",
        "fmadd(0.0713548128f, square, 1.59576912f)", KERNELS,
    ),
    fault(
        "swish-slope", "The slope of SiLU and GELU is their sigmoid.",
        ACTIVATIONS, "fmadd(more, s, s)", "s", KERNELS,
    ),
    fault(
        "erf-tail", "The exact GELU has the other tail's value below -1.",
        ACTIVATIONS, "far = x < 0.0f ? tail : above;", "far = above;", KERNELS,
    ),
    fault(
        "gate-gradient", "The value's gradient in a gate is multiplied with the value.",
        ACTIVATIONS, "step<ROUNDED>(dy[j] * gate) * g.slope",
        "step<ROUNDED>(dy[j] * line) * g.slope",
        KERNELS,
    ),
    fault(
        "clip-offset", "ClampedSwiGLU adds no offset to the value.",
        ACTIVATIONS, "return {inside + p[2], 1.0f,", "return {inside, 1.0f,", KERNELS,
    ),
    fault(
        "relu-at-zero", "ReLU passes a gradient on where its input is 0.",
        ACTIVATIONS, "return {x <= 0.0f ? 0.0f : x, 1.0f, x <= 0.0f};",
        "return {x <= 0.0f ? 0.0f : x, 1.0f, x < 0.0f};", KERNELS, EDGES,
    ),
    fault(
        "interleaved-gate", "Of interleaved gates and values the first block alone is read.",
        ROWS, "t.gated ? y + first : y,", "t.gated ? y : y,", KERNELS,
    ),
    fault(
        "activation-bias-gradient", "The bias of a gate's values gets no gradient.",
        ROWS, "if (sums && t.gated) accumulate(db, sums + c.b, c.n);", "", KERNELS,
        "fusers/cpu/test_products.py",
    ),
    fault(
        "pre-activation", "What the forward keeps for the backward lacks the bias.",
        ROWS, "pre[j] = narrow<T>(buffer[j]);", "pre[j] = x[j];", KERNELS,
    ),
    fault(
        "bf16-rounding", "bf16 is rounded towards 0.",
        "kernels/cpu/source/scalar.h", "(u + 0x7fff + ((u >> 16) & 1)) >> 16", "u >> 16", KERNELS,
    ),
    fault(
        "exponential", "The exponential's polynomial lacks its fourth term.",
        "kernels/cpu/source/scalar.h", "    q = fmadd(q, r, 4.16681804e-2f);\n", "", KERNELS,
    ),
    fault(
        "fp8-sign", "A negative number becomes a positive one in FP8.",
        QUANTIZE, "    code |= (all >> 24) & 0x80;\n", "", QUANTIZED,
    ),
    fault(
        "fp8-saturation", "E4M3 saturates at 240.",
        QUANTIZE, "E5M2 ? 0x47600000 : 0x43e00000;", "E5M2 ? 0x47600000 : 0x43700000;", QUANTIZED,
    ),
    fault(
        "fp8-subnormals", "Small numbers in FP8 are rounded as if they were normal.",
        QUANTIZE, "size < ((128 - bias) << 23) ? tiny : normal", "size < 1 ? tiny : normal",
        QUANTIZED,
    ),
    fault(
        "fp8-block-scale", "Every block of a row is multiplied with the scale of the first.",
        QUANTIZE, "multiplier(q, size, grid, at++);", "multiplier(q, size, grid, at);", QUANTIZED,
    ),
    fault(
        "mx-exponent", "The exponent of an MXFP8 block is one too small.",
        QUANTIZE, "(e5m2 ? 15 : 8) +", "(e5m2 ? 16 : 9) +", QUANTIZED,
    ),
    fault(
        "fp8-transpose", "The column copy of a block row is that of the first rows.",
        QUANTIZE, "t.col * q.rows + t.row;", "t.col * q.rows;", QUANTIZED,
    ),
    fault(
        "fp8-decode", "E5M2 is read with the bias of E4M3.",
        "kernels/cpu/source/dequantize.h", "bias = E5M2 ? 15 : 7, least", "bias = 7, least",
        "kernels/test_cpu_dequantize.py",
    ),
    fault(
        "delayed-history", "The history of amaxes does not move.",
        DELAYED, "history[slot * 3] = later;", "(void)later;", "kernels/test_cpu_delayed.py",
        "precision/test_delayed.py",
    ),
    fault(
        "delayed-gradient-limit", "The gradient's scale is made for the format of activations.",
        DELAYED, "gradient ? u.backward_max : u.forward_max", "u.forward_max",
        "kernels/test_cpu_delayed.py", "precision/test_delayed.py",
    ),
)  # fmt: skip

_NORMS, _FUNCTIONS = "kernels/triton/norm_kernels.py", "kernels/triton/functions.py"
_ACTIVATIONS, _GEMM = "kernels/triton/activations.py", "kernels/triton/gemm.py"
_QUANTIZE = "kernels/triton/quantize_kernels.py"
_TESTS = "kernels/interpreted"

TRITON: tuple[Fault, ...] = (
    fault(
        "triton-norm-variance", "The variance of a row is divided by one column fewer.",
        _NORMS, "scale = inverse_root(row_sum(value * value) / WIDTH + EPS)",
        "scale = inverse_root(row_sum(value * value) / (WIDTH - 1 + (WIDTH == 1)) + EPS)",
        f"{_TESTS}/test_triton_norms.py",
    ),
    fault(
        "triton-norm-mask", "Columns past the end of a row count in its variance.",
        _NORMS, "value = tl.where(there, value - center, 0.0)", "value = value - center",
        f"{_TESTS}/test_triton_norms.py",
    ),
    fault(
        "triton-norm-dx", "The input gradient of a norm lacks the factor of what is normalized.",
        _NORMS, "tl.fma(m, w, tl.fma(-(dot / WIDTH), n, -(plain / WIDTH)))",
        "tl.fma(m, w, -(dot / WIDTH) - plain / WIDTH)",
        f"{_TESTS}/test_triton_norms.py",
    ),
    fault(
        "triton-norm-residual", "A norm's backward drops the residual's gradient.",
        _NORMS, "out += _load(dother, row * dother_stride * UNIT + cols, mask)\n"
        "            tl.store(dx + row * WIDTH + cols, out.to(dx.dtype.element_ty), mask)\n"
        "        if AHEAD",
        "out += 0.0\n"
        "            tl.store(dx + row * WIDTH + cols, out.to(dx.dtype.element_ty), mask)\n"
        "        if AHEAD",
        f"{_TESTS}/test_triton_norms.py",
    ),
    fault(
        "triton-gelu-slope", "The slope of GELU has the constant of its value.",
        _FUNCTIONS, "steep = inner * tl.fma(square, 0.21406443846157563, 1.5957691216057308)",
        "steep = inner * tl.fma(square, 0.07135481282052521, 1.5957691216057308)",
        f"{_TESTS}/test_triton_activations.py",
    ),
    fault(
        "triton-vanishing", "SiLU at -inf is NaN.",
        _FUNCTIONS, "return tl.where(factor == 0.0, 0.0, factor * x)", "return factor * x",
        f"{_TESTS}/test_triton_activations.py",
    ),
    fault(
        "triton-gate-order", "The gradients of gate and value change places.",
        _ACTIVATIONS, "return value * line, da, db", "return value * line, db, da",
        f"{_TESTS}/test_triton_activations.py",
    ),
    fault(
        "triton-activation-rows", "The last block's rows past the end are stored as well.",
        _ACTIVATIONS,
        "    mask = (row < rows) & (cols < WIDTH)\n    first = _first(cols, INTERLEAVE)\n",
        "    mask = (row < rows - 1) & (cols < WIDTH)\n    first = _first(cols, INTERLEAVE)\n",
        f"{_TESTS}/test_triton_activations.py",
    ),
    fault(
        "triton-dropout-scale", "What dropout keeps is not scaled.",
        "kernels/triton/dropout.py", ">= threshold, value * scale, 0.0)",
        ">= threshold, value, 0.0)",
        f"{_TESTS}/test_triton_dropout.py",
    ),
    fault(
        "triton-sum-rows", "The bias's gradient lacks the last row.",
        "kernels/triton/sums.py", "mask = (row < rows) & (cols[None, :] < WIDTH)",
        "mask = (row < rows - 1) & (cols[None, :] < WIDTH)", f"{_TESTS}/test_triton_sums.py",
    ),
    fault(
        "triton-product-bias", "The bias in a product's epilogue is that of the first columns.",
        _GEMM, "total += tl.load(bias + cols, cols < TOTAL, other=0.0).to(tl.float32)",
        "total += tl.load(bias + cols * 0, cols < TOTAL, other=0.0).to(tl.float32)",
        f"{_TESTS}/test_triton_gemm.py",
    ),
    fault(
        "triton-product-depth", "The end of a product's depth is multiplied with what lies behind.",
        _GEMM, "a_mask = a_in & (k < depth - start)[None, :]",
        "a_mask = a_in & (k < depth)[None, :]",
        f"{_TESTS}/test_triton_gemm.py",
    ),
    fault(
        "triton-fp8-scale", "A scale of FP8 is that of an amax twice as large.",
        _QUANTIZE, "57344.0 if E5M2 else 448.0, tl.float32)\n        scale",
        "28672.0 if E5M2 else 224.0, tl.float32)\n        scale",
        f"{_TESTS}/test_triton_quantize.py",
    ),
    fault(
        "triton-fp8-words", "Of four bytes of a column the third is the second once more.",
        _QUANTIZE, "return word | (third.to(tl.int32) << 16)",
        "return word | (second.to(tl.int32) << 16)",
        f"{_TESTS}/test_triton_quantize.py",
    ),
)  # fmt: skip
