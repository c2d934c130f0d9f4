"""A module in PyTorch's hands: autograd, autocast, threads, checkpoints, parameters that change."""

import multiprocessing
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Case, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.ops import GELU, Dropout, LayerNorm, Linear, Residual, RMSNorm, SwiGLU, Tee

REFERENCE = ("reference",)


def modules() -> list[nn.Module]:
    return [Residual(RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6)), GELU(), Linear(6, 3)]


def mlp(**options: Any) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(*modules(), **options)


def gradients(module: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> Any:
    """Gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = (run or module)(x)
    return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# -- backward once, twice, and of the backward --


def test_backward_twice_over_one_graph() -> None:
    module, x = mlp(), torch.randn(5, 6, requires_grad=True)
    y, leaves = module(x), [x, *module.parameters()]
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert_equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), leaves)


def test_gradients_accumulate() -> None:
    module, x = mlp(), torch.randn(5, 6)
    for _ in range(2):
        module(x).square().sum().backward()
    for parameter, (_, once) in zip(
        module.parameters(), enumerate(gradients(module, x)[1:]), strict=True
    ):
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_called_twice_in_a_step() -> None:
    module, x = mlp(), torch.randn(5, 6)
    a, b = torch.randn(5, 6), torch.randn(7, 6)
    found = gradients(module, x, lambda x: module(x + a).sum() * module(b * x.sum()).sum())
    reference = mlp(double_backward=True)
    expected = gradients(
        reference, x, lambda x: reference(x + a).sum() * reference(b * x.sum()).sum()
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.double(), "gradient", rounded=True)


def test_saved_tensors_are_guarded_against_writing() -> None:
    module, x = mlp(), torch.randn(5, 6, requires_grad=True)
    hidden = x * 1
    y = module(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, GELU, SwiGLU, Dropout])
def test_hooks_of_saved_tensors_may_change_their_strides(kind: Callable[[], og.Op]) -> None:
    module, x = og.Sequential(Linear(6, 8), kind(), Linear(out_features=8)), torch.randn(5, 6)
    right = gradients(module, x)

    def doubled(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 1], -1)

    with torch.autograd.graph.saved_tensors_hooks(doubled, lambda both: both[..., 0]):
        found = gradients(module, x)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def test_a_derivative_of_the_backward_is_refused() -> None:
    module, x = mlp(), torch.randn(5, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="double_backward=True"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_double_backward() -> None:
    module = mlp(double_backward=True, dtype=torch.float64)
    other = og.Sequential(Tee(), LayerNorm(4), Dropout(0.0), SwiGLU(), double_backward=True)
    other.double()
    for tested, width in ((module, 6), (other, 4)):
        x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        names, weights = zip(*tested.named_parameters(), strict=True)

        def run(x: Tensor, *weights: Tensor, m: Any = tested, names: Any = names) -> Any:
            return torch.func.functional_call(m, dict(zip(names, weights, strict=True)), (x,))

        inputs = (x, *(w.detach().requires_grad_() for w in weights))
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_gradcheck_of_the_planned_backward() -> None:
    module = mlp(dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_what_a_finished_transform_has_left_stands_for_a_tensor() -> None:
    module, x, left = mlp(), torch.randn(5, 6), list[Tensor]()
    torch.func.grad(lambda t: left.append(t) or t.sum())(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(module(left[0]), module(x))


def test_anomaly_mode_and_hooks_on_the_module() -> None:
    module, x, seen = mlp(), torch.randn(5, 6), []
    module.register_forward_hook(lambda m, inputs, y: seen.append(tuple(y.shape)))
    module.register_full_backward_hook(lambda m, dx, dy: seen.append(tuple(dy[0].shape)))
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        gradients(module, x)
    assert seen == [(5, 3), (5, 3)]


# -- modes --


def test_no_grad_and_inference_mode() -> None:
    module, x = mlp(), torch.randn(5, 6, requires_grad=True)
    expected = module(x)
    with torch.no_grad():
        quiet = module(x)
    with torch.inference_mode():
        inferred = module(x)
    for y in (quiet, inferred):
        assert not y.requires_grad
        torch.testing.assert_close(y, expected.detach())
    assert inferred.is_inference()
    assert module(x).requires_grad, "the mode must be part of the key"


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(compute: torch.dtype, inside: bool) -> None:
    case = Case(modules, (5, 6))
    wide = case.expected()
    x = case.x.detach().requires_grad_()
    case.module(x)  # planned without autocast
    with torch.autocast("cpu", compute):
        y = case.module(x)
        plan = case.module.plan(x=x)
        if inside:
            y.backward(case.dys[0].to(compute))
    if not inside:
        y.backward(case.dys[0].to(compute))
    assert y.dtype == compute
    assert f".to({compute})" in plan.forward_source
    found = {"y": y, "d x": x.grad}
    found |= {f"d {name}": p.grad for name, p in case.module.named_parameters()}
    for name, value in found.items():
        assert value.dtype == (compute if name == "y" else torch.float32), name
        # The chain has seven roundings; a sum of cancelling ones keeps the largest's error.
        limit = 16 * torch.finfo(compute).eps * float(wide[name].abs().max())
        torch.testing.assert_close(
            value.double(), wide[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert case.module(x).dtype == torch.float32


def test_norm_weights_are_not_cast_by_autocast() -> None:
    torch.manual_seed(0)
    module = og.Sequential(RMSNorm(64), Linear(64, 64, bias=False), backends=REFERENCE)
    module[0].weight.data = 1 + torch.randn(64) * 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        source = module.plan().forward_source
        assert "weight1 = weight1_stored.to(torch.bfloat16)" in source
    assert "weight0 = weight0.to" not in source


def test_autocast_leaves_fp64_alone() -> None:
    """As PyTorch's does: a user who asked for fp64 gets it."""
    case = Case(modules, (5, 6), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        case.check(rounded=True)


# -- parameters and attributes that change --


@pytest.mark.parametrize("training", [True, False])
def test_replaced_parameters_are_seen(training: bool) -> None:
    module, x = mlp(), torch.randn(5, 6)
    with torch.set_grad_enabled(training):
        before = module(x)
        module[2].weight = nn.Parameter(module[2].weight.detach() * 2)
        module[2].bias = nn.Parameter(module[2].bias.detach() * 2)
        torch.testing.assert_close(module(x), 2 * before)
        module[2].weight.data = module[2].weight.data / 2
        module[2].bias.data = module[2].bias.data / 2
        torch.testing.assert_close(module(x), before)


def test_a_bias_removed_or_added_is_seen() -> None:
    torch.manual_seed(0)
    module, x = og.Sequential(Linear(6, 3)), torch.randn(5, 6)
    module(x)
    bias, module[0].bias = module[0].bias, None
    torch.testing.assert_close(module(x), x @ module[0].weight.t())
    module[0].bias = bias
    torch.testing.assert_close(module(x), x @ module[0].weight.t() + bias)


def test_parametrized_weights() -> None:
    module, x = mlp(), torch.randn(5, 6)
    module(x)
    nn.utils.parametrizations.weight_norm(module[2])
    with torch.no_grad():
        module[2].parametrizations.weight.original0.mul_(3)
    y = module(x)
    inner = module[:2](x)
    torch.testing.assert_close(y, inner @ module[2].weight.t() + module[2].bias)
    y.sum().backward()
    assert module[2].parametrizations.weight.original1.grad is not None


def test_tied_weights() -> None:
    torch.manual_seed(0)
    module = og.Sequential(Linear(4, 4), GELU(), Linear(4, 4, bias=False))
    module[2].weight = module[0].weight
    x = torch.randn(5, 4)
    weight, bias = (p.detach().double().requires_grad_() for p in module.parameters())
    hidden = nn.functional.gelu(x.double() @ weight.t() + bias, approximate="tanh")
    (hidden @ weight.t()).square().sum().backward()
    module(x).square().sum().backward()
    assert len(list(module.parameters())) == 2
    for parameter, expected in zip(module.parameters(), (weight.grad, bias.grad), strict=True):
        assert_close(parameter.grad, expected, "gradient", rounded=True)


def test_freezing_and_thawing_between_calls() -> None:
    module, x = mlp(), torch.randn(5, 6)
    expected = gradients(module, x)[1:]
    names = [name for name, _ in module.named_parameters()]
    for frozen in (["0.ops.1.weight"], [names[0], names[-1]], names[:-1], []):
        module.zero_grad()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        module(x).square().sum().backward()
        for (name, parameter), gradient in zip(module.named_parameters(), expected, strict=True):
            assert (parameter.grad is None) == (name in frozen), name
            if name not in frozen:
                assert_close(parameter.grad, gradient.double(), name, rounded=True)
    module.requires_grad_(False)
    assert not module(x).requires_grad


def test_an_attribute_changed_after_planning_is_seen() -> None:
    module, x = og.Sequential(RMSNorm(4, eps=0.0), Dropout(0.0)), torch.randn(5, 4)
    first = module(x)
    module[0].eps = 10.0
    expected = x / (x.square().mean(-1, keepdim=True) + 10).sqrt()
    torch.testing.assert_close(module(x), expected)
    module[0].eps = 0.0
    torch.testing.assert_close(module(x), first)
    module[1].p = 1.0
    assert not module(x).any()
    assert torch.equal(module.eval()(x), first)


# -- threads --


def test_two_threads_run_one_module() -> None:
    module = mlp()
    inputs = [torch.randn(rows, 6) for rows in (3, 4, 5, 6)]
    expected = [gradients(mlp(double_backward=True), x) for x in inputs]
    found: dict[int, Any] = {}
    start = threading.Barrier(len(inputs))

    def work(k: int) -> None:
        start.wait()  # all plan at once
        for _ in range(20):
            found[k] = gradients(module, inputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, results in enumerate(expected):
        for one, other in zip(found[k], results, strict=True):
            assert_close(one, other.double(), "gradient", rounded=True)


def test_backward_in_another_thread() -> None:
    module, x = mlp(), torch.randn(5, 6)
    y = module(x)
    thread = threading.Thread(target=lambda: y.square().sum().backward())
    thread.start()
    thread.join()
    assert_equal([p.grad for p in module.parameters()], gradients(module, x)[1:])


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_the_default_device_is_not_where_results_go(norm: type[og.Op]) -> None:
    torch.manual_seed(0)
    module = og.Sequential(norm(6), Linear(6, 8), SwiGLU(), Linear(4, 6))
    x, dy = torch.randn(5, 6), torch.randn(5, 6)

    def run() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy)]

    expected = run()
    with torch.device("meta"):
        found = run()
    assert_equal(found, expected)


def test_a_forked_process_uses_and_makes_plans() -> None:
    context = multiprocessing.get_context("fork")
    module, x, results = mlp(), torch.randn(5, 6), context.SimpleQueue()
    expected = [module(x).detach(), module(x[None]).detach()]

    def work() -> None:
        with torch.no_grad():  # a key that the parent has not planned
            results.put([module(x).tolist(), module(x[None]).tolist()])

    process = context.Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    for found, right in zip(results.get(), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), right)


# -- checkpoints --


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    module, x = mlp(), torch.randn(5, 6)
    module.insert(1, Dropout(0.5))
    expected = gradients(module, x)
    found = []
    for parameter in module.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    assert_equal(found, expected)


def test_forty_layers() -> None:
    torch.manual_seed(0)
    layers = [og.Sequential(Residual(RMSNorm(6), Linear(6, 6))) for _ in range(40)]
    nested = og.Sequential(*layers)
    one = og.Sequential(*(op for layer in layers for op in layer))
    x = torch.randn(3, 6)
    assert_equal([nested(x)], [one(x)])
    for a, b in zip(gradients(nested, x), gradients(one, x), strict=True):
        assert_close(a, b.double(), "gradient", rounded=True)


@pytest.mark.parametrize("retain", [False, True])
def test_a_saved_value_dies_after_its_last_use_unless_the_graph_is_retained(retain: bool) -> None:
    alive: list[bool] = []
    seen: list[weakref.ref[Tensor]] = []

    class Keeps(og.Op):
        """x / 2, which saves a value of its own."""

        saves = ("half",)

        def fwd(self, x):
            half = x / 2
            return half.clone(), (half,)

        def bwd(self, dy, half):
            seen.append(weakref.ref(half))
            return dy / 2, ()

    class Looks(og.Op):
        """The identity, whose backward looks whether the value of the op after it still lives."""

        def fwd(self, x):
            return x * 1, ()

        def bwd(self, dy):
            alive.append(seen[-1]() is not None)
            return dy * 1, ()

    x = torch.randn(3, 4, requires_grad=True)
    y = og.Sequential(Looks(), Keeps())(x)
    y.sum().backward(retain_graph=retain)
    assert alive == [retain]
    if retain:
        y.sum().backward()
        assert alive == [True, False]
        torch.testing.assert_close(x.grad, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()
