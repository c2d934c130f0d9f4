"""A gradient in blocks that Hopper reads once has the bits of the kernels that read it twice.

Triton's interpreter does not run the kernel: there it is seen which calls take it.
"""

from typing import Any

import pytest
import torch
from kernel_checks import bits
from test_triton_pairs import BLOCKS, BOTH, HALF, special, tensors

from opsgraph.kernels.formats import E4M3, Format
from opsgraph.kernels.triton import persistent, quantize_backward
from opsgraph.kernels.triton.functions import KINDS
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize


@pytest.mark.gpu
@pytest.mark.parametrize("dx", BLOCKS, ids=lambda to: str(to.dtype)[-4:])
@pytest.mark.parametrize("y_want", [("col",), BOTH, ()], ids=len)
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "geglu", "clamped_swiglu"])
def test_bits(
    kind: str, y_want: tuple[str, ...], dx: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not persistent.paired() or persistent.chip(torch.device("cuda")) != 9:
        pytest.skip("the kernel is Gluon's, for sm_90")
    for rows, width, strided in ((16, 128, False), (144, 256, True), (1040, 1408, False)):
        x = special(rows, width * (2 if KINDS[kind].GATED else 1), "cuda", 1)
        dy = special(rows, width, "cuda", 2).flip(0)
        if strided:
            x, dy = (torch.cat([t, t[:, :8]], 1)[:, : t.size(1)] for t in (x, dy))
        for want in (BOTH, ("col",)):
            arguments: dict[str, Any] = {"want": want, "y_to": BLOCKS[0], "y_want": y_want}
            taken: list[bool] = []
            usual = quantize_backward._in_one_reading

            def noted(*operands: Any, taken: list[bool] = taken, usual: Any = usual) -> bool:
                taken.append(usual(*operands))
                return taken[-1]

            with monkeypatch.context() as patched:
                patched.setattr(quantize_backward, "_in_one_reading", noted)
                found = tensors(activation_backward_quantize(dy, x, kind, dx, **arguments))
                assert taken == [True]
                patched.setattr(quantize_backward, "_in_one_reading", lambda *_: False)
                expected = tensors(activation_backward_quantize(dy, x, kind, dx, **arguments))
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(bits(one), bits(other))


TAKEN: dict[str, Any] = {"rows": 48, "width": 128, "to": BLOCKS[1], "want": BOTH, "unit": 8}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"want": ("col",)}, True),
        ({"want": ("row",)}, False),
        ({"rows": 24}, False),
        ({"kind": "gelu", "width": 192}, False),
        ({"unit": 4}, False),
        ({"dtype": torch.float16}, False),
        ({"dbias": HALF}, False),
        ({"to": Format("blocks", E4M3)}, False),
        ({"to": Format("blocks", E4M3, 1e-4, True)}, False),
        ({"to": Format("square", E4M3, 0.0, True)}, False),
    ],
    ids=lambda value: str(value),
)
def test_which_calls_are_read_once(
    change: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: dict[str, Any] = {"kind": "swiglu", "dtype": HALF, "dbias": None} | TAKEN | change
    launched: list[Any] = []

    class Once:
        activation_backward_once_kernel = "once"

    monkeypatch.setattr(quantize_backward, "once", Once)
    monkeypatch.setattr(persistent, "paired", lambda: True)
    monkeypatch.setattr(
        quantize_backward, "launch", lambda kernel, *_, **__: launched.append(kernel)
    )
    monkeypatch.setattr(quantize_backward, "sum_partials", lambda *_: None)
    total = case["width"] * (2 if KINDS[case["kind"]].GATED else 1)
    x = torch.zeros(case["rows"], total, dtype=case["dtype"])
    dy = torch.zeros(case["rows"], case["width"] + case["unit"], dtype=case["dtype"])
    activation_backward_quantize(
        dy[:, : case["width"]], x, case["kind"], case["to"], want=case["want"], y_want=("col",),
        dbias=case["dbias"],
    )  # fmt: skip
    assert launched
    assert (launched == ["once"]) == expected
