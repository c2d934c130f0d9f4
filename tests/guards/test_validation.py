"""Arguments of ops: what is taken, and what is an error when it is set later.

`tests/bad_input` has what constructors refuse.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import opsgraph as og
from opsgraph import ops

NAN, INF = float("nan"), float("inf")


def test_numbers_of_numpy_and_tensors_of_one_element_are_numbers() -> None:
    x = torch.randn(3, 8)
    for two in (2, 2.0, np.float32(2), np.int64(2), np.array([2.0]), torch.tensor(2.0),
                torch.tensor([2], dtype=torch.int32)):  # fmt: skip
        op = ops.ConstantScale(two)
        assert type(op.scale) is float
        torch.testing.assert_close(op(x), 2 * x)
    for eight in (np.int64(8), torch.tensor(8), (np.int32(8),), torch.Size([8])):
        assert ops.RMSNorm(eight)(x).shape == x.shape
        assert type(ops.RMSNorm(eight).width) is int
    assert type(ops.Linear(np.int64(8), torch.tensor(4)).in_features) is int
    assert ops.Dropout(torch.tensor([0.25])).p == 0.25
    assert ops.SwiGLU(np.int64(2)).glu_interleave_size == 2
    assert ops.LayerNorm(8, np.float64(1e-3), bias=np.bool_(False)).bias is None
    torch.testing.assert_close(ops.SiTUGLU(np.float32(4))(x), ops.SiTUGLU(4)(x))


def test_what_is_allowed_is_taken() -> None:
    assert ops.RMSNorm(8, None).eps is None
    assert ops.Dropout(1).p == 1.0
    assert ops.ClampedSwiGLU(INF, glu_interleave_size=None)(torch.ones(1, 4)).shape == (1, 2)
    assert ops.SwiGLU(1).glu_interleave_size == 1


LATER = {
    "SwiGLU": (lambda: ops.SwiGLU(), "glu_interleave_size", (-1, 0, 2.5, "2")),
    "ScaledSwiGLU": (lambda: ops.ScaledSwiGLU(), "glu_interleave_size", (-1,)),
    "RMSNorm": (lambda: ops.RMSNorm(8), "eps", ("1e-5", -1.0)),
    "LayerNorm": (lambda: ops.LayerNorm((1, 8)), "eps", (None, NAN)),
    "L2Normalization": (lambda: ops.L2Normalization(), "eps", (None,)),
    "Dropout": (lambda: ops.Dropout(), "p", (2.0, None, "x")),
    "ConstantScale": (lambda: ops.ConstantScale(2), "scale", (None, "2", [1.0])),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_set_later_is_checked_before_anything_runs(name: str) -> None:
    build, attribute, values = LATER[name]
    extras = [torch.ones(3, 1)] if name == "ScaledSwiGLU" else []
    x = torch.ones(3, 1, 8)
    for value in values:
        op = build()
        op(x, *extras)
        setattr(op, attribute, value)
        with pytest.raises(og.OpsgraphError, match=rf"{name}.* got .*{attribute}"):
            op(x, *extras)


SET_LATER: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "GELU": (ops.GELU(), {"approximate": "none"}, ops.GELU("none")),
    "GEGLU": (ops.GEGLU(), {"approximate": "none"}, ops.GEGLU("none")),
    "interleaved": (ops.SwiGLU(), {"glu_interleave_size": 2}, ops.SwiGLU(2)),
    "ClampedSwiGLU": (
        ops.ClampedSwiGLU(),
        {"limit": 0.5, "alpha": 1.0, "glu_linear_offset": 0.0},
        ops.ClampedSwiGLU(0.5, 1.0, 0.0),
    ),
    "SiTUGLU": (ops.SiTUGLU(), {"beta1": 1.0, "beta2": 0.5}, ops.SiTUGLU(1.0, 0.5)),
}


@pytest.mark.parametrize("op, later, expected", SET_LATER.values(), ids=SET_LATER)
@pytest.mark.parametrize("wrap", [lambda op: op, og.Sequential], ids=["alone", "in a sequence"])
def test_arguments_of_activations_may_be_set_later(
    op: Any, later: dict[str, Any], expected: Any, wrap: Any
) -> None:
    op = copy.deepcopy(op)
    module, x = wrap(op), torch.randn(3, 8)
    before = module(x)
    for name, value in later.items():
        setattr(op, name, value)
    torch.testing.assert_close(module(x), expected(x), rtol=0, atol=0)
    assert not torch.equal(module(x), before)


@pytest.mark.parametrize(
    "op, name, value",
    [
        (ops.GELU(), "approximate", "erf"),
        (ops.GEGLU(), "approximate", None),
        (ops.ClampedSwiGLU(), "limit", -1.0),
        (ops.SiTUGLU(), "beta1", 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_wrong_argument_that_is_set_later_changes_nothing(op: Any, name: str, value: Any) -> None:
    x, before = torch.randn(3, 8), getattr(op, name)
    y = op(x)
    with pytest.raises(og.OpError, match=f"{type(op).__name__}: got {name}={value!r}, expected "):
        setattr(op, name, value)
    assert getattr(op, name) == before
    assert torch.equal(op(x), y)


FIXED = {
    "tensor_parallel_mode": ("column", "row", "x"),
    "group": ("other",),
    "group_size": (2, None),
    "shards": ((2, 1), None),
    "in_features": ("8", 8.0, -1),
    "out_features": ("8", 2.5),
    "sequence_parallel": ("yes", None, 2),
    "delay_wgrad_compute": ("yes", 2),
    "accumulate_into_main_grad": ("yes", None),
    "overwrite_main_grad": (None,),
    "init_method": (3,),
    "rng_state_tracker_function": ("x",),
    "overlap": ("x", 3, [1]),
    "partition_stride": ("x", 0),
    "symmetric_ar_type": ("x",),
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("used", [False, True])
def test_what_a_linear_layer_cannot_take_later_is_an_error(name: str, used: bool) -> None:
    op, x = ops.Linear(8, 8), torch.ones(3, 8)
    y, before = (op(x) if used else None), getattr(op, name)
    for value in FIXED[name]:
        with pytest.raises(og.OpsgraphError, match=rf"Linear: got .*{name}.*expected"):
            setattr(op, name, value)
        assert getattr(op, name) is before
        setattr(op, name, before)  # what it is may be said again
    if y is not None:
        assert torch.equal(op(x), y)


@pytest.mark.parametrize("kind", [ops.RMSNorm, ops.LayerNorm])
def test_sizes_of_a_norm_may_be_set_later(kind: Any) -> None:
    x = torch.randn(2, 3, 8)
    op, other = kind(8), kind((3, 8))
    op(x)
    for value in ((3, 8), [3, 8], torch.Size([3, 8]), (np.int64(3), 8)):
        op.normalized_shape = value
        op.weight = torch.nn.Parameter(torch.ones(3, 8))
        if kind is ops.LayerNorm:
            op.bias = torch.nn.Parameter(torch.zeros(3, 8))
        assert (op.normalized_shape, op.width) == ((3, 8), 8)
        assert torch.equal(op(x), other(x))
    for wrong in ("8", b"8", 2.5, (), (3, "x")):
        with pytest.raises(og.OpsgraphError, match=rf"{kind.__name__}: got normalized_shape"):
            op.normalized_shape = wrong
    op.normalized_shape = 4
    with pytest.raises(og.OpsgraphError, match=r"8.*expected.*4"):
        op(x)
    for wrong in ("x", None, 2):
        with pytest.raises(og.OpsgraphError, match=rf"{kind.__name__}: got zero_centered_gamma"):
            op.zero_centered_gamma = wrong


def test_a_derived_norm_takes_one_size_later_too() -> None:
    op = ops.AdaptiveLayerNorm(8)
    op.normalized_shape = (3, 8)
    scale = torch.zeros(2, 8)
    with pytest.raises(og.OpsgraphError, match=r"AdaptiveLayerNorm.*expected one size"):
        op(torch.randn(2, 3, 8), scale, scale)


GROUPED = {
    "in_features": ("8", 8.5, -1),
    "out_features": ("8", [8]),
    "init_method": (3,),
    "rng_state_tracker_function": ("x",),
    "accumulate_into_main_grad": ("yes",),
    "overwrite_main_grad": (2,),
    "delay_wgrad_compute": (None,),
    "single_grouped_weight": (2,),
    "single_grouped_bias": ("yes",),
}


@pytest.mark.parametrize("name", GROUPED)
def test_what_a_grouped_linear_cannot_take_later_is_an_error(name: str) -> None:
    op = ops.GroupedLinear(2, 8, 8)
    for value in GROUPED[name]:
        with pytest.raises(og.OpsgraphError, match=rf"GroupedLinear: got .*{name}.*expected"):
            setattr(op, name, value)


def test_what_holds_the_ops_of_a_residual_is_a_list_of_modules() -> None:
    residual = ops.Residual(ops.SiLU())
    x = torch.randn(3, 8)
    y = residual(x)
    for value in (None, ops.ReLU(), [ops.ReLU()], "x"):
        with pytest.raises(og.OpsgraphError, match=r"Residual: got ops=.*expected"):
            residual.ops = value
    assert torch.equal(residual(x), y)


def test_a_weight_is_marked_when_its_gradient_is_delayed_later() -> None:
    for op in (ops.Linear(8, 8), ops.GroupedLinear(1, 8, 8)):
        op.delay_wgrad_compute = True
        assert all(p.skip_backward_post_hook for p in op.parameters() if p.dim() == 2)
        op.delay_wgrad_compute = False
        assert not any(hasattr(p, "skip_backward_post_hook") for p in op.parameters())
    mlp = og.LayerNormMLP(8, 8, delay_wgrad_compute=True, device="cpu")
    mlp.delay_wgrad_compute = False
    assert not any(hasattr(p, "skip_backward_post_hook") for p in mlp.parameters())


def test_the_number_of_groups_is_given_once() -> None:
    op = ops.GroupedLinear(2, 8, 8)
    with pytest.raises(og.OpsgraphError, match=r"GroupedLinear: got num_groups.*expected another"):
        op.num_groups = 3
    assert op.num_groups == 2


def test_what_is_no_tensor_in_a_state_dict_is_named_where_sizes_were_left_out() -> None:
    with pytest.raises(RuntimeError, match=r'"weight", expected torch.Tensor'):
        ops.Linear(None, 8).load_state_dict({"weight": 3, "bias": torch.zeros(8)})
