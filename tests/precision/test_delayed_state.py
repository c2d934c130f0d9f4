"""When the state of delayed scaling is made, kept and started anew."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from recipe_cases import HIDDEN, RECIPES, example, mlp
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, Residual, SiLU
from opsgraph.parallel import distributed_state_dict, load_distributed_state_dict
from opsgraph.precision.delayed import Scaling
from opsgraph.recipe import DelayedScaling

D = DelayedScaling(amax_history_len=3)


def layernorm_mlp() -> og.LayerNormMLP:
    torch.manual_seed(0)
    return og.LayerNormMLP(HIDDEN, 128, device="cpu")


def linear() -> Linear:
    torch.manual_seed(0)
    return Linear(HIDDEN, 32)


def nested() -> nn.Module:
    torch.manual_seed(0)
    inner = og.Sequential(Linear(HIDDEN, HIDDEN), SiLU())
    return og.Sequential(Residual(Linear(HIDDEN, HIDDEN)), inner, layernorm_mlp())


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": linear,
    "LayerNormMLP": layernorm_mlp,
    "nested": nested,
    "in another": lambda: nn.ModuleDict({"mlp": mlp(torch.float32)}),
}


def call(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = (module["mlp"] if isinstance(module, nn.ModuleDict) else module)(x)
    return y


def step(module: nn.Module, recipe: og.recipe.Recipe, size: float = 1.0) -> list[Tensor]:
    module.zero_grad()
    x = (size * example(dtype=torch.float32)).requires_grad_()
    with og.autocast(recipe=recipe):
        y = call(module, x)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]


def states(module: nn.Module) -> dict[str, Scaling]:
    return {name: m for name, m in module.named_modules() if isinstance(m, Scaling)}


@pytest.mark.parametrize("name", MODULES)
def test_prepare_makes_what_the_first_call_would(name: str) -> None:
    prepared, called = MODULES[name](), MODULES[name]()
    assert not states(prepared)
    for _ in range(2):
        D.prepare(prepared)
    with torch.no_grad(), og.autocast(recipe=D):
        call(called, example(dtype=torch.float32))
    assert list(prepared.state_dict()) == list(called.state_dict())
    assert all(map(torch.equal, prepared.buffers(), called.buffers()))
    assert states(prepared)
    for recipe in RECIPES.values():
        plain = MODULES[name]()
        recipe.prepare(plain)
        assert bool(states(plain)) == isinstance(recipe, DelayedScaling)


@pytest.mark.parametrize("how", ["prepared", "inside the context", "distributed"])
@pytest.mark.parametrize("name", MODULES)
def test_a_checkpoint_of_torch_distributed_has_the_scales(
    name: str, how: str, tmp_path: Path
) -> None:
    """The fresh module goes on with the bits of the one that was saved."""
    ours = DelayedScaling(amax_history_len=4)
    theirs = replace(ours, reduce_amax=False)
    trained, fresh = MODULES[name](), MODULES[name]()
    for k in range(3):
        step(trained, ours, 1 + 3 * k)
    distributed = how == "distributed"
    saved = distributed_state_dict(trained) if distributed else trained.state_dict()
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    if how == "inside the context":
        with og.autocast(recipe=theirs):
            wanted = fresh.state_dict()
    else:
        theirs.prepare(fresh)
        wanted = distributed_state_dict(fresh) if distributed else fresh.state_dict()
    assert set(wanted) == set(saved)
    dcp.load(wanted, checkpoint_id=tmp_path, no_dist=True)
    if distributed:
        load_distributed_state_dict(fresh, wanted)
    else:
        fresh.load_state_dict(wanted)
    for _ in range(2):
        found, expected = step(fresh, theirs, 2.0), step(trained, ours, 2.0)
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, fresh.buffers(), trained.buffers()))


def test_a_distributed_state_dict_makes_the_state() -> None:
    trained, fresh = layernorm_mlp(), layernorm_mlp()
    step(trained, D)
    load_distributed_state_dict(fresh, distributed_state_dict(trained))
    assert all(map(torch.equal, fresh.buffers(), trained.buffers()))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_module_first_used_in_inference_mode_trains(name: str, first: Any) -> None:
    ours = DelayedScaling(amax_history_len=6)
    theirs = replace(ours, reduce_amax=False)
    module, plain = MODULES[name](), MODULES[name]()
    with first(), og.autocast(recipe=ours):
        call(module, example(dtype=torch.float32))
    for _ in range(2):
        found, expected = step(module, ours), step(plain, theirs)
        assert all(map(torch.equal, found, expected))
        with torch.inference_mode(), og.autocast(recipe=ours):
            call(module, example(dtype=torch.float32))
    assert not any(b.is_inference() for b in module.buffers())


@pytest.mark.parametrize("name", ["current", "delayed", "mx", "nvfp4", "blocks"])
def test_held_weights_run_in_inference_mode(name: str) -> None:
    recipe, x = RECIPES[name], example(dtype=torch.float32)
    with og.quantized_model_init(recipe=recipe):
        module = layernorm_mlp()
    for inside in (recipe, RECIPES["rows"], None):
        with og.autocast(enabled=inside is not None, recipe=inside):
            with torch.no_grad():
                expected = module(x)
            with torch.inference_mode():
                assert torch.equal(module(x), expected)
                assert torch.equal(module.fc1_weight.detach() + 0, module.fc1_weight + 0)
                copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step(module, recipe)
    optimizer.step()


@pytest.mark.parametrize("name", MODULES)
def test_a_plain_checkpoint_loads_and_scaling_starts_anew(name: str) -> None:
    module, fresh = MODULES[name](), MODULES[name]()
    ours = DelayedScaling(amax_history_len=8)
    theirs = replace(ours, reduce_amax=False)
    plain = copy.deepcopy(fresh.state_dict())
    for _ in range(2):
        step(module, ours)
    partial = {k: v for k, v in module.state_dict().items() if not k.endswith("amax_history")}
    module.load_state_dict(plain)
    found, expected = step(module, ours), step(fresh, theirs)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, module.buffers(), fresh.buffers()))
    other = MODULES[name]()
    other.load_state_dict(partial)
    for state in states(other).values():
        assert not state.amax_history.any()
        assert state.scale[0] != 1
    other.load_state_dict(module.state_dict())
    assert all(map(torch.equal, module.buffers(), other.buffers()))


def test_a_part_of_a_checkpoint_leaves_other_layers_alone() -> None:
    module = mlp(torch.float32)
    step(module, D)
    before = {name: b.clone() for name, b in module.named_buffers()}
    given = {k: v for k, v in module.state_dict().items() if k.startswith("3.")}
    given = {k: v for k, v in given.items() if "scaling" not in k}
    module.load_state_dict(given, strict=False)
    after = dict(module.named_buffers())
    assert torch.equal(after["1.scaling.scale"], before["1.scaling.scale"])
    assert after["3.scaling.scale"].tolist() == [1.0] * 3
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.weight"):
        module.load_state_dict({k: v for k, v in before.items() if "scaling" in k})


def test_a_meta_modules_state_is_filled_by_to_empty() -> None:
    module = og.LayerNormMLP(HIDDEN, 128, device="meta")
    D.prepare(module)
    module.to_empty(device="cpu")
    expected = layernorm_mlp()
    D.prepare(expected)
    assert all(map(torch.equal, module.buffers(), expected.buffers()))


# -- what is recorded --

SIZES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("name", MODULES)
def test_inference_moves_no_scale(name: str, mode: str) -> None:
    ours = DelayedScaling(amax_history_len=9)
    theirs = replace(ours, reduce_amax=False)
    module, plain = MODULES[name](), MODULES[name]()
    for k in range(3):
        found, expected = step(module, ours), step(plain, theirs)
        assert all(map(torch.equal, found, expected))
        with SIZES[mode](), og.autocast(recipe=ours):
            call(module, 1000.0 * (k + 1) * example(dtype=torch.float32))
        with og.autocast(recipe=ours), SIZES[mode]():
            call(module, 1000.0 * (k + 1) * example(dtype=torch.float32))
    for recipe in (ours, theirs):
        with og.autocast(recipe=recipe):
            pass  # takes up what the last backward saw
    assert all(map(torch.equal, module.buffers(), plain.buffers()))


@pytest.mark.parametrize("kind", ["eval", "frozen", "frozen weights"])
def test_calls_with_grad_are_recorded(kind: str) -> None:
    recipe = DelayedScaling(amax_history_len=10 + len(kind))
    module, x = Linear(HIDDEN, 32), torch.ones(4, HIDDEN)
    module.requires_grad_(kind == "eval").train(kind != "eval")
    x.requires_grad_(kind == "frozen weights")
    with og.autocast(recipe=recipe):
        module(x)
    expected = [448.0, 448 / float(module.weight.detach().abs().max())]
    assert module.get_submodule("scaling").scale[:2].tolist() == pytest.approx(expected)


def test_compiled_inference_moves_no_scale() -> None:
    torch.compiler.reset()
    recipe, module = DelayedScaling(amax_history_len=15), Linear(HIDDEN, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    scale = []
    for size, mode in ((1.0, torch.enable_grad), (1000.0, torch.no_grad), (1.0, torch.enable_grad)):
        with og.autocast(recipe=recipe), mode():
            compiled(torch.full((4, HIDDEN), size))
        scale.append(float(module.get_submodule("scaling").scale[0]))
    assert scale == [448.0] * 3
    torch.compiler.reset()


def test_compiled_modules_read_scales_that_others_wrote() -> None:
    """As torch.distributed.checkpoint does, which writes to a state dict's tensors."""
    torch.compiler.reset()
    recipe = DelayedScaling(amax_history_len=16)
    module, x = Linear(HIDDEN, 32), example(dtype=torch.float32)
    recipe.prepare(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 0.001, 3.0):
        module.state_dict()["scaling.scale"].fill_(scale)
        with torch.no_grad(), og.autocast(recipe=recipe):
            assert torch.equal(compiled(x), module(x))
    torch.compiler.reset()


# -- weights that a first microbatch keeps --


@pytest.mark.parametrize("fuse", [False, True])
def test_kept_weights_are_the_modules_alone(fuse: bool) -> None:
    recipe, x = RECIPES["current"], example(dtype=torch.float32)
    module = og.LayerNormMLP(HIDDEN, 128, device="cpu", fuse_wgrad_accumulation=fuse)
    for weight in (module.fc1_weight, module.fc2_weight):
        weight.main_grad = torch.zeros(weight.shape)
    with torch.inference_mode(), og.autocast(recipe=recipe):
        first = module(x, is_first_microbatch=True)
    before = dict(module.__dict__)
    with torch.no_grad():
        module.fc1_weight.mul_(2)
    with og.autocast(recipe=recipe):
        y = module(x.requires_grad_(), is_first_microbatch=False)
    assert torch.equal(y, first)
    y.sum().backward()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        file = io.BytesIO()
        torch.save(twin, file)
        assert twin.__dict__.keys() <= before.keys()
        with og.autocast(recipe=recipe), torch.no_grad():
            assert torch.equal(twin(x, is_first_microbatch=False), twin(x))
    module.to(torch.bfloat16)
    with og.autocast(recipe=recipe), torch.no_grad():
        moved = module(x.bfloat16(), is_first_microbatch=False)
        assert moved.dtype == torch.bfloat16
        assert float((moved - first).abs().max()) < 0.1 * float(first.abs().max())
        assert not torch.equal(moved, module(x.bfloat16()))


def test_kept_weights_serve_calls_that_need_less() -> None:
    """A training call keeps both copies, of which one without grad reads one."""
    recipe, x = RECIPES["mx"], example(dtype=torch.float32)
    module = layernorm_mlp()
    with og.autocast(recipe=recipe):
        first = module(x, is_first_microbatch=True)
        with torch.no_grad():
            module.fc1_weight.mul_(2)
            assert torch.equal(module(x, is_first_microbatch=False), first)


# -- going on --


def _trained(module: nn.Module, recipe: DelayedScaling, sizes: range) -> list[Tensor]:
    """What some steps of training gave."""
    found = list[Tensor]()
    for size in sizes:
        found += step(module, recipe, float(size))
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                found.append(parameter.grad.clone())
                parameter.sub_(parameter.grad * 1e-5)
    return found


def _loaded(name: str, state: dict[str, Any], **options: Any) -> nn.Module:
    made = MODULES[name]()
    made.load_state_dict({key: value.clone() for key, value in state.items()}, **options)
    return made


GOING_ON: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "load_state_dict": lambda name, module: _loaded(name, module.state_dict()),
    "assign": lambda name, module: _loaded(name, module.state_dict(), assign=True),
    "deepcopy": lambda name, module: copy.deepcopy(module),
    "pickle": lambda name, module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("how", GOING_ON)
@pytest.mark.parametrize("name", MODULES)
def test_copies_and_loaded_modules_go_on_with_the_same_bits(name: str, how: str) -> None:
    """Nobody prepares them: what the last backward saw still makes the next step's scale."""
    recipe = DelayedScaling(amax_history_len=31)
    module = MODULES[name]()
    _trained(module, recipe, range(1, 4))
    other = GOING_ON[how](name, module)
    assert all(map(torch.equal, *(_trained(m, recipe, range(4, 7)) for m in (module, other))))


def test_a_state_dict_made_inside_the_context_goes_on_with_the_same_bits() -> None:
    recipe, module = DelayedScaling(amax_history_len=32), linear()
    with og.autocast(recipe=recipe):
        y = module(5 * example(dtype=torch.float32))
        state = {key: value.clone() for key, value in module.state_dict().items()}
    del y
    other = _loaded("Linear", state)
    assert all(map(torch.equal, *(_trained(m, recipe, range(2, 4)) for m in (module, other))))


@pytest.mark.parametrize("nested", [False, True])
def test_another_delayed_recipe_has_scales_of_its_own_format(nested: bool) -> None:
    """Of a layer under several, of which another layer runs under one alone."""
    wide = DelayedScaling(3, og.recipe.Format.E5M2, amax_history_len=5)
    ours = DelayedScaling(amax_history_len=2)
    module, alone = mlp(torch.float32), mlp(torch.float32)
    x = example(dtype=torch.float32).requires_grad_()
    want = [alone(x), *torch.autograd.grad(alone(x).square().sum(), x)]
    for _ in range(3):
        with og.autocast(recipe=wide if nested else None, enabled=nested):
            for recipe in (wide, ours):
                step(module, recipe)
            step(alone, ours)
            found = step(module, ours)
            if nested:
                found = [module(x).detach(), *found[1:]]
    for got, right in zip(found[:2], want, strict=True):
        assert (got - right).norm() < 0.15 * right.norm()
    assert module.state_dict()["1.scaling.amax_history"].size(0) == (5 if nested else 2)


def test_a_recipe_that_comes_back_finds_its_scales() -> None:
    """Formats and margins differ by powers of two: the way back is exact."""
    ours = DelayedScaling(amax_history_len=6)
    wide = DelayedScaling(2, og.recipe.Format.E5M2, amax_history_len=6)
    module = linear()
    step(module, ours, 3.0)
    with og.autocast(recipe=ours):  # takes up what the backward saw
        pass
    kept = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad(), og.autocast(recipe=wide):
        module(example(dtype=torch.float32))
    scale = module.state_dict()["scaling.scale"].tolist()
    factors = [32, 32, 0.25]  # 57344 / 448 / 4, and 1 / 4
    assert scale == [s * f for s, f in zip(kept[0].tolist(), factors, strict=True)]
    with torch.no_grad(), og.autocast(recipe=ours):
        pass
    assert all(map(torch.equal, kept, module.buffers()))


@pytest.mark.parametrize("made", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_assigned_state_is_the_layers_own(dtype: torch.dtype, made: Callable[[], Any]) -> None:
    """In fp32, and what training changes is not the caller's."""
    recipe, module, other = DelayedScaling(amax_history_len=33), linear(), linear()
    _trained(module, recipe, range(1, 3))
    state = module.state_dict()
    with made():
        state |= {key: value.to(dtype, copy=True) for key, value in state.items() if "scal" in key}
    kept = [value.clone() for value in state.values()]
    other.load_state_dict(state, assign=True)
    step(other, recipe)
    step(other, recipe)
    assert all(map(torch.equal, kept, state.values()))
    assert all(buffer.dtype == torch.float32 for buffer in other.buffers())
