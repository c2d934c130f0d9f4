"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and spills nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "forward_kernel",
    "forward_wide_kernel",
    "backward_kernel",
    "backward_wide_dots_kernel",
    "backward_wide_kernel",
    "sum_partials_kernel",
    "max_partials_kernel",
    "inverse_kernel",
    "add_kernel",
    "scale_kernel",
    "scale_backward_kernel",
    "xielu_kernel",
    "xielu_backward_kernel",
    "sum_rows_kernel",
    "delayed_update_kernel",
    "raise_kernel",
    "dropout_kernel",
    "linear_activation_kernel",
    "linear_activation_backward_kernel",
    "grouped_rows_kernel",
    "grouped_weights_kernel",
    "persistent_rows_kernel",
    "persistent_weights_kernel",
    "ping_pong_rows_kernel",
    "ping_pong_weights_kernel",
    "ping_pong_activation_kernel",
    "ping_pong_gradient_kernel",
    "block_product_kernel",
    "schedule_kernel",
    "copy_kernel",
    "blocks_kernel",
    "pairs_kernel",
    "amax_kernel",
    "rows_kernel",
    "activation_backward_kernel",
    "activation_backward_blocks_kernel",
    "activation_backward_once_kernel",
    "norm_quantize_kernel",
    "transpose_kernel",
    "nvfp4_backward_kernel",
    "nvfp4_kernel",
}


HOPPER = {
    "persistent_rows_kernel",
    "persistent_weights_kernel",
    "ping_pong_rows_kernel",
    "ping_pong_weights_kernel",
    "ping_pong_activation_kernel",
    "ping_pong_gradient_kernel",
    "block_product_kernel",
    "schedule_kernel",
    "activation_backward_once_kernel",
}
"""Kernels that no other chip is given; all but the last load by descriptors."""
NATIVE = {"pairs_kernel"}
"""Kernels for chips that convert to FP8 themselves."""


def compiled(ccs: tuple[int, ...], cases: str) -> list[dict[str, Any]]:
    """Rows of `benchmarks/aot.py`; its own process, as the interpreter may be on in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/aot.py", "--json", f"--cases={cases}"]
    command += ["--cc", *map(str, ccs)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, timeout=1200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def check(rows: list[dict[str, Any]], allowed: Callable[[dict[str, Any]], int]) -> None:
    """allowed: the bytes that a kernel may spill."""
    for cc in {row["cc"] for row in rows}:
        expected = KERNELS - (HOPPER if cc != 90 else set()) - (NATIVE if cc < 89 else set())
        assert {row["kernel"] for row in rows if row["cc"] == cc} == expected
    spilled = [row for row in rows if row["spilled"] > allowed(row)]
    assert not spilled, "\n".join(map(str, spilled))
    too_large = [row for row in rows if row["shared"] > SHARED_MEMORY[row["cc"]]]
    assert not too_large, "\n".join(map(str, too_large))
    lost = [row for row in rows if row["lost"]]
    assert not lost, "\n".join(map(str, lost))
    # Scales that are read after the start may be those of a later stage.
    late = [row for row in rows if row["kernel"] == "block_product_kernel" and row["late"]]
    assert not late, "\n".join(map(str, late))
    narrow = [row for row in rows if row["narrow"]]
    assert not narrow, "\n".join(map(str, narrow))
    rounded = [row for row in rows if row["case"].endswith("rounded")]
    assert rounded
    assert not [row for row in rounded if row["fused"]]  # product and sum, in one rounding
    # Rows are loaded 16 bytes at a time, their widths being multiples of 8 (all but one are).
    slow = [
        row
        for row in rows
        if " 100" not in row["case"].removesuffix(" 1000") and not row["wide_loads"]
        and row["kernel"] not in {"delayed_update_kernel", "raise_kernel", *HOPPER}
        and not (row["kernel"] == "activation_backward_kernel" and "row+col" in row["case"])
    ]  # fmt: skip
    assert not slow, "\n".join(map(str, slow))


_USUAL = [
    ((90,), "few"),
    pytest.param((80, 100), "few", marks=pytest.mark.slow),
    pytest.param((90,), "usual", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ccs", "cases"), _USUAL)
def test_usual_sizes(ccs: tuple[int, ...], cases: str) -> None:
    rows = compiled(ccs, cases)
    assert {row["cc"] for row in rows} == {*ccs}
    check(rows, paired)


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 90, 100])
def test_all_sizes(cc: int) -> None:
    check(compiled((cc,), "all"), beyond_usual_sizes)


def paired(row: dict[str, Any]) -> int:
    """Twelve warps have 168 registers each on average, and accumulators take 128 of eight's.

    All but SwiGLU's gradients keep some of theirs on the stack.
    """
    return 136 if row["case"].startswith("paired") and " swiglu " not in row["case"] else 0


def beyond_usual_sizes(row: dict[str, Any]) -> int:
    """Bytes of stack: ptxas takes 8 here and there, mostly where it ends at 64 or 128 registers."""
    if row["case"].startswith("paired"):
        return paired(row)
    if row["case"].startswith(("linear", "grouped")):
        return 80  # fp32, and widths that are loaded 8 bytes at a time and so need more pointers
    if row["case"].startswith("quantize") and " fp32 " in row["case"]:
        return 24  # of 255 registers, with three fp32 tiles of 64 values a thread
    widest = row["case"].startswith(("layernorm backward bf16 12288", "layernorm backward bf16 16"))
    # LayerNorm sums two gradients: on an H100, to spill some of them was faster (194 us) than to
    # read the rows twice in column blocks (250). sm_90 loads x and dy again and spills nothing.
    return 104 if widest and row["cc"] != 90 else 8
