"""Compiles the Triton kernels ahead of time, with no GPU, and tells what each takes of the chip.

`python benchmarks/aot.py --cc 90` prints one line per compiled kernel: registers per thread,
spilled bytes (stack and local memory), shared memory, and whether it loads 16 bytes at a time, as
cuobjdump, nvdisasm and the PTX say. The public functions run on meta tensors and their launches are
recorded, so that what is compiled here is what a launch would compile: same configuration, same
compile-time arguments, same alignment.
"""

import argparse
import json
import re
import subprocess
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, product
from struct import unpack_from
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import JITFunction

from opsgraph.kernels.formats import BLOCKS, E4M3, E5M2, NVFP4, Format, inverse_shape
from opsgraph.kernels.triton import gemm, norms, pairs, persistent, quantize
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.block_product import block_product
from opsgraph.kernels.triton.delayed import raise_to, updating
from opsgraph.kernels.triton.dropout import dropout
from opsgraph.kernels.triton.functions import KINDS, constants
from opsgraph.kernels.triton.gemm import linear_activation, linear_activation_backward
from opsgraph.kernels.triton.grouped import grouped_dgrad, grouped_linear, grouped_wgrad
from opsgraph.kernels.triton.inverse import inverse
from opsgraph.kernels.triton.norms import (
    norm_backward,
    norm_forward,
)
from opsgraph.kernels.triton.quantize import activation_quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
from opsgraph.kernels.triton.quantize_norms import norm_quantize
from opsgraph.kernels.triton.scales import scale_backward, scale_forward
from opsgraph.kernels.triton.sums import add, sum_rows
from opsgraph.kernels.triton.xielu import xielu_backward, xielu_forward

TYPES = {
    torch.int32: "i32",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
HALF, BOTH = torch.bfloat16, ("row", "col")
CAPABILITIES = (80, 90, 100)
LOST = re.compile(r"(?:PACK_AB|ST[GS]\.)[^;]*, R1 ;")
"""The stack pointer packed or stored as a value: what ptxas 12.8 took for one that it had lost."""
LATE = re.compile(r"WARPGROUP\.ARRIVE(?:(?!gsb0).)*?\bLDS\b", re.DOTALL)
"""A load from shared memory among the instructions that start an asynchronous product."""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes, of one program


class Launch(NamedTuple):
    """One launch as `triton.compile` takes it."""

    source: ASTSource
    options: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """A context in which launching a kernel only appends to the list that it gives."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        bound = dict(zip(names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if k in names
        }
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(_source(self, bound), options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _source(kernel: Any, bound: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would make of the arguments, every pointer being aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound.get(parameter.name, parameter.default)
        divisible = False
        if isinstance(value, Tensor):
            kind, divisible = "*" + TYPES[value.dtype], True
        elif value is None or parameter.is_constexpr:
            kind = "constexpr"
        elif isinstance(value, float):
            kind = "fp32"
        else:
            special = not parameter.do_not_specialize
            kind = "constexpr" if special and value == 1 else "i32" if value < 2**31 else "i64"
            divisible = special and value % 16 == 0
        if kind == "constexpr":
            constants[(index,)] = value
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes)


def _output(tool: Any, *arguments: str) -> str:
    """What one of the tools prints that come with Triton."""
    command = [tool.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(cubins: Sequence[bytes], cc: int) -> list[str]:
    """Those of each kernel as text, one a line. nvdisasm takes half a second to start: once."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        # Without dataflow analysis, which `cuobjdump -sass` does without too.
        text = _output(triton.knobs.nvidia.nvdisasm, "-b", f"SM{cc}", "-ndf", file.name)
    ends, found = [*accumulate(map(len, codes))], [list[str]() for _ in codes]
    for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*;)", text):
        found[bisect(ends, int(address, 16))].append(line)
    return ["\n".join(lines) for lines in found]


def _code(cubin: bytes) -> bytes:
    """The sections of an ELF file that are executed."""
    (table,), (size, count) = unpack_from("<Q", cubin, 0x28), unpack_from("<HH", cubin, 0x3A)
    sections = (unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count))
    return b"".join(cubin[at : at + long] for _, _, flags, _, at, long in sections if flags & 4)


def resources(launch: Launch, cc: int) -> tuple[dict[str, int], bytes]:
    """Registers per thread, spilled and shared bytes and the like of a launch compiled for `cc`.

    And what was compiled.
    """
    target = GPUTarget("cuda", cc, 32)
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    with tempfile.NamedTemporaryFile() as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = _output(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin.name)
    ptx = compiled.asm["ptx"]
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    found = {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "narrow": len(narrow_strides(compiled.asm.get("ttir", ""))),
        "fused": len(re.findall(r"fma\.rn\.bf16", ptx)),
        "wide_loads": len(re.findall(r"(?:ld\.global|cp\.async).*(?:v4\.b32|, 0x10)", ptx)),
    }
    return found, compiled.asm["cubin"]


def narrow_strides(ttir: str) -> list[str]:
    """What multiplies the rows' stride in 32 bits, in Triton's IR: rows may be 2^31 elements apart.

    A stride is an argument, and as wide as it is until it is extended.
    """
    strides, found = set(re.findall(r"%\w*stride\b", ttir)), []
    for line in ttir.splitlines():
        operation = line.split(" loc(")[0].strip()
        result, _, rest = operation.partition(" = ")
        if not strides.intersection(re.findall(r"%\w+", rest)):
            continue
        if rest.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims")):
            strides.add(result)
        elif rest.startswith("arith.muli") and re.search(r"\bi32$|xi32>$", operation):
            found.append(operation)
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(
    width: int, dtype: torch.dtype, center: bool, backward: bool, residual: bool,
    normalized_dtype: str | None = None,
) -> None:  # fmt: skip
    x, weight = _meta(4096, width, dtype=dtype), _meta(width, dtype=dtype)
    other, statistic = (x if residual else None), _meta(4096, 1)
    if backward:
        norm_backward(x, x, statistic if center else None, statistic, weight, dother=other)
    else:
        bias = weight if center else None
        norm_forward(
            x, weight, bias, 1e-5, other=other, center=center, normalized_dtype=normalized_dtype
        )


def _activation(kind: str, width: int, dtype: torch.dtype, backward: bool) -> None:
    gated = constants(kind)["GATED"]
    x = _meta(4096, width * 2 if gated else width, dtype=dtype)
    if backward:
        activation_backward(_meta(4096, width, dtype=dtype), x, kind, want=("x", "y", "bias"))
    else:
        activation_forward(x, kind, bias=_meta(x.size(1), dtype=dtype))


def _xielu(width: int, dtype: torch.dtype) -> None:
    x, alpha = _meta(4096, width, dtype=dtype), _meta(1, dtype=dtype)
    xielu_forward(x, alpha, alpha, 0.5, -1e-6)
    xielu_backward(x, x, alpha, alpha, 0.5, -1e-6)


def _interleaved(x: Tensor) -> None:
    activation_forward(x, "clamped_swiglu", interleave=1)
    activation_backward(x[:, ::2], x, "clamped_swiglu", interleave=1)


def _dropout(width: int, dtype: torch.dtype) -> None:
    x = _meta(4096, width, dtype=dtype)
    dropout(x, _meta(dtype=torch.int64), 0.1, residual=x, bias=_meta(width, dtype=dtype))


def _sums(width: int, dtype: torch.dtype) -> None:
    x, bias = _meta(4096, width, dtype=dtype), _meta(width, dtype=dtype)
    add(x, x, bias)
    add(x, x)
    scale_forward(x, bias, x)
    scale_backward(x, x, bias)
    add(x, None, bias)
    sum_rows(x, dtype)


def _linear(
    kind: str, rows: int, depth: int, width: int, dtype: torch.dtype, backward: bool
) -> None:
    total = width * 2 if KINDS[kind].GATED else width
    x, bias = _meta(rows, depth, dtype=dtype), _meta(total, dtype=dtype)
    if backward:
        weight, pre = _meta(depth, width, dtype=dtype), _meta(rows, total, dtype=dtype)
        linear_activation_backward(x, weight, pre, kind, want=("x", "y", "bias"))
    else:
        linear_activation(x, _meta(total, depth, dtype=dtype), bias, kind, want=("pre",))


def _grouped(rows: int, depth: int, width: int, dtype: torch.dtype, what: str) -> None:
    groups = 8
    x, dy = _meta(rows, depth, dtype=dtype), _meta(rows, width, dtype=dtype)
    weights, bias = _meta(groups, width, depth, dtype=dtype), _meta(groups, width, dtype=dtype)
    offsets = _meta(groups + 1, dtype=torch.int64)
    if what == "linear":
        grouped_linear(x, weights, bias, offsets)
    elif what == "dgrad":
        grouped_dgrad(dy, weights, offsets)
    else:
        grouped_wgrad(dy, x, offsets)


def _paired(kind: str, groups: int) -> None:
    """Products with an activation beside them; groups: 0 for rows of none."""
    rows, depth, width = 4096, 1024, 4096
    total = width * 2 if KINDS[kind].GATED else width
    x, pre = _meta(rows, depth, dtype=HALF), _meta(rows, total, dtype=HALF)
    of = (groups,) if groups else ()
    at = persistent.schedule(_meta(groups, dtype=torch.int64), rows, True) if groups else None
    weights, bias = _meta(*of, total, depth, dtype=HALF), _meta(*of, total, dtype=HALF)
    pairs.activation(x, weights, bias, kind, want=("pre",), at=at)
    back = _meta(*of, depth, width, dtype=HALF)
    pairs.gradient(x, back, pre, pre, kind, want=("y",), at=at)


def _block_product(dtype: torch.dtype, rows: int, depth: int, columns: int) -> None:
    """Of a by E4M3; of E5M2 with a bias."""
    a, b = _meta(rows, depth, dtype=dtype), _meta(columns, depth, dtype=E4M3)
    a_scale = _meta(*inverse_shape("blocks", rows, depth)).flatten(1)
    b_scale = _meta(*inverse_shape("square", columns, depth)).flatten(1)
    bias = _meta(columns, dtype=HALF) if dtype == E5M2 else None
    block_product(_meta(rows, columns, dtype=HALF), a, b, a_scale, b_scale, bias)


def _grouped_elsewhere(*case: Any) -> None:
    """As where there is no Gluon, and then as where there are no persistent products."""
    paired, chip = persistent.paired, persistent.chip
    try:
        persistent.paired = lambda: False
        _grouped(*case)
        persistent.chip = lambda device: 0
        _grouped(*case)
    finally:
        persistent.paired, persistent.chip = paired, chip


def _inverse(rows: int, depth: int, cols: bool) -> None:
    """Of scales for 1 x 128, which the library reads by columns, or for 128 x 128."""
    scale = _meta(rows if cols else rows // 128, depth // 128)
    inverse(scale.t() if cols else scale, rows if cols else scale.size(1))


def _delayed(length: int, reduced: bool) -> None:
    """reduced: both updates at once, of amaxes that a group reduced."""
    names = ("amax_backward", "amax_forward") if reduced else ("amax_forward",)
    found = (_meta(30),) if reduced else ()
    table, fixed = _meta(10, 4, dtype=torch.int64), _meta(20, 3, dtype=torch.float32)
    updating(table, length, (448.0, 57344.0), 0.0, False, names, reduced)(table, fixed, *found)


def _noted(count: int) -> None:
    """Amaxes of as many states, noted in one launch."""
    raise_to(_meta(count, dtype=torch.float32).unbind(), _meta(count, dtype=torch.float32).unbind())


TARGETS = {scaling: Format(scaling) for scaling in BLOCKS} | {
    "powers": Format("blocks", power_of_two=True),
    "nvfp4": NVFP4(1, True, True),
    "nvfp4 square": NVFP4(16),
}


def _quantize(
    what: str, scaling: str, width: int, dtype: torch.dtype, given: bool, want: tuple[str, ...],
    rows: int = 4096,
) -> None:  # fmt: skip
    """given: with delayed scaling's scale and amax."""
    to, scale = TARGETS[scaling], (_meta() if given else None)
    want = (*want, "amax") if given else want
    x, vector = _meta(rows, width, dtype=dtype), _meta(width, dtype=dtype)
    if what == "cast":
        quantize.quantize(x, to, scale, want)
    elif what in ("rmsnorm", "layernorm"):
        center, want = what == "layernorm", (*want, "mean", "rstd")
        bias = vector if center else None
        norm_quantize(x, vector, bias, 1e-5, to, False, x, center, scale, want)
    elif what.endswith("backward"):
        kind, y_to = what.split()[0], to
        if isinstance(to, NVFP4):
            y_to = to._replace(stochastic=False)
        else:
            to = to._replace(dtype=torch.float8_e5m2)
        pre = _meta(rows, width * 2 if KINDS[kind].GATED else width, dtype=dtype)
        activation_backward_quantize(
            x, pre, kind, to, (), scale, want, y_to, scale, ("col",), dbias=dtype
        )
    else:
        pre = _meta(rows, width * 2 if KINDS[what].GATED else width, dtype=dtype)
        activation_quantize(pre, what, to, scale=scale, want=want)


def _once(kind: str) -> None:
    """The gradient in blocks that Hopper reads once, and the activation by columns."""
    x = _meta(4096, 8192 if KINDS[kind].GATED else 4096, dtype=HALF)
    to = TARGETS["powers"]._replace(dtype=torch.float8_e5m2)
    activation_backward_quantize(
        x[:, :4096], x, kind, to, want=BOTH, y_to=TARGETS["powers"], y_want=("col",)
    )


Case = tuple[str, Callable[..., None], tuple[Any, ...]]


def cases(which: str) -> Iterator[Case]:
    """(label, function, arguments): "few", "usual" (bf16 at usual sizes) or "all" (fp32 too)."""
    few, half = which == "few", torch.bfloat16
    widths: tuple[int, ...] = (4096, 8192, 40960) if few else (1024, 4096, 8192, 40960)
    kinds: tuple[str, ...] = ("swiglu",) if few else ("swiglu", "gelu")
    dtypes: tuple[torch.dtype, ...] = (half,)
    residuals: tuple[bool, ...] = (True,)
    if which == "all":
        widths = (100, 256, 1000, 1024, 2048, 4096, 5120, 8192, 12288, 16384, 20480, 32768, 65536)
        kinds = ("swiglu", "gelu", "geglu_erf", "clamped_swiglu", "srelu")
        dtypes, residuals = (half, torch.float32), (False, True)
    for width, dtype, center, backward, residual in product(
        widths, dtypes, (False, True), (False, True), residuals
    ):
        if center and which != "all" and width not in (4096, 8192):
            continue
        name = f"{'layernorm' if center else 'rmsnorm'} {'backward' if backward else 'forward'}"
        name += f" {TYPES[dtype]} {width}" + (" residual" if residual else "")
        yield name, _norm, (width, dtype, center, backward, residual)
    yield "layernorm forward, rounded", _norm, (4096, half, True, False, False, "input")
    for kind, dtype, backward in product(kinds, dtypes, (False, True)):
        for width in (14336, 1000) if which == "all" else (14336,):
            name = f"{kind} {'backward' if backward else 'forward'} {TYPES[dtype]} {width}"
            yield name, _activation, (kind, width, dtype, backward)
    x = _meta(4096, 200, dtype=half)
    yield "clamped_swiglu interleaved 100", _interleaved, (x,)
    yield "xielu bf16 100", _xielu, (100, half)  # the last sum is of two columns
    for backward in (False, True):
        name = f"swiglu {'backward' if backward else 'forward'} second, rounded"
        yield name, _activation, ("swiglu rounded second", 14336, half, backward)
    for dtype in dtypes:
        yield f"dropout {TYPES[dtype]} 4096", _dropout, (4096, dtype)
        yield f"sums {TYPES[dtype]} 4096", _sums, (4096, dtype)
    for cols in (True, False):
        yield f"inverse {'1' if cols else '128'} x 128", _inverse, (4096, 4096, cols)
    for length, reduced in product((1, 1024), (False, True)):
        yield f"delayed {length} slots{' reduced' * reduced}", _delayed, (length, reduced)
    yield "noted 2 amaxes", _noted, (2,)
    yield from _linear_cases(which)
    yield from _quantize_cases(which)


def _quantize_cases(which: str) -> Iterator[Case]:
    """Both copies at once, as training wants them; in "all" the row copy alone too."""
    kinds, widths, dtypes = ["cast", "rmsnorm", "swiglu", "swiglu backward"], [4096], [HALF]
    scalings = ["tensor", "blocks", "powers", "nvfp4"] if which == "few" else list(TARGETS)
    wants: list[tuple[str, ...]] = [BOTH]
    if which == "all":
        kinds += ["layernorm", "gelu", "geglu_erf backward"]
        widths, dtypes = [1000, 4096], [HALF, torch.float32]
        wants += [("row",)]
    wide = "rmsnorm", "rows", 40960, HALF, False, ("row",)
    yield "quantize rmsnorm rows 40960", _quantize, wide
    yield (
        "quantize rmsnorm tensor bf16 8192",
        _quantize,
        ("rmsnorm", "tensor", 8192, HALF, True, BOTH),
    )
    # Columns that are not stored 16 bytes at a time, as at a number of rows that 16 divides.
    yield (
        "quantize cast fp32 13 rows",
        _quantize,
        ("cast", "tensor", 256, torch.float32, True, BOTH, 13),
    )
    if persistent.chip(_meta().device) == 9:
        for kind in KINDS if which == "all" else ("swiglu", "gelu"):
            yield f"quantize {kind} backward once", _once, (kind,)
    for what, width, dtype, scaling, want in product(kinds, widths, dtypes, scalings, wants):
        if which == "usual" and what != "cast" and scaling in ("rows", "square", "nvfp4 square"):
            continue
        undefined = scaling == "rows" or ("glu" in what and width % BLOCKS.get(scaling, 16))
        if what.endswith("backward") and undefined:
            continue
        # A tensor's scale is given, with its amax wanted, or else found from the amax.
        for given in (True, False) if scaling == "tensor" else (False,):
            name = f"quantize {what} {scaling}{' given' if given else ''} {'+'.join(want)}"
            arguments = what, scaling, width, dtype, given, want
            yield f"{name} {TYPES[dtype]} {width}", _quantize, arguments


def _linear_cases(which: str) -> Iterator[Case]:
    """Linear layers with an activation: many rows and, beyond "few", few rows and odd sizes."""
    half = torch.bfloat16
    kinds, sizes, dtypes = ("swiglu",), [(4096, 1024, 4096)], (half,)
    if which != "few":
        kinds = ("swiglu", "gelu")
        sizes = [(4096, 4096, 14336), (4096, 1024, 512), (64, 4096, 14336), (16, 4096, 14336)]
    if which == "all":
        kinds = ("swiglu", "gelu", "geglu_erf", "clamped_swiglu")
        sizes += [(4096, 1000, 1000), (4096, 100, 100)]
        dtypes = (half, torch.float32)
    for kind, (rows, depth, width), dtype, backward in product(kinds, sizes, dtypes, (False, True)):
        name = f"linear {kind} {'backward' if backward else 'forward'} {TYPES[dtype]}"
        yield f"{name} {rows} {depth} {width}", _linear, (kind, rows, depth, width, dtype, backward)
    if persistent.chip(_meta().device) == 9:
        for kind, groups in product(
            KINDS if which == "all" else kinds, (0,) if which == "few" else (0, 8)
        ):
            yield f"paired {kind} of {groups} groups", _paired, (kind, groups)
        for dtype, size in product((E4M3, E5M2), ((4096, 4096, 14336), (300, 1104, 136))):
            name = f"block product {TYPES[dtype]} {' '.join(map(str, size))}"
            yield name, _block_product, (dtype, *size)
    for (rows, depth, width), dtype in product(sizes, dtypes):
        for what in ("linear", "dgrad", "wgrad"):
            name = f"grouped {what} {TYPES[dtype]} {rows} {depth} {width}"
            yield name, _grouped, (rows, depth, width, dtype, what)
            yield f"{name} elsewhere", _grouped_elsewhere, (rows, depth, width, dtype, what)


def table(cc: int, which: str) -> list[dict[str, Any]]:
    """One row per kernel that the cases launch, each compiled kernel once."""
    seen, rows, cubins = set[str](), list[dict[str, Any]](), list[bytes]()
    norms.shared_memory = gemm.shared_memory = lambda device: SHARED_MEMORY[cc]
    quantize.native = lambda device: cc >= 89
    persistent.chip = lambda device: cc // 10
    for name, function, arguments in cases(which):
        with recorded_launches() as launches:
            function(*arguments)
        for launch in launches:
            key = launch.source.hash() + str(launch.options)
            if key not in seen:
                seen.add(key)
                found, cubin = resources(launch, cc)
                rows.append({"cc": cc, "case": name, "kernel": launch.source.fn.__name__, **found})
                cubins.append(cubin)
    for row, text in zip(rows, instructions(cubins, cc), strict=True):
        row["lost"], row["late"] = len(LOST.findall(text)), len(LATE.findall(text))
    return rows


def main() -> None:
    """Prints the table, as JSON lines with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--cases", choices=("few", "usual", "all"), default="usual")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for cc in options.cc:
        for row in table(cc, options.cases):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            text = "sm_{cc:<4}{case:<42}{kernel:<28}{registers:>4} registers {spilled:>5} spilled"
            print(
                (text + "{shared:>7} shared {warps:>3} warps {wide_loads:>3} wide loads").format(
                    **row
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
