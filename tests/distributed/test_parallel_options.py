"""Tensor parallelism with every other option: gradients, compile, copies, attributes, errors."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_parallel_mlp import (
    FFN,
    HIDDEN,
    NORM,
    SHAPE,
    Case,
    compare,
    expected,
    local_gradients,
    make,
    named,
    noise,
    parameters,
    rows,
    share,
    summed,
)
from torch import Tensor, nn

import opsgraph as og
import opsgraph.parallel
from opsgraph.ops import GELU, BasicLinear, Bias, Dropout, LayerNorm, Linear, RMSNorm, SwiGLU
from opsgraph.testing.distributed import Ranks

SOME = [
    Case(sequence_parallel, activation, returned=returned)
    for sequence_parallel in (False, True)
    for activation in ("gelu", "swiglu")
    for returned in ("out", "gathered")
]
ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def backward(case: Case, mlp: Any, rank: int, size: int) -> None:
    dtype = next(mlp.parameters()).dtype
    x = rows(noise("x", SHAPE), case, rank, size).to(dtype)
    outputs = named(case, mlp(x))
    torch.autograd.backward(list(outputs.values()), local_gradients(case, outputs, rank, size))


def check(name: str, gradient: Tensor, case: Case, rank: int, size: int, times: int = 1) -> None:
    right = times * share(name, expected(case, size)[1][name], case, rank, size)
    found = summed(gradient) if name in NORM and case.sequence_parallel else gradient
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")


def gradients(rank: int, size: int) -> None:
    for case in SOME:
        compare(case, make(case, rank, size, checkpoint=True), rank, size)
        delayed = make(case, rank, size, delay_wgrad_compute=True)
        for _ in range(2):
            backward(case, delayed, rank, size)
        assert delayed.fc1_weight.grad is None
        delayed.backward_dw()
        delayed.backward_dw()
        for name, parameter in delayed.named_parameters():
            check(name, parameter.grad, case, rank, size, times=2)
        fused = make(case, rank, size, fuse_wgrad_accumulation=True)
        for name in ("fc1_weight", "fc2_weight"):
            weight = fused.get_parameter(name)
            weight.main_grad = torch.zeros_like(weight)
        backward(case, fused, rank, size)
        for name, parameter in fused.named_parameters():
            check(name, getattr(parameter, "main_grad", parameter.grad), case, rank, size)
        for frozen in ("fc1_weight", "fc2_weight", "layer_norm_weight"):
            partly = make(case, rank, size)
            partly.get_parameter(frozen).requires_grad_(False)
            backward(case, partly, rank, size)
            for name, parameter in partly.named_parameters():
                if name != frozen:
                    check(name, parameter.grad, case, rank, size)
        for planner in ("greedy", "optimal"):
            layer, full = in_ops(case, planner), parameters(case)
            x = rows(noise("x", SHAPE), case, rank, size)
            layer(x)  # tells the sizes that were left out
            with torch.no_grad():
                for (_, parameter), name in zip(layer.named_parameters(), full, strict=True):
                    parameter.copy_(share(name, full[name], case, rank, size))
            right = rows(expected(case, size)[0]["out"].detach(), case, rank, size)
            torch.testing.assert_close(layer(x), right)
            layer(x).sum().backward()
            assert layer[1].weight.partition_stride == 1 + (case.activation == "swiglu")


def in_ops(case: Case, planner: str) -> og.Sequential:
    split: Any = dict(sequence_parallel=case.sequence_parallel)
    gated = case.activation == "swiglu"
    return og.Sequential(
        RMSNorm(),
        Linear(out_features=FFN * (1 + gated), tensor_parallel_mode="column", **split),
        SwiGLU() if gated else GELU(),
        Linear(FFN, HIDDEN, tensor_parallel_mode="row", **split),
        Dropout(0.0),
        dtype=torch.float64,
        planner=planner,
    ).eval()


def compiled(rank: int, size: int) -> None:
    """Full graphs, with the results of eager mode; another number of rows makes no break."""
    for case in (Case(True, "swiglu", returned="gathered"), Case(False, "gelu", True, True)):
        torch.compiler.reset()
        mlp: Any = make(case, rank, size)
        fast = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        compare(case, CompiledMLP(mlp, fast), rank, size)
        for seq in (2, 6):
            x = noise("x", (seq, 3, HIDDEN)).requires_grad_()
            results = []
            for module in (mlp, fast):
                out = named(case, module(x))["out"]
                results.append((out, *torch.autograd.grad(out.square().sum(), x)))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


class CompiledMLP(nn.Module):
    """Parameters of one module, calls of the other."""

    def __init__(self, mlp: nn.Module, fast: Any) -> None:
        super().__init__()
        self.named_parameters = mlp.named_parameters
        self.call = (fast,)

    def forward(self, x: Tensor) -> Any:
        return self.call[0](x)


def dtypes(rank: int, size: int) -> None:
    for case in SOME:
        compare(case, make(case, rank, size, params_dtype=torch.float32), rank, size, 2e-4)
        mlp = make(case, rank, size, params_dtype=torch.float32)
        x = rows(noise("x", SHAPE), case, rank, size).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = named(case, mlp(x))
        assert {value.dtype for value in outputs.values()} == {torch.bfloat16}
        right = rows(expected(case, size)[0]["out"].detach(), case, rank, size)
        error = (outputs["out"].double() - right).abs().max() / right.abs().max()
        assert error < 3e-2, error
        outputs["out"].float().sum().backward()
        assert x.grad.dtype == mlp.fc1_weight.grad.dtype == torch.float32


def attributes(rank: int, size: int) -> None:
    group = dist.new_group(list(range(size)))
    for case in (Case(True, "swiglu", normalization="LayerNorm"), Case(False, "gelu")):
        mlp = make(case, rank, size, group)
        buffer = io.BytesIO()
        torch.save(mlp, buffer)
        buffer.seek(0)
        empty = make(case, rank, size, group, device="meta").to_empty(device="cpu")
        empty.reset_parameters()
        copies = (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)), mlp.double(), empty)
        for other in (mlp, *copies, torch.load(buffer, weights_only=False)):
            stride = 2 if case.activation == "swiglu" else 1
            found = {
                name: tuple(getattr(p, a, None) for a in ATTRIBUTES)
                for name, p in other.named_parameters()
            }
            whole = (None, None, None, case.sequence_parallel)
            right = dict.fromkeys(found, whole) | {
                "fc1_weight": (True, 0, stride, None),
                "fc1_bias": (True, 0, stride, None),
                "fc2_weight": (True, 1, 1, None),
            }
            assert found == right
        compare(case, copies[1], rank, size)
        shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
        assert shapes["fc1_weight"] == (FFN // size * stride, HIDDEN)
        assert shapes["fc2_weight"] == (HIDDEN, FFN // size)
        assert (mlp.tp_size, mlp.size_per_partition) == (size, FFN // size)
        assert mlp.tp_group is group
        mlp.set_tensor_parallel_group(dist.group.WORLD)
        assert mlp.tp_group is dist.group.WORLD
        compare(case, mlp, rank, size)


class Tracker:
    """Another seed in each rank, as Megatron's trackers have it."""

    @contextmanager
    def fork(self) -> Iterator[None]:
        with torch.random.fork_rng():
            torch.manual_seed(100 + dist.get_rank())
            yield


def initial_weights(rank: int, size: int) -> None:
    torch.manual_seed(7)
    tracked = dict(rng_state_tracker_function=Tracker, tensor_parallel_mode="row")
    made = {
        "mlp": og.LayerNormMLP(
            64, 128, tp_group=dist.group.WORLD, set_parallel_mode=True, device="cpu",
            get_rng_state_tracker=Tracker,
        ).fc2_weight,
        "row": (layer := Linear(400, 30, **tracked)).weight,
        "column": Linear(30, 400, **tracked | {"tensor_parallel_mode": "column"}).weight,
    }  # fmt: skip
    for name, weight in made.items():
        every = [torch.empty_like(weight) for _ in range(size)]
        dist.all_gather(every, weight.detach())
        assert not torch.equal(every[0], every[1]), f"{name}: every rank has the same share"
    bias = [torch.empty_like(layer.bias) for _ in range(size)]
    dist.all_gather(bias, layer.bias.detach())
    assert torch.equal(bias[0], bias[1])
    assert 0.04 < float(layer.weight.abs().max()) <= 1 / 400**0.5  # by the whole layer's width
    assert abs(float(made["mlp"].std()) - 0.023) < 1e-3


def linears(rank: int, size: int) -> None:
    """Each mode alone, with and without sequence parallelism and a bias, against the product."""
    for sequence_parallel in (False, True):
        for bias in (False, True):
            weight, b = noise("w", (FFN, HIDDEN)), noise("b", (FFN,))
            column = Linear(
                HIDDEN, FFN, bias, tensor_parallel_mode="column", dtype=torch.float64,
                sequence_parallel=sequence_parallel,
            )  # fmt: skip
            row = Linear(
                FFN, HIDDEN, bias, tensor_parallel_mode="row", dtype=torch.float64,
                sequence_parallel=sequence_parallel,
            )  # fmt: skip
            assert column.weight.shape == (FFN // size, HIDDEN)
            assert row.weight.shape == (HIDDEN, FFN // size)
            assert (column.local_out_features, row.local_in_features) == (FFN // size,) * 2
            with torch.no_grad():
                column.weight.copy_(weight.chunk(size)[rank])
                row.weight.copy_(weight.t().chunk(size, 1)[rank])
                if bias:
                    column.bias.copy_(b.chunk(size)[rank])
                    row.bias.copy_(b[:HIDDEN])
            x = noise("x", (2 * size, 3, HIDDEN))
            h = x @ weight.t() + b * bias
            mine = (lambda t: t.chunk(size)[rank]) if sequence_parallel else (lambda t: t)
            torch.testing.assert_close(column(mine(x)), h.chunk(size, -1)[rank])
            y = h @ weight + b[:HIDDEN] * bias
            torch.testing.assert_close(row(h.chunk(size, -1)[rank]), mine(y))


def basic_linears(rank: int, size: int) -> None:
    """BasicLinear and Bias by themselves, with the arguments that te.ops gives them."""
    options = dict(dtype=torch.float64, tensor_parallel_group=dist.group.WORLD)
    for sequence_parallel in (False, True):
        split = options | dict(sequence_parallel=sequence_parallel)
        module = og.Sequential(
            BasicLinear(HIDDEN, FFN, tensor_parallel_mode="column", **split),
            Bias(size=FFN, tensor_parallel=True, **options),
            BasicLinear(FFN, HIDDEN, tensor_parallel_mode="row", **split),
        )
        whole = {
            "0.weight": noise("w", (FFN, HIDDEN)), "1.bias": noise("b", (FFN,)),
            "2.weight": noise("v", (HIDDEN, FFN)),
        }  # fmt: skip
        module.load_state_dict(og.parallel.shard_state_dict(whole, module))
        assert module[1].bias.shape == (FFN // size,)
        written = {"0.basic_ops.0.weight": whole["0.weight"], "0._extra_state": None} | {
            k: v for k, v in whole.items() if k != "0.weight"
        }  # as te.ops writes a Linear's
        again = og.parallel.shard_state_dict(written, module)
        assert torch.equal(again["0.basic_ops.0.weight"], module[0].weight)
        module.load_state_dict(again)
        gathered = og.parallel.gather_state_dict(module)
        assert all(torch.equal(gathered[name], value) for name, value in whole.items())
        x = noise("x", (2 * size, 3, HIDDEN)).requires_grad_()
        mine = (lambda t: t.chunk(size)[rank]) if sequence_parallel else (lambda t: t)
        expected = (x @ whole["0.weight"].t() + whole["1.bias"]) @ whole["2.weight"].t()
        y, dy = module(mine(x)), noise("dy", expected.shape)
        torch.testing.assert_close(y, mine(expected))
        (found,) = torch.autograd.grad(y, x, mine(dy))
        (dx,) = torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(mine(found), mine(dx))


def without_the_exchange(rank: int, size: int) -> None:
    """set_parallel_mode=False: sizes are shares, and sums over ranks are the caller's."""
    case = Case(bias=True, return_bias=True)
    mlp = make(case, rank, size, set_parallel_mode=False)
    assert "All" not in str(mlp.plan())
    x = noise("x", SHAPE)
    total = summed(named(case, mlp(x))["out"].detach())
    torch.testing.assert_close(total, expected(case, size)[0]["out"].detach())


def errors(rank: int, size: int) -> None:
    group = dist.group.WORLD

    def fails(kind: Any, message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(og.OpsgraphError, match=message):
            kind(*args, **options)

    mlp = og.LayerNormMLP
    fails(mlp, "tp_size 4 and a tp_group of 2 ranks, expected tp_size 2", 8, 16, tp_size=4,
          tp_group=group)  # fmt: skip
    fails(mlp, "ffn_hidden_size 15, expected a multiple of tp_size 2", 8, 15, tp_group=group)
    fails(mlp, "ub_bulk_wgrad without sequence par", 8, 16, tp_group=group, ub_bulk_wgrad=True)
    fails(Linear, "Linear: got out_features 7, expected a multiple of 2, for the ranks", 4, 7,
          tensor_parallel_mode="column")  # fmt: skip
    fails(Linear, "Linear: got in_features 7", 7, 4, tensor_parallel_mode="row")
    fails(Linear, "tensor_parallel_mode='both', expected None, 'column' or 'row'", 4, 4,
          tensor_parallel_mode="both")  # fmt: skip
    fails(Linear, "symmetric_ar_type='ring', expected None, 'multimem", 4, 4,
          symmetric_ar_type="ring")  # fmt: skip
    with pytest.raises(og.OpsgraphError, match="tp_size 2 and a tp_group of 1 ranks"):
        make(Case(), rank, size).set_tensor_parallel_group(
            dist.new_group([rank], use_local_synchronization=True)
        )
    layer = og.Sequential(LayerNorm(8), Linear(8, 8, tensor_parallel_mode="row"))
    with pytest.raises(og.OpError, match=r"1:Linear: got input width 8, expected 4"):
        layer(torch.randn(2, 8))
    uneven = make(Case(True), rank, size)
    with pytest.raises(og.OpsgraphError, match=r"input dtype torch\.float32"):
        uneven(torch.randn(3, 2, HIDDEN))
    interleaved = mlp(8, 6, tp_group=group, activation="swiglu", device="cpu",
                      activation_params={"glu_interleave_size": 2})  # fmt: skip
    assert interleaved.fc1_weight.partition_stride == 1
    with pytest.raises(og.OpError, match=r"SwiGLU: got input width 6, expected a multiple of 4"):
        interleaved(torch.randn(2, 8))


BODIES = (gradients, compiled, dtypes, attributes, initial_weights, linears, basic_linears,
          without_the_exchange, errors)  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_on_two_ranks(ranks: Ranks, body: Any) -> None:
    ranks.run(body, 2, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES[:-1], ids=lambda body: body.__name__)
def test_on_four_ranks(ranks: Ranks, body: Any) -> None:
    ranks.run(body, 4, timeout=300)
