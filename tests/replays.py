"""What tests of replays share: calls in both settings, compared bit by bit; which passes replay."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GELU, Add, Dropout, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.plan import Plan
from opsgraph.replay.passes import ByRows, Pass

WIDTH, INNER, ROWS = 64, 128, 6
NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "llama": lambda: [
        RMSNorm(WIDTH), Linear(WIDTH, 2 * INNER, bias=False), SwiGLU(),
        Linear(INNER, WIDTH, bias=False),
    ],
    "gpt": lambda: [LayerNorm(WIDTH), Linear(WIDTH, INNER), GELU(), Linear(INNER, WIDTH)],
    "residual": lambda: [Tee("r"), RMSNorm(WIDTH), Linear(WIDTH, WIDTH, bias=False), Add("r")],
    "tap": lambda: [Linear(WIDTH, WIDTH), Tee(), GELU(), Linear(WIDTH, WIDTH)],
    "dropout": lambda: [Linear(WIDTH, INNER), GELU(), Dropout(0.2), Linear(INNER, WIDTH)],
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> og.Sequential:
    """One of these nets, the same at every call."""
    torch.manual_seed(0)
    return og.Sequential(*NETS[name](), dtype=dtype, **options)


@contextmanager
def replaying(on: bool) -> Iterator[None]:
    """Modules that are made and called inside replay their passes, or do not."""
    before = os.environ.get("OPSGRAPH_REPLAY")
    os.environ["OPSGRAPH_REPLAY"] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPSGRAPH_REPLAY"]
        else:
            os.environ["OPSGRAPH_REPLAY"] = before


def compare(make: Callable[[], Any], use: Callable[[Any], Any]) -> Any:
    """Have what `use` gives of a module be the same with replays and without, bit by bit.

    make: the module, the same at every call. Returns the one that replays.
    """
    with replaying(False):
        expected = leaves(use(make()))
    with replaying(True):
        module = make()
        found = leaves(use(module))
    assert_same_bits(found, expected)
    return module


def leaves(nested: Any) -> list[Any]:
    """Copies of all tensors in tuples, lists and dicts, and what else there is, in order."""
    if isinstance(nested, Tensor):
        return [nested.detach().clone()]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, tuple | list):
        return [leaf for item in nested for leaf in leaves(item)]
    return [nested]


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    """Of lists of leaves."""
    assert len(found) == len(expected)
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        if isinstance(one, Tensor):
            torch.testing.assert_close(
                one, other, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=k: f"leaf {k}: {m}"
            )
        else:
            assert one == other, f"leaf {k}"


def step(module: Any, x: Tensor, seed: int = 1, **options: Any) -> list[Tensor | None]:
    """Outputs, dx and the gradients of the parameters, none of which were there before."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)  # of dropout and of stochastic rounding
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(seed + 1)
    dys = [torch.randn_like(y) for y in outputs]
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, dys, allow_unused=True, **options)]


def random(
    *shape: int, seed: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def told(plan: Plan) -> dict[str, list[str]]:
    """What the passes that calls of a plan run say of their replays."""
    passes = plan.passes._asdict()
    if plan.joined is not None:
        passes = {
            "forward": plan.joined.forward,
            "backward": plan.joined.backward or passes["backward"],
        }
    return {k: run.told() for k, run in passes.items() if isinstance(run, Pass | ByRows)}


def is_native(plan: Plan) -> bool:
    """Whether every pass is one native call."""
    texts = told(plan)
    return bool(texts) and all(
        len(each) == 1 and each[0].endswith("in one native call") for each in texts.values()
    )
