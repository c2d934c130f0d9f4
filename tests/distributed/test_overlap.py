"""Fusers that hide collectives behind products: the reference's results, and what runs when."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import opsgraph as og
from opsgraph.base import config
from opsgraph.fuser import registered
from opsgraph.ops import (
    AllGather,
    AllReduce,
    AllReduceGrad,
    BasicLinear,
    Linear,
    ReduceScatter,
    SwiGLU,
    Tee,
)
from opsgraph.testing import check_fuser, exchanges
from opsgraph.testing.distributed import Ranks

EXCHANGING = [f.name for f in registered() if exchanges(f)]
OVERLAP = [f.name for f in registered() if exchanges(f) and f.backend == "overlap"]
SHAPES = ((0, 8), (8, 8), (4, 2, 8), (2112, 8))  # of the last, products are cut into pieces


def compare_all(
    rank: int, size: int, dtype: torch.dtype, shapes: Any, compiled: bool, kind: str = "cpu"
) -> list[str]:
    """Fusers that were not taken, for each shape."""
    device, missing = torch.device(kind, rank if kind == "cuda" else None), []
    if kind == "cuda":
        torch.cuda.set_device(device)
    for fuser in registered():
        if fuser.name not in OVERLAP:  # others are taken where they are asked for
            continue
        taken = [check_fuser(fuser, dtype, device, shape, compiled) for shape in shapes]
        missing += [f"{fuser.name} {s}" for s, t in zip(shapes, taken, strict=True) if not t]
    return missing


@pytest.mark.parametrize(
    "size, dtype",
    (
        pytest.param(2, torch.float64, marks=pytest.mark.slow),
        (2, torch.float32),
        (2, torch.bfloat16),
        (4, torch.float64),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
        pytest.param(4, torch.bfloat16, marks=pytest.mark.slow),
    ),
)
def test_every_fuser_equals_the_reference(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    assert ranks.run(compare_all, size, dtype, SHAPES, False) == [[]] * size


@pytest.mark.slow
def test_every_fuser_under_compile(ranks: Ranks) -> None:
    assert ranks.run(compare_all, 2, torch.float32, ((2112, 8),), True, timeout=240) == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_fuser_over_nccl(ranks: Ranks) -> None:
    found = ranks.run(compare_all, 2, torch.bfloat16, SHAPES, False, "cuda", timeout=240)
    assert found == [[], []]


def mlp(backends: tuple[str, ...], sequence_parallel: bool, **options: Any) -> og.Sequential:
    torch.manual_seed(0)
    split = dict(sequence_parallel=sequence_parallel, bias=False, dtype=options.pop("dtype"))
    return og.Sequential(
        Linear(16, 96, tensor_parallel_mode="column", **split),
        SwiGLU(),
        Linear(48, 16, tensor_parallel_mode="row", **split),
        backends=backends,
        **options,
    )


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def same_bits(rank: int, size: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for parallel in (True, False):
            for frozen in (False, True):
                ours, plain = (
                    mlp(order, parallel, dtype=dtype)
                    for order in (("overlap", "reference"), ("reference",))
                )
                for module in (ours, plain):
                    for parameter in module.parameters():
                        parameter.requires_grad_(not frozen)
                names = {step.name for step in (*ours.plan().forward, *ours.plan().backward)}
                assert names & set(OVERLAP), names
                torch.manual_seed(1 + rank * parallel)
                x, dy = torch.randn(2, 2048, 16, dtype=dtype)
                for one, other in zip(gradients(ours, x, dy), gradients(plain, x, dy), strict=True):
                    assert torch.equal(one, other), (dtype, parallel, frozen)


def best_planned(rank: int, size: int) -> None:
    for parallel in (True, False):
        best = mlp(
            ("overlap", "aten", "reference"), parallel, dtype=torch.float64, planner="optimal"
        )
        plain = mlp(("reference",), parallel, dtype=torch.float64)
        assert "overlap" in {step.backend for step in best.plan().forward}
        x = torch.randn(16, 1024, dtype=torch.float64).t()
        dy = torch.randn(1024, 1, dtype=torch.float64).expand(1024, 16)
        for one, other in zip(gradients(best, x, dy), gradients(plain, x, dy), strict=True):
            torch.testing.assert_close(one, other)


def test_the_optimal_planner_takes_them_too(ranks: Ranks) -> None:
    ranks.run(best_planned, 2)


def test_the_bits_are_those_without_overlap(ranks: Ranks) -> None:
    """A sum over two ranks is the same in any order; more ranks may add up in another."""
    ranks.run(same_bits, 2)


def compiled(rank: int, size: int) -> None:
    for parallel in (True, False):
        module = mlp(("overlap", "reference"), parallel, dtype=torch.float32)
        x, dy = torch.randn(2, 2048, 16)
        eager = gradients(module, x, dy)
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")
        x.requires_grad_()
        y = traced(x)
        found = [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]
        assert all(map(torch.equal, found, eager))


def test_compiled_is_eager_bit_for_bit(ranks: Ranks) -> None:
    ranks.run(compiled, 2, timeout=240)


class Recorder(TorchDispatchMode):
    """What reaches the dispatcher: "start" and "wait" of collectives, "multiply"."""

    NAMES = {"wait_tensor": "wait", "bmm": "multiply", "mm": "multiply", "addmm": "multiply"}

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.events.append(self.NAMES[name])
        elif func.namespace == "_c10d_functional":
            self.events.append("start")
        return func(*args, **(kwargs or {}))


def record(run: Any) -> str:
    """The initials of events: s(tart), w(ait), m(ultiply)."""
    with Recorder() as recorder:
        run()
    return "".join(event[0] for event in recorder.events)


def events(rank: int, size: int) -> dict[str, str]:
    found = {}
    x = torch.randn(2048, 8)
    columns = og.Sequential(AllGather(), BasicLinear(8, 12), dtype=x.dtype)
    rows = og.Sequential(BasicLinear(8, 12), ReduceScatter(), dtype=x.dtype)
    summed = og.Sequential(BasicLinear(8, 12), AllReduce(), dtype=x.dtype)
    whole = og.Sequential(AllReduceGrad(), BasicLinear(8, 12), dtype=x.dtype)
    for name, module in dict(columns=columns, rows=rows, summed=summed, whole=whole).items():
        with torch.no_grad():
            found[name] = record(lambda module=module: module(x))
        y = module(x.clone().requires_grad_())
        found[f"{name} backward"] = record(lambda y=y: y.backward(torch.ones_like(y)))
    return found


def test_collectives_are_pending_while_products_run(ranks: Ranks) -> None:
    # Between CPUs each start waits at once, and the wait that GPUs need finds nothing to do.
    assert ranks.run(events, 2)[0] == {
        "columns": "sw" * 4 + "wm" * 4,
        "columns backward": "sw" + "m" + "sw" + "w" + "m" + "w",
        "rows": "msw" * 4 + "wwww",
        "rows backward": "sw" * 4 + "wm" * 4 + "m",
        "summed": "msw" * 4 + "wwww",
        "summed backward": "mm",
        "whole": "m",
        "whole backward": "m" + "sw" + "m" + "w",
    }


def with_tee(rank: int, size: int) -> None:
    for before in (AllGather, AllReduceGrad):
        torch.manual_seed(rank)
        ops = [before(), Tee(), BasicLinear(8, 12)]
        ours = og.Sequential(*ops, dtype=torch.float64, backends=("overlap", "reference"))
        plain = og.Sequential(*ours, backends=("reference",))
        plan = ours.plan(x=torch.randn(4, 8, dtype=torch.float64))
        assert plan.backward[0].name in OVERLAP
        assert before is AllReduceGrad or plan.forward[0].name == "GatherLinear"
        x = torch.randn(1200, 8, dtype=torch.float64)
        results = []
        for module in (ours, plain):
            leaf = x.clone().requires_grad_()
            y, tee = module(leaf)
            torch.manual_seed(3 + rank)
            (y * torch.randn_like(y)).sum().backward(retain_graph=True)
            (tee * torch.randn_like(tee)).sum().backward()
            results.append([y, tee, leaf.grad, module[2].weight.grad])
            module[2].weight.grad = None
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_a_tee_does_not_stop_the_overlap(ranks: Ranks) -> None:
    ranks.run(with_tee, 2)


def under_check(rank: int, size: int) -> None:
    os.environ["OPSGRAPH_CHECK"] = "1"
    config.touch()
    try:
        module = mlp(("overlap", "reference"), True, dtype=torch.float64)
        assert "check(" in module.plan().backward_source
        x, dy = torch.randn(2, 2048, 16, dtype=torch.float64)
        gradients(module, x, dy)
    finally:
        del os.environ["OPSGRAPH_CHECK"]
        config.touch()


def test_check_compares_overlapped_steps(ranks: Ranks) -> None:
    ranks.run(under_check, 2)


def into_main_grad(rank: int, size: int) -> None:
    for parallel in (True, False):
        module = mlp(("overlap", "reference"), parallel, dtype=torch.float32)
        plain = mlp(("reference",), parallel, dtype=torch.float32)
        for k in (0, 2):
            module[k].accumulate_into_main_grad = True
            module[k].weight.main_grad = torch.ones_like(module[k].weight)
        x, dy = torch.randn(2, 2048, 16)
        module(x.requires_grad_()).backward(dy)
        expected = gradients(plain, x, dy)[2:]
        for k, gradient in zip((0, 2), expected, strict=True):
            torch.testing.assert_close(module[k].weight.main_grad, 1 + gradient)


def test_weight_gradients_go_into_main_grad(ranks: Ranks) -> None:
    ranks.run(into_main_grad, 2)


def delayed(rank: int, size: int) -> None:
    """The same steps run, their weight gradients later, and no rank waits for another then."""
    found = []
    for late in (False, True):
        options = {"delay_wgrad_compute": late}
        module = mlp(("overlap", "reference"), True, dtype=torch.float32, **options)
        names = {step.name for step in module.plan().backward}
        assert {"GatherLinearBackward", "LinearScatter"} <= names
        torch.manual_seed(1)
        x, dy = torch.randn(2, 2048, 16)
        module(x.requires_grad_()).backward(dy)
        if late and rank == 0:  # alone
            module.backward_dw()
        dist.barrier()
        if late and rank != 0:
            module.backward_dw()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *found))


def test_delayed_gradients_of_overlapped_steps(ranks: Ranks) -> None:
    ranks.run(delayed, 2)


def keeping(rank: int, size: int) -> None:
    """With recompute=False the gathered input is kept, and gathered once."""
    found, gathers = [], []
    for recompute in (True, False):
        options: Any = dict(normalization="RMSNorm", activation="swiglu", device="cpu")
        torch.manual_seed(0)
        module = og.LayerNormMLP(
            16, 64, tp_group=dist.group.WORLD, set_parallel_mode=True, sequence_parallel=True,
            recompute=recompute, **options,
        )  # fmt: skip
        names = {step.name for step in module.plan().backward}
        assert ("GatheredLinearBackward" in names) is not recompute
        torch.manual_seed(rank)
        x, dy = torch.randn(2, 8, 16)
        with Exchanges() as seen:
            module(x.requires_grad_()).backward(dy)
        gathers.append(seen.gathers)
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *found))
    assert gathers == [3, 2]  # x, x again, dy


class Exchanges(TorchDispatchMode):
    """Counts gathers."""

    gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += "all_gather" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_gathered_input_that_is_kept(ranks: Ranks) -> None:
    ranks.run(keeping, 2)


def refusals(rank: int, size: int) -> None:
    for ops in ([BasicLinear(8, 8), ReduceScatter()], [AllGather(), BasicLinear(8, 8)]):
        module = og.Sequential(*ops)
        assert module.plan().forward[0].backend == "overlap"
    with pytest.raises(og.OpError, match=r"got 3 rows, expected a multiple of 2"):
        og.Sequential(BasicLinear(8, 8), ReduceScatter())(torch.randn(3, 8))


def test_what_is_refused_is_told(ranks: Ranks) -> None:
    ranks.run(refusals, 2)


def test_one_rank_has_nothing_to_hide() -> None:
    plan = og.Sequential(AllGather(), BasicLinear(8, 8)).plan()
    assert not {step.name for step in (*plan.forward, *plan.backward)} & set(EXCHANGING)
    assert "its group has one rank" in {r.reason for r in plan.rejected if r.name == "GatherLinear"}
