"""With PyTorch's own parallelism: DTensor parameters, DDP, FSDP2, device meshes, checkpoints."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_parallel_mlp import (
    CASES,
    FFN,
    HIDDEN,
    NORM,
    SHAPE,
    Case,
    expected,
    local_gradients,
    make,
    named,
    noise,
    parameters,
    rows,
    share,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import opsgraph as og
from opsgraph.ops import GELU, LayerNorm, Linear, Residual, RMSNorm, SwiGLU
from opsgraph.parallel import TensorParallel, gather_state_dict
from opsgraph.testing.distributed import Ranks
from tests.layernorm_mlp.test_module import Setting, formula

ROWS = 16
PLAIN, GATED = Case(normalization="LayerNorm"), Case(activation="swiglu")
KEYS = {"0.weight": "layer_norm_weight", "0.bias": "layer_norm_bias"} | {
    f"{k}.{kind}": f"{fc}_{kind}" for k, fc in (("1", "fc1"), ("3", "fc2")) for kind in
    ("weight", "bias")
}  # fmt: skip


def reference(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the mean of squares over all rows, by formula and autograd."""
    p = {name: value.requires_grad_() for name, value in parameters(case).items()}
    x = noise("x", (ROWS, HIDDEN)).requires_grad_()
    y = formula(Setting(case.normalization, case.activation), x, p, {})[0] + p["fc2_bias"]
    leaves = {"x": x, **p}
    grads = torch.autograd.grad(y.square().mean(), list(leaves.values()))
    return y.detach(), dict(zip(leaves, grads, strict=True))


def sequence(case: Case) -> og.Sequential:
    """The same in ops, whole."""
    gated = case.activation == "swiglu"
    made = og.Sequential(
        LayerNorm(HIDDEN) if case.normalization == "LayerNorm" else RMSNorm(HIDDEN),
        Linear(HIDDEN, FFN * (1 + gated)),
        SwiGLU() if gated else GELU(),
        Linear(FFN, HIDDEN),
        dtype=torch.float64,
    )
    full = parameters(case)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(full[KEYS[name]])
    return made


def whole_mlp(case: Case) -> og.LayerNormMLP:
    mlp = og.LayerNormMLP(
        HIDDEN, FFN, params_dtype=torch.float64, device="cpu",
        normalization=case.normalization, activation=case.activation,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            parameter.copy_(parameters(case)[name])
    return mlp


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def whole(gradient: Tensor, shape: Any) -> Tensor:
    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradient.reshape(shape)


def dtensors(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for case in (PLAIN, GATED):
        y, gradients = reference(case)
        for build in (sequence, whole_mlp):
            for sequence_parallel in (False, True):
                module: Any = build(case)
                style = TensorParallel(sequence_parallel=sequence_parallel)
                parallelize_module(module, mesh, style)
                assert all(isinstance(p, DTensor) for p in module.parameters())
                pick: Callable[[Tensor], Tensor] = (
                    (lambda t: t.chunk(size)[rank]) if sequence_parallel else (lambda t: t)
                )
                x = pick(noise("x", (ROWS, HIDDEN))).requires_grad_()
                out = module(x)
                what = f"{case} {build.__name__} {sequence_parallel}"
                close(out.detach(), pick(y), what)
                out.square().sum().div(y.numel()).backward()
                close(x.grad, pick(gradients["x"]), f"{what} dx")
                for name, parameter in module.named_parameters():
                    right = gradients[KEYS.get(name, name)]
                    assert parameter.grad.placements == parameter.placements
                    close(whole(parameter.grad, right.shape), right, f"{what} d {name}")
                full = gather_state_dict(module)
                for name, value in build(case).state_dict().items():
                    assert torch.equal(full[name], value), name
                optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
                optimizer.step()
                module(x.detach())


def compiled_dtensors(rank: int, size: int) -> None:
    """Full graphs, two for any number of rows; gradients as in eager mode, DTensors."""
    mesh = init_device_mesh("cpu", (size,))
    for sequence_parallel in (False, True):
        torch.compiler.reset()
        module: Any = sequence(GATED)
        parallelize_module(module, mesh, TensorParallel(sequence_parallel=sequence_parallel))
        counter = CompileCounterWithBackend("aot_eager")
        fast = torch.compile(module, fullgraph=True, backend=counter)
        for seq in (2, 4, 6, 10):
            x = noise("x", (seq, 3, HIDDEN)).requires_grad_()
            results = []
            for run in (module, fast):
                leaves = [x, *module.parameters()]
                out = run(x)
                grads = torch.autograd.grad(out.square().sum(), leaves)
                results.append([out.detach(), *(whole(g, g.shape) for g in grads)])
            for one, other in zip(*results, strict=True):
                close(other, one, f"{seq} rows, sequence_parallel={sequence_parallel}")
        assert counter.frame_count == 2


def style_errors(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))

    def fails(module: nn.Module, message: str) -> None:
        with pytest.raises(og.OpsgraphError, match=message):
            parallelize_module(module, mesh, TensorParallel())

    fails(nn.Linear(4, 4), "got Linear, expected a Sequential or LayerNormMLP")
    fails(og.Sequential(Linear(4, 4)), "got 1 Linears, expected pairs")
    fails(og.Sequential(Linear(4, 4), RMSNorm(4), Linear(4, 4)), "RMSNorm between a column- and")
    fails(og.Sequential(Linear(4, 4), nn.Tanh(), Linear(4, 4)), "got Tanh in the sequence")
    fails(og.Sequential(Linear(4, 6), SwiGLU(), Linear(3, 4)), "out_features 6, .* multiple of 4")
    torch.manual_seed(0)
    nested = og.Sequential(Residual(RMSNorm(4), Linear(4, 8), SwiGLU(), Linear(4, 4)))
    x = torch.randn(3, 4)
    right = nested(x)
    parallelize_module(nested, mesh, TensorParallel())
    torch.testing.assert_close(nested(x), right)
    torch.testing.assert_close(copy.deepcopy(nested)(x), right)
    assert not hasattr(copy.deepcopy(nested)[0].ops[1].weight, "tensor_model_parallel")
    split = sequence(PLAIN)
    fully_shard(split)
    with pytest.raises(og.OpsgraphError, match="got weight as a DTensor placed"):
        split[1](noise("x", (2, HIDDEN)))


def data_and_tensor_parallel(rank: int, size: int) -> None:
    """DDP and FSDP2 over rows, tensor parallelism within: a mesh of 2 x size/2."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh["dp"], mesh["tp"]
    for case in (PLAIN, GATED):
        y, gradients = reference(case)
        for sequence_parallel in (False, True):
            for wrap in ("ddp", "fsdp", "fsdp, not resharded"):
                mlp = make(case._replace(sequence_parallel=sequence_parallel), tp.get_local_rank(),
                           tp.size(), tp)  # fmt: skip
                module: Any = mlp
                if wrap == "ddp":
                    module = DistributedDataParallel(mlp, process_group=dp.get_group())
                else:
                    fully_shard(mlp, mesh=dp, reshard_after_forward=wrap == "fsdp")

                def pick(t: Tensor, sequence_parallel: bool = sequence_parallel) -> Tensor:
                    t = t.chunk(2)[dp.get_local_rank()]
                    return t.chunk(tp.size())[tp.get_local_rank()] if sequence_parallel else t

                x = pick(noise("x", (ROWS, HIDDEN))).requires_grad_()
                what = f"{case} {sequence_parallel} {wrap}"
                out = module(x)
                close(out.detach(), pick(y), what)
                # The mean over a rank's data is half of the rows': dp averages the gradients.
                out.square().sum().mul(2 / y.numel()).backward()
                close(x.grad, 2 * pick(gradients["x"]), f"{what} dx")
                for name, parameter in mlp.named_parameters():
                    found = parameter.grad
                    found = found.full_tensor() if isinstance(found, DTensor) else found
                    if name in NORM and sequence_parallel:
                        dist.all_reduce(found, group=tp.get_group())
                    right = share(name, gradients[name], case, tp.get_local_rank(), tp.size())
                    close(found, right, f"{what} d {name}")


def compare_wrapped(case: Case, wrap: str, dp: Any, tp: Any) -> None:
    """Half of the batch on each rank of dp: outputs, and twice the averaged gradients."""
    rank, size = tp.get_local_rank(), tp.size()
    mlp = make(case, rank, size, tp)
    module: Any = mlp
    if wrap == "ddp":
        module = DistributedDataParallel(mlp, process_group=dp.get_group())
    else:
        fully_shard(mlp, mesh=dp)

    def half(t: Tensor) -> Tensor:
        return t.chunk(2, 1)[dp.get_local_rank()] if t.dim() > 1 else t

    outputs, right = expected(case, size)
    x = half(rows(noise("x", SHAPE), case, rank, size)).requires_grad_()
    found = named(case, module(x))
    what = f"{case} {wrap}"
    assert found.keys() == outputs.keys()
    close(found["out"].detach(), half(rows(outputs["out"].detach(), case, rank, size)), what)
    dys = [half(dy) for dy in local_gradients(case, outputs, rank, size)]
    torch.autograd.backward(list(found.values()), dys)
    close(x.grad, half(rows(right["x"], case, rank, size)), f"{what} dx")
    for name, parameter in mlp.named_parameters():
        if name not in right:
            continue
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if name in NORM and case.sequence_parallel:
            dist.all_reduce(gradient, group=tp.get_group())
        times = 1 if case.return_bias and name == "fc2_bias" else 2  # returned on both of dp
        wanted = share(name, right[name], case, rank, size)
        close(times * gradient, wanted, f"{what} d {name}")


def every_combination_wrapped(rank: int, size: int, step: int) -> None:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    for wrap in ("ddp", "fsdp"):
        for case in CASES[::step]:
            compare_wrapped(case, wrap, mesh["dp"], mesh["tp"])


def mixed_precision(rank: int, size: int) -> None:
    y, gradients = reference(GATED)
    for build in (sequence, whole_mlp):
        module: Any = build(GATED).float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(module, mp_policy=policy)
        x = noise("x", (ROWS, HIDDEN)).chunk(size)[rank].float()
        for _ in range(2):
            module.zero_grad()
            out = module(x)
            assert out.dtype == torch.bfloat16
            close(out.detach(), y.chunk(size)[rank], "out", 5e-2)
            out.float().square().mean().backward()
        for name, parameter in module.named_parameters():
            right = gradients[KEYS.get(name, name)]
            assert parameter.grad.dtype == torch.float32
            close(whole(parameter.grad, right.shape), right, name, 5e-2)


def fsdp_and_dtensors(rank: int, size: int) -> None:
    """FSDP2 over a module that `parallelize_module` has split: parameters on a mesh of two."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    for case in (PLAIN, GATED):
        y, gradients = reference(case)
        for build in (sequence, whole_mlp):
            module: Any = build(case)
            parallelize_module(module, mesh["tp"], TensorParallel(sequence_parallel=True))
            fully_shard(module, mesh=mesh["dp"])

            def pick(t: Tensor) -> Tensor:
                t = t.chunk(2)[mesh["dp"].get_local_rank()]
                return t.chunk(size // 2)[mesh["tp"].get_local_rank()]

            out = module(pick(noise("x", (ROWS, HIDDEN))))
            close(out.detach(), pick(y), f"{case} {build.__name__}")
            out.square().sum().mul(2 / y.numel()).backward()
            for name, parameter in module.named_parameters():
                right = gradients[KEYS.get(name, name)]
                close(whole(parameter.grad, right.shape), right, f"{case} d {name}")
            for name, value in gather_state_dict(module).items():
                assert torch.equal(value, build(case).state_dict()[name]), name


@pytest.mark.parametrize("size", [2, 4])
def test_dtensor_parameters(ranks: Ranks, size: int) -> None:
    ranks.run(dtensors, size, timeout=300)


def test_dtensors_under_compile(ranks: Ranks) -> None:
    ranks.run(compiled_dtensors, 2, timeout=300)


def test_what_the_style_refuses(ranks: Ranks) -> None:
    ranks.run(style_errors, 2, timeout=300)


def test_ddp_and_fsdp_with_tensor_parallelism(ranks: Ranks) -> None:
    ranks.run(data_and_tensor_parallel, 4, timeout=300)


def test_combinations_under_ddp_and_fsdp(ranks: Ranks) -> None:
    ranks.run(every_combination_wrapped, 4, 5, timeout=300)


@pytest.mark.slow
def test_every_combination_under_ddp_and_fsdp(ranks: Ranks) -> None:
    ranks.run(every_combination_wrapped, 4, 1, timeout=240)


def test_fsdp_mixed_precision(ranks: Ranks) -> None:
    ranks.run(mixed_precision, 2, timeout=300)


def test_fsdp_over_dtensors(ranks: Ranks) -> None:
    ranks.run(fsdp_and_dtensors, 4, timeout=300)
