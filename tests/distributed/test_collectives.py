"""AllGather, ReduceScatter, AllReduce, AllReduceGrad on Gloo ranks, against all ranks' data."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import opsgraph as og
from opsgraph.ops import AllGather, AllReduce, AllReduceGrad, ReduceScatter, SiLU, Tee
from opsgraph.testing.distributed import Ranks

SHAPES = ((4, 3), (4, 2, 3), (8, 1, 2, 3), (0, 3))
OPS = (AllGather, ReduceScatter, AllReduce, AllReduceGrad)


def of_rank(rank: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What every rank knows that this rank holds."""
    generator = torch.Generator().manual_seed(97 * rank + len(name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def meaning(op: type, backward: bool, rank: int, every: list[Tensor]) -> Tensor:
    """The formula, from the values of all ranks."""
    dual = {AllGather: ReduceScatter, ReduceScatter: AllGather, AllReduceGrad: AllReduce}
    if backward or op is AllReduceGrad:
        op = dual.get(op) if backward else None
    if op is None:
        return every[rank]
    if op is AllGather:
        return torch.cat(every)
    total = torch.stack(every).sum(0)
    return total if op is AllReduce else total.chunk(len(every))[rank]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = 1e-12 if found.dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def every_op(rank: int, size: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        for kind in OPS:
            for shape in SHAPES:
                all_x = [of_rank(r, "x", shape, dtype) for r in range(size)]
                x = all_x[rank].clone().requires_grad_()
                y = kind()(x)
                close(y.detach(), meaning(kind, False, rank, all_x))
                all_dy = [of_rank(r, "a gradient", tuple(y.shape), dtype) for r in range(size)]
                dy = all_dy[rank].clone()
                (dx,) = torch.autograd.grad(y, x, dy)
                close(dx, meaning(kind, True, rank, all_dy))
                assert torch.equal(x.detach(), all_x[rank]), "x was written to"
                assert torch.equal(dy, all_dy[rank]), "dy was written to"
                with torch.no_grad():
                    close(kind()(x.mT.contiguous().mT), meaning(kind, False, rank, all_x))


def rows_and_errors(rank: int, size: int) -> None:
    for shape in ((3, 3), (3, 2, 3)):  # 6 rows would do, but rows of dimension 0 are scattered
        with pytest.raises(og.OpError, match=r"(got 3 rows, expected|, rows) a multiple of 2"):
            ReduceScatter()(torch.randn(shape))
    with pytest.raises(og.OpError, match=r"got input of shape \(3,\)"):
        AllGather()(torch.randn(3))
    mixed = og.Sequential(Tee("r"), AllGather(), og.ops.Add("r"))
    with pytest.raises(og.OpError, match=r"other f32\[\*,3\], expected f32\[2\*,3\]"):
        mixed(torch.randn(4, 3))
    scattered = og.Sequential(AllGather(), SiLU(), og.ops.Add(), ReduceScatter())
    x = torch.randn(2, 2, 3)
    assert scattered(x, torch.zeros(4, 2, 3)).shape == x.shape
    with pytest.raises(og.OpError, match=r"other of shape \(2, 2, 3\), expected \(4, 2, 3\)"):
        scattered(x, torch.zeros(2, 2, 3))
    with pytest.raises(og.PlanError, match=r"0:AllGather: .*no second derivative"):
        og.Sequential(AllGather(), double_backward=True)
    with pytest.raises(og.PlanError, match=r"0:AllGather: .*other ranks"):
        og.Sequential(AllGather()).to_torch()
    with pytest.raises(og.OpsgraphError, match="AllGather: got process group 3, expected"):
        AllGather(3)
    with pytest.raises(og.OpsgraphError, match="AllGather: got process group 'no', which is not"):
        AllGather("no")


def accounts(rank: int, size: int) -> None:
    """Bytes for each row of the input, where there are `size` times as many or a share of them."""
    gathered = og.Sequential(AllGather(), SiLU())
    plan = gathered.plan(x=torch.randn(4, 8))
    assert f"f32[*,8] -> f32[{size}*,8]" in str(plan)
    assert plan.saved == {"x0": 32} or plan.saved == {"x1": 32 * size}
    assert gathered(torch.randn(4, 8, requires_grad=True)).grad_fn is not None
    scattered = og.Sequential(ReduceScatter(), SiLU())
    plan = scattered.plan(x=torch.randn(4, 8))
    assert f"f32[*/{size},8]" in str(plan)
    assert plan.saved == {"x1": 32 // size}
    tapped = og.Sequential(AllGather(), Tee(), SiLU(), ReduceScatter())
    y, more = tapped(torch.randn(2, 2, 3))
    assert (y.shape, more.shape) == ((2, 2, 3), (2 * size, 2, 3))


def copies(rank: int, size: int) -> None:
    op = AllGather(dist.new_group(list(range(size))))
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert torch.equal(other(x), op(x))
    mesh = dist.device_mesh.init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    assert AllGather(mesh["tp"]).group_size == 2
    with pytest.raises(og.OpsgraphError, match="a mesh of 2 dimensions, expected 1"):
        AllGather(mesh)


def compiled(rank: int, size: int) -> None:
    """Full graphs, for changing numbers of rows, with the gradients of eager mode."""
    torch.compiler.reset()
    module: Any = og.Sequential(AllGather(), SiLU(), ReduceScatter(), AllReduce(), AllReduceGrad())
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for rows in (2, 6, 3, 8):
        x = of_rank(rank, "x", (rows, 2, 3), torch.float64).requires_grad_()
        results = [(y := m(x), *torch.autograd.grad(y.square().sum(), x)) for m in (module, fast)]
        for one, other in zip(*results, strict=True):
            close(other, one)
    assert counter.frame_count == 2


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_op_and_its_dual(ranks: Ranks, size: int) -> None:
    ranks.run(every_op, size, timeout=300)


def test_rows_and_errors(ranks: Ranks) -> None:
    ranks.run(rows_and_errors, 2, timeout=300)


def test_bytes_count_the_ranks_rows(ranks: Ranks) -> None:
    ranks.run(accounts, 2, timeout=300)


def test_copies_and_meshes(ranks: Ranks) -> None:
    ranks.run(copies, 4, timeout=300)


def test_under_compile(ranks: Ranks) -> None:
    ranks.run(compiled, 2, timeout=300)


def test_alone_they_are_identities() -> None:
    x = torch.randn(3, 4)
    for kind in OPS:
        op = kind()
        assert torch.equal(op(x), x)
        assert op.group_size == 1
    with pytest.raises(og.OpsgraphError, match=r"torch\.distributed is not initialized"):
        AllGather("0")
