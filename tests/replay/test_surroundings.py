"""Replays in PyTorch's hands: hooks, checkpoints, threads, transforms, modes, copies of modules.

What happens must be what happens with OPSGRAPH_REPLAY=0, bit by bit.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replays import ROWS, WIDTH, assert_same_bits, build, compare, is_native, leaves, random, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from opsgraph.base.errors import OpsgraphError
from opsgraph.kernels.cpu import build as library

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")

X = random(ROWS, WIDTH)


def restrided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "copies": (torch.clone, torch.clone),
    "other strides": (lambda t: t, restrided),
    "transposed": (lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t),
    "numpy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "another dtype": (lambda t: t, torch.Tensor.double),
    "less precise": (torch.Tensor.bfloat16, torch.Tensor.float),
    "an offset": (lambda t: t, lambda t: torch.cat((t[:1], t))[1:]),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("net", ["llama", "gpt"])
def test_saved_tensor_hooks(net: str, name: str) -> None:
    pack, unpack = HOOKS[name]

    def use(module: Any) -> Any:
        found = [step(module, X) for _ in range(3)]
        for k in range(3):
            with saved_tensors_hooks(pack, unpack):
                found.append(outcome(lambda k=k: step(module, X + k)))
            found.append(step(module, X + k))
        return found

    compare(lambda: build(net), use)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or what it says where it fails."""
    try:
        return call()
    except Exception as error:  # which one is compared
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("net", ["llama", "dropout"])
def test_checkpoints(net: str, reentrant: bool) -> None:
    def use(module: Any) -> Any:
        found: list[Any] = []
        for k in range(5):
            x = (X + k).requires_grad_()
            module.zero_grad()
            torch.manual_seed(k)
            y = checkpoint(module, x, use_reentrant=reentrant)
            y.backward(X)
            found.append(leaves([y, x.grad, *(p.grad for p in module.parameters())]))
        return found

    compare(lambda: build(net), use)


class Wrapped:
    """A module that is called in another way."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.parameters, self.call = module.parameters, call

    def __call__(self, x: Tensor) -> Any:
        return self.call(x)


def test_the_checkpoint_option() -> None:
    compare(
        lambda: build("llama", checkpoint=True),
        lambda m: [step(m, X + k) for k in range(5)],
    )


def test_a_backward_inside_a_backward() -> None:
    """Of the same module, so that a replay begins while one is under way around a hook."""

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
            ctx.module = module
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                y = ctx.module(x)
                return torch.autograd.grad(y, x, dy)[0], None

    def use(module: Any) -> Any:
        run = Wrapped(module, lambda x: module(Inner.apply(module(x), module)))
        return [step(run, X + k) for k in range(5)]

    module = compare(lambda: build("llama"), use)
    assert is_native(module.plan(True, X))


def test_two_threads_run_one_module() -> None:
    module = build("gpt")
    inputs = [random(rows, WIDTH, seed=rows) for rows in (3, 6, 9, 12)]
    expected = [leaves(step(build("gpt"), x)) for x in inputs]
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for k in range(40):
                which = (first + k // 3) % len(inputs)
                x = inputs[which].detach().requires_grad_()
                y = module(x)
                gradients = torch.autograd.grad(
                    y, [x, *module.parameters()], dys[which], allow_unused=True
                )
                assert_same_bits(leaves([y, *gradients]), expected[which])
        except BaseException as error:
            failures.append(error)

    dys = []
    for x in inputs:
        torch.manual_seed(2)  # as `step` draws it
        dys.append(torch.randn_like(x))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_under_torch_compile() -> None:
    def use(module: Any) -> Any:
        run = torch.compile(module, backend="aot_eager")
        return [step(Wrapped(module, run), X + k) for k in range(5)]

    compare(lambda: build("llama"), use)
    torch._dynamo.reset()


def test_transforms() -> None:
    """A transform in the middle of replays, and replays after it."""

    def use(module: Any) -> Any:
        parameters = dict(module.named_parameters())

        def loss(p: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(module, p, (x,)).square().sum()

        found: list[Any] = []
        for _ in range(3):
            found += [step(module, X) for _ in range(3)]
            found.append(torch.func.grad(loss)(parameters, X))
            found.append(outcome(lambda: torch.func.vmap(module)(X[None])))
        return found

    compare(lambda: build("llama", double_backward=True), use)
    compare(lambda: build("llama"), lambda m: [m(X) for _ in range(3)])


def test_transforms_of_a_module_that_replays() -> None:
    def use(module: Any) -> Any:
        found: list[Any] = []
        with torch.no_grad():
            for _ in range(3):
                found += [module(X) for _ in range(3)]
                found.append(outcome(lambda: torch.func.vmap(module)(X[None].expand(2, -1, -1))))
        for _ in range(3):
            found += [step(module, X) for _ in range(3)]
            found.append(outcome(lambda: torch.func.grad(lambda t: module(t).sum())(X)))
            found.append(outcome(lambda: batched(module)))
        return found

    compare(lambda: build("llama", backends=("cpu", "reference")), use)


def batched(module: Any) -> Any:
    """Two gradients at once."""
    x, dys = X.detach().requires_grad_(), random(2, ROWS, WIDTH)
    return torch.autograd.grad(module(x), x, dys, is_grads_batched=True)


class Counts(TorchDispatchMode):
    """Counts the products that it sees."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "mm" in str(func)
        return func(*args, **kwargs or {})


def test_dispatch_modes_see_what_is_done() -> None:
    def use(module: Any) -> Any:
        found: list[Any] = [step(module, X) for _ in range(4)]
        for _ in range(3):
            with Counts() as counts:
                found.append(step(module, X))
            found += [counts.products, step(module, X)]
        assert counts.products >= 6
        return found

    module = compare(lambda: build("llama"), use)
    assert is_native(module.plan(True, X))


def test_fake_tensors() -> None:
    module = build("llama")
    for _ in range(4):
        step(module, X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = module(mode.from_tensor(X))
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == X.shape
    assert_same_bits(leaves(step(module, X)), leaves(step(build("llama"), X)))


def test_autocast_on_and_off() -> None:
    def use(module: Any) -> Any:
        found = []
        for k in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=k // 3 % 2 == 1):
                found.append(step(module, X + k))
        return found

    compare(lambda: build("llama"), use)


def test_autocast_around_the_backward_alone() -> None:
    def use(module: Any) -> Any:
        found = []
        for k in range(6):
            x = (X + k).requires_grad_()
            y = module(x)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(torch.autograd.grad(y, [x, *module.parameters()], X))
        return found

    compare(lambda: build("gpt"), use)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_inference_mode_and_back(first: Callable[[], Any]) -> None:
    def use(module: Any) -> Any:
        found: list[Any] = []
        module.requires_grad_(False)
        for context in (first, torch.inference_mode, torch.no_grad, torch.enable_grad, first):
            for _ in range(3):
                with context():
                    y = module(X)
                    found += [y, y.is_inference(), y.requires_grad]
        module.requires_grad_()
        return [*found, [step(module, X) for _ in range(3)]]

    compare(lambda: build("llama"), use)


def again(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, again, copy.copy])
def test_copies_of_modules_that_replay(duplicate: Callable[[Any], Any]) -> None:
    module = build("llama")
    expected = [leaves(step(module, X)) for _ in range(4)]
    other = duplicate(module)
    for _ in range(4):
        assert_same_bits(leaves(step(other, X)), expected[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    changed = leaves(step(other, X))
    if duplicate is not copy.copy:
        assert_same_bits(leaves(step(module, X)), expected[0])
    assert not torch.equal(changed[0], expected[0][0])
    assert is_native(module.plan(True, X))
    assert is_native(other.plan(True, X))


def test_plans_may_be_copied() -> None:
    module = build("llama")
    for _ in range(3):
        step(module, X)
    plan = module.plan(True, X)
    assert str(copy.copy(plan)) == str(plan)


def test_a_parameter_whose_storage_was_freed_is_an_error() -> None:
    module = build("llama")
    for _ in range(3):
        step(module, X)
    parameter = next(p for p in module.parameters() if p.dim() == 2)
    storage, kept = parameter.untyped_storage(), parameter.detach().clone()
    storage.resize_(0)
    with pytest.raises(OpsgraphError, match="1:Linear: got a freed storage"):
        step(module, X)
    storage.resize_(kept.nbytes)
    parameter.data.copy_(kept)
    expected = build("llama")
    expected.load_state_dict(module.state_dict())
    assert_same_bits(step(module, X), step(expected, X))
