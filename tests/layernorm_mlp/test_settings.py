"""LayerNormMLP's arguments, set later, and its parameters, taken away and put back."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def mlp(**options: Any) -> og.LayerNormMLP:
    torch.manual_seed(0)
    made = og.LayerNormMLP(8, 12, device="cpu", **options)
    with torch.no_grad():
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return made


def flat(result: Any) -> list[Tensor | None]:
    return list(result) if isinstance(result, tuple) else [result]


LATER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eps": ({}, {"eps": 0.5}),
    "eps of RMSNorm": ({"normalization": "RMSNorm"}, {"eps": 0.5}),
    "zero_centered_gamma": ({}, {"zero_centered_gamma": True}),
    "activation": ({}, {"activation": "srelu"}),
    "activation, gated": ({"activation": "swiglu"}, {"activation": "geglu"}),
    "activation_params": (
        {"activation": "clamped_swiglu"},
        {"activation_params": {"limit": 0.5, "alpha": 1.0}},
    ),
    "return_bias": ({}, {"return_bias": True}),
    "return_layernorm_output": ({}, {"return_layernorm_output": True}),
    "double_backward": ({}, {"double_backward": True}),
    "both": ({}, {"return_bias": True, "return_layernorm_output": True}),
    "checkpoint": ({}, {"checkpoint": True}),
    "no more": ({"return_bias": True, "checkpoint": True}, {"return_bias": False}),
}


@pytest.mark.parametrize("first, later", LATER.values(), ids=LATER)
@pytest.mark.parametrize("used", [False, True])
def test_what_is_set_later_is_as_if_it_had_been_given(first: Any, later: Any, used: bool) -> None:
    module, expected = mlp(**first), mlp(**{**first, **later})
    expected.load_state_dict(module.state_dict())
    if used:
        module(X)
    for name, value in later.items():
        setattr(module, name, value)
        assert getattr(module, name) == value
    for ours, theirs in zip(flat(module(X)), flat(expected(X)), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    flat(module(X))[0].sum().backward()  # type: ignore[union-attr]
    flat(expected(X))[0].sum().backward()  # type: ignore[union-attr]
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    assert module.plan().saved == expected.plan().saved


def test_delayed_weight_gradients_may_be_asked_for_later_and_stay_queued() -> None:
    module, plain = mlp(), mlp()
    module(X)
    module.delay_wgrad_compute = True
    module(X).sum().backward()
    plain(X).sum().backward()
    assert module.fc1_weight.grad is None
    module.eps = module.eps
    module.delay_wgrad_compute = True
    module.backward_dw()
    torch.testing.assert_close(module.fc1_weight.grad, plain.fc1_weight.grad, rtol=0, atol=0)


def test_main_grad_may_be_asked_for_later() -> None:
    module, plain = mlp(), mlp()
    module(X)
    module.fuse_wgrad_accumulation = True
    for weight in (module.fc1_weight, module.fc2_weight):
        weight.main_grad = torch.zeros_like(weight)
    module(X).sum().backward()
    plain(X).sum().backward()
    torch.testing.assert_close(module.fc1_weight.main_grad, plain.fc1_weight.grad)


WRONG: list[tuple[str, Any, str]] = [
    ("hidden_size", 16, "got hidden_size after construction, expected another module"),
    ("ffn_hidden_size", 16, "got ffn_hidden_size after construction, expected another module"),
    ("tp_size", 2, "got tp_size after construction, expected another module"),
    ("bias", False, "expected fc1_bias and fc2_bias set to parameters, or to None"),
    ("use_bias", False, "expected fc1_bias and fc2_bias set to parameters, or to None"),
    ("params_dtype", torch.bfloat16, r"expected module.to\(dtype\)"),
    ("device", "meta", r"expected module.to\(device\)"),
    ("activation", "swigloo", "got activation 'swigloo', expected one of gelu"),
    ("normalization", "BatchNorm", "got normalization 'BatchNorm', expected one of LayerNorm"),
    ("normalization", "RMSNorm", "expected layer_norm_bias = None"),
    ("activation_params", {"limit": 1.0}, "activation_params 'limit' for 'gelu'"),
    ("eps", "1e-5", "got eps='1e-5', expected a finite number"),
    ("eps", None, "got eps=None, expected a finite number"),
    ("return_bias", "no", "got return_bias='no', expected True or False"),
    ("checkpoint", None, "got checkpoint=None, expected True or False"),
    ("ub_overlap_ag", True, "got ub_overlap_ag without sequence parallelism"),
    ("symmetric_ar_type", "three_shot", "got symmetric_ar_type 'three_shot', expected one of"),
]


@pytest.mark.parametrize("name, value, message", WRONG, ids=[f"{n} {v}" for n, v, _ in WRONG])
def test_what_cannot_be_set_later_is_an_error_that_changes_nothing(
    name: str, value: Any, message: str
) -> None:
    module = mlp()
    y, before = module(X), repr(module)
    with pytest.raises(og.OpsgraphError, match=message):
        setattr(module, name, value)
    assert repr(module) == before
    torch.testing.assert_close(module(X), y, rtol=0, atol=0)


def test_another_activation_wants_another_weight() -> None:
    module = mlp()
    module(X)
    module.activation = "swiglu"
    with pytest.raises(og.OpError, match=r"fc1_weight of shape \(12, 8\), expected \(24, 8\)"):
        module(X)
    module.fc1_weight = nn.Parameter(torch.randn(24, 8))
    module.fc1_bias = nn.Parameter(torch.randn(24))
    expected = mlp(activation="swiglu")
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(X), expected(X), rtol=0, atol=0)


def formula(m: og.LayerNormMLP, x: Tensor) -> Tensor:
    """The module's formula with the parameters that it has."""
    h = nn.functional.layer_norm(x, (8,), m.layer_norm_weight, m.layer_norm_bias, m.eps or 0.0)
    h = nn.functional.gelu(nn.functional.linear(h, m.fc1_weight, m.fc1_bias), approximate="tanh")
    return nn.functional.linear(h, m.fc2_weight, m.fc2_bias)


def by_dict(module: nn.Module, name: str, value: Any) -> None:
    module._parameters[name] = value


@pytest.mark.parametrize("put", [setattr, by_dict, nn.Module.register_parameter])
@pytest.mark.parametrize("bias", [False, True])
def test_biases_come_and_go(put: Any, bias: bool) -> None:
    module = mlp(bias=bias)
    for name, shape in {"fc1_bias": 12, "fc2_bias": 8, "layer_norm_bias": 8}.items():
        for value in (None, nn.Parameter(torch.randn(shape)), None):
            module(X)
            put(module, name, value)
            torch.testing.assert_close(module(X), formula(module, X))
    module.fc1_bias = nn.Parameter(torch.randn(12))
    module(X).sum().backward()
    assert module.fc1_bias.grad is not None


def test_parameters_that_are_set_later_are_marked_as_those_before() -> None:
    module = mlp(delay_wgrad_compute=True)
    before = {name: vars(parameter).copy() for name, parameter in module.named_parameters()}
    assert before["fc1_weight"]["tensor_model_parallel"]
    assert before["fc1_weight"]["skip_backward_post_hook"]
    for name, parameter in module.named_parameters():
        setattr(module, name, nn.Parameter(torch.randn_like(parameter)))
    assert {name: vars(parameter) for name, parameter in module.named_parameters()} == before


def test_an_rmsnorm_takes_no_bias() -> None:
    module = mlp(normalization="RMSNorm")
    module(X)
    module.layer_norm_bias = nn.Parameter(torch.randn(8))
    with pytest.raises(og.PlanError, match=r"RMSNorm: parameters \['bias'\] are not arguments"):
        module(X)


@pytest.mark.parametrize("name", ["layer_norm_weight", "layer_norm_bias", "fc1_bias", "fc2_weight"])
def test_a_parameter_of_another_shape_is_named_as_the_user_knows_it(name: str) -> None:
    module = mlp()
    module(X)
    module.get_parameter(name).data = torch.ones(3)
    with pytest.raises(og.OpError, match=rf"got {name} of shape \(3,\), expected \("):
        module(X)


# -- copies --


def replica(module: nn.Module) -> Any:
    made = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.detach().clone())
    return made


COPIES: dict[str, Callable[[Any], Any]] = {
    "replica": replica,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_copies_compute_with_their_own_parameters(duplicate: Any, used: bool) -> None:
    module = mlp()
    y = formula(module, X)
    if used:
        module(X)
    other = duplicate(module)
    torch.testing.assert_close(other(X), y)
    doubled = 2 * other.fc1_weight.detach()
    other.fc1_weight = doubled if duplicate is replica else nn.Parameter(doubled)
    torch.testing.assert_close(other(X), formula(other, X))
    torch.testing.assert_close(module(X), y)


def test_a_copy_may_be_set_otherwise() -> None:
    module = mlp()
    module(X)
    other = copy.copy(module)
    other.return_bias = True
    assert isinstance(other(X), tuple)
    assert isinstance(module(X), Tensor)


# -- where it is made --


def test_it_is_made_on_the_default_device() -> None:
    with torch.device("meta"):
        assert og.LayerNormMLP(8, 12).fc1_weight.is_meta
        assert og.LayerNormMLP(8, 12, device="cpu").fc1_weight.is_cpu
    torch.set_default_device("meta")
    try:
        assert og.LayerNormMLP(8, 12).fc1_bias.is_meta
    finally:
        torch.set_default_device(None)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert og.LayerNormMLP(8, 12).fc1_weight.device.type == expected
    with torch.device("cpu"):
        assert og.LayerNormMLP(8, 12).fc1_weight.is_cpu


def test_compiled_modules_see_what_is_set_later() -> None:
    module = mlp()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), formula(module, X))
    module.eps = 0.5
    torch.testing.assert_close(compiled(X), formula(module, X))
    module.fc1_bias = None
    torch.testing.assert_close(compiled(X), formula(module, X))
    module.return_bias = True
    assert isinstance(compiled(X), tuple)
