"""Products with an activation beside them: the kernels on Hopper, and the plans that take them.

Triton's interpreter runs none of the kernels: there the epilogue's kernels stand for them.
"""

from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import INTERPRETING, close, normal, twice
from test_triton_activations import activation64
from torch import Tensor

from opsgraph import Sequential
from opsgraph.fusers.triton import products
from opsgraph.kernels.triton import pairs, persistent
from opsgraph.kernels.triton.functions import KINDS
from opsgraph.kernels.triton.gemm import linear_activation, linear_activation_backward
from opsgraph.ops import GELU, GroupedLinear, Linear, SwiGLU


class Case(NamedTuple):
    kind: str
    rows: int
    depth: int
    width: int
    sizes: tuple[int, ...] | None = None
    """Of groups; rows that no group has come last."""
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = [
    *(Case(kind, 300, 128, 192) for kind in sorted(KINDS)),
    Case("swiglu", 1, 64, 64),
    Case("swiglu", 8190, 1024, 192, bias=True),
    Case("swiglu", 20000, 64, 2112),  # activations take longer than products, many tiles a program
    Case("gelu", 5000, 2048, 448, bias=True, dtype=torch.float16),
    Case("swiglu", 1000, 256, 320, (100, 0, 500, 333), True),
    Case("gelu", 1000, 256, 320, (128, 256, 0, 616)),
    Case("clamped_swiglu", 3000, 512, 192, (1, 2, 3, 2000, 0, 900), True, torch.float16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels(case: Case) -> None:
    if why := pairs.none_for(torch.device("cuda"), pairs.LEAST, case.width):
        pytest.skip(why)
    make: dict[str, Any] = {"dtype": case.dtype, "device": "cuda"}
    total = case.width * 2 if KINDS[case.kind].GATED else case.width
    of = () if case.sizes is None else (len(case.sizes),)
    at = None
    if case.sizes is not None:
        at = persistent.schedule(torch.tensor(case.sizes, device="cuda"), case.rows, True)
    x, dy = normal(case.rows, case.depth, **make), normal(case.rows, case.depth, **make, seed=1)
    weights = normal(*of, total, case.depth, **make, seed=2) / case.depth**0.5
    back = normal(*of, case.depth, case.width, **make, seed=3) / case.depth**0.5
    bias = normal(*of, total, **make, seed=4) if case.bias else None
    y, pre = twice(pairs.activation, x, weights, bias, case.kind, want=("pre",), at=at)
    alone, nothing = pairs.activation(x, weights, bias, case.kind, at=at)
    assert nothing is None
    assert torch.equal(alone, y)
    dpre = torch.empty_like(pre)
    more: dict[str, Any] = {"want": ("y",), "at": at}
    _, again = pairs.gradient(dy, back, pre, dpre, case.kind, **more)
    over = pre.clone()
    twice_over, _ = pairs.gradient(dy, back, over, over, case.kind, at=at)
    assert torch.equal(twice_over, dpre), "written over what it reads"
    assert torch.equal(again, y)
    start = 0
    for g, size in enumerate(case.sizes or (case.rows,)):
        own = slice(start, start := start + size)
        if not size:
            continue
        g = () if case.sizes is None else g
        x64, w64, dy64, back64 = (t.double() for t in (x[own], weights[g], dy[own], back[g]))
        pre64 = x64 @ w64.T + (0 if bias is None else bias[g].double())
        close(pre[own], pre64.cpu(), (x64.abs() @ w64.abs().T).amax())
        rounded = pre[own].double().requires_grad_()
        y64 = activation64(rounded, case.kind, ())
        close(y[own], y64.detach().cpu())
        (dpre64,) = torch.autograd.grad(y64, rounded, dy64 @ back64)
        terms = (dy64.abs() @ back64.abs()).amax() * (1 + rounded.detach().abs().amax() ** 2)
        close(dpre[own], dpre64.cpu(), terms)
    for made in (pre, y, dpre):
        assert not made[start:].any()


@pytest.mark.gpu
def test_configurations_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    make: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    if why := pairs.none_for(torch.device("cuda"), pairs.LEAST, 192):
        pytest.skip(why)
    x, weight = normal(3000, 128, **make), normal(384, 128, **make, seed=1)
    back, found = normal(128, 192, **make, seed=2), []
    for k in range(len(pairs._options(128, 192, 6))):
        monkeypatch.setattr(pairs, "configured", lambda _, key, offered, k=k: offered(*key)[k])
        y, pre = pairs.activation(x, weight, None, "swiglu", want=("pre",))
        found.append((y, *pairs.gradient(x, back, pre, pre, "swiglu", want=("y",))))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.fixture
def paired(many: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans are Hopper's; which kernels were called, of stand-ins by the interpreter."""
    if not INTERPRETING:
        pytest.skip("the kernels themselves are run")
    called: list[str] = []

    def each_group(at: Any, rows: int) -> list[tuple[Any, slice]]:
        if at is None:
            return [((), slice(0, rows))]
        ends = at.plan[: at.groups + 1].tolist()
        return [(g, slice(ends[g], ends[g + 1])) for g in range(at.groups)]

    def activation(
        x: Tensor, weights: Tensor, bias: Any, kind: str, params: Any, want: Any, at: Any = None
    ) -> Any:
        called.append("activation")
        made = [
            linear_activation(x[own], weights[g], None if bias is None else bias[g], kind, params,
                              want)
            for g, own in each_group(at, x.size(0))
        ]  # fmt: skip
        return [None if part[0] is None else torch.cat(part) for part in zip(*made, strict=True)]

    def gradient(
        dy: Tensor,
        weights: Tensor,
        pre: Tensor,
        dpre: Tensor,
        kind: str,
        params: Any,
        want: Any,
        at: Any = None,
    ) -> Any:
        called.append("gradient")
        made = [
            linear_activation_backward(dy[own], weights[g], pre[own], kind, params, {*want, "x"})
            for g, own in each_group(at, dy.size(0))
        ]
        dpre.copy_(torch.cat([part[0] for part in made]))
        return dpre, torch.cat([part[1] for part in made]) if "y" in want else None

    monkeypatch.setattr(pairs, "TILES", 0 if many else 1000)
    monkeypatch.setattr(products.pairs, "none_for", lambda *_: None)
    monkeypatch.setattr(products.pairs, "activation", activation)  # which keeps what it has found
    monkeypatch.setattr(products.pairs, "gradient", gradient)
    return called


MODELS = {
    "gated": lambda: (Linear(64, 256, bias=False), SwiGLU(), Linear(128, 64, bias=False)),
    "biased": lambda: (Linear(64, 128), GELU(), Linear(128, 64)),
    "bias before": lambda: (Linear(64, 256), SwiGLU(), Linear(128, 64)),
    "grouped": lambda: (
        GroupedLinear(3, 64, 256, bias=True), SwiGLU(), GroupedLinear(3, 128, 64, bias=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_plans(name: str, many: bool, paired: list[str]) -> None:
    """The kernels are called for enough tiles; results and gradients are right either way."""
    rows = 12
    torch.manual_seed(0)
    model = Sequential(*MODELS[name]()).bfloat16()
    exact = Sequential(*MODELS[name]()).double()
    exact.load_state_dict(model.state_dict())
    x = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    sizes = [torch.tensor([3, 0, rows - 3])] * 2 if name == "grouped" else []
    plan = str(model.plan())
    # Sums of a bias's gradient are no part of the kernel.
    backward = name in ("gated", "grouped")
    assert "PairedActivation " in plan
    assert ("PairedActivationBackward" in plan) == backward
    y, expected = model(x, *sizes), exact(x64, *sizes)
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.02)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    expected_calls = ["activation", "gradient"] if backward else ["activation"]
    assert paired == (expected_calls if many else [])
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0.05, atol=0.03)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0.05, atol=0.06)
