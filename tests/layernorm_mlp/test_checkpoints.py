"""Checkpoints: a Llama MLP's weights joined and split, gate and value interleaved, te.ops' keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops
from opsgraph.layernorm_mlp.checkpoints import (
    deinterleave_glu,
    interleave_glu,
    join_llama_mlp,
    split_llama_mlp,
)

State = dict[str, Tensor]


class LlamaMLP(nn.Module):
    """As public models have it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(6, 8, bias)
        self.up_proj = nn.Linear(6, 8, bias)
        self.down_proj = nn.Linear(8, 6, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("size", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_joined_llama_mlp_computes_the_same_and_splits_again(
    bias: bool, size: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": LlamaMLP(bias), "head": nn.Linear(6, 2)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 6)
    expected = model["mlp"](x)
    state = join_llama_mlp(model.state_dict(), glu_interleave_size=size)
    assert [k for k in state if k.startswith("head")] == ["head.weight", "head.bias"]
    ours = og.LayerNormMLP(
        6, 8, bias=bias, activation="swiglu", normalization="RMSNorm", device="cpu",
        activation_params={"glu_interleave_size": size},
    )  # fmt: skip
    own = {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")}
    ours.load_state_dict(own | {"layer_norm_weight": torch.ones(6)})
    norm = nn.RMSNorm(6, 1e-5)
    torch.testing.assert_close(ours(x), model["mlp"](norm(x)))
    sequence = og.Sequential(
        ops.Linear(6, 16, bias), ops.SwiGLU(size), ops.Linear(8, 6, bias)
    )  # fmt: skip
    named = dict(fc1="0.", fc2="2.", glu_interleave_size=size)
    alone = join_llama_mlp(model["mlp"].state_dict(), **named)
    sequence.load_state_dict(alone)
    torch.testing.assert_close(sequence(x), expected)
    assert _equal(split_llama_mlp(state, glu_interleave_size=size), before)
    assert _equal(split_llama_mlp(alone, **named), model["mlp"].state_dict())
    assert _equal(model.state_dict(), before)


def test_every_mlp_of_a_model_is_joined_in_memory_of_its_own() -> None:
    model = nn.Sequential(LlamaMLP(False), nn.Sequential(LlamaMLP(False), LlamaMLP(True)))
    state = join_llama_mlp(model.state_dict())
    assert sorted(state) == sorted(
        f"{p}.fc{n}_{kind}"
        for p, kinds in (("0", ["weight"]), ("1.0", ["weight"]), ("1.1", ["weight", "bias"]))
        for n in (1, 2)
        for kind in kinds
    )
    state["0.fc1_weight"].zero_()
    assert model[0].gate_proj.weight.any()
    again = split_llama_mlp(join_llama_mlp(model.state_dict()))
    assert again["0.up_proj.weight"].untyped_storage().nbytes() == 8 * 6 * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_joining_shares_is_sharing_the_joined(ranks: int) -> None:
    state = LlamaMLP(True).state_dict()
    whole, split = join_llama_mlp(state), ops.Linear(6, 16, tensor_parallel_mode="column")
    split.precede(ops.SwiGLU())
    for rank in range(ranks):
        share = {
            k: v.chunk(ranks, 1 if k == "down_proj.weight" else 0)[rank]
            if k != "down_proj.bias" else v
            for k, v in state.items()
        }  # fmt: skip
        joined = join_llama_mlp(share)
        for name, partition in split.partitions().items():
            expected = partition._replace(size=ranks).share(whole[f"fc1_{name}"], rank)
            assert torch.equal(joined[f"fc1_{name}"], expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_interleaved_rows_are_those_that_the_activation_reads(size: int) -> None:
    torch.manual_seed(0)
    plain = og.Sequential(ops.Linear(6, 16), ops.GEGLU(), ops.Linear(8, 6))
    other = og.Sequential(
        ops.Linear(6, 16), ops.GEGLU(glu_interleave_size=size), ops.Linear(8, 6)
    )  # fmt: skip
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    names = ("0.weight", "0.bias")
    state = interleave_glu(plain.state_dict(), names, size)
    other.load_state_dict(state)
    x = torch.randn(5, 6)
    torch.testing.assert_close(other(x), plain(x))
    assert _equal(deinterleave_glu(state, names, size), before)
    assert _equal(plain.state_dict(), before)
    state["0.weight"].zero_()
    assert _equal(plain.state_dict(), before)


W = torch.ones(8, 6)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no entry": (lambda: interleave_glu({"a.w": W}, ("fc1_weight",), 2), "no entry 'fc1_weight'"),
    "rows": (lambda: interleave_glu({"w": W}, ("w",), 3), r"w of shape \(8, 6\), expected rows in"),
    "size": (lambda: deinterleave_glu({"w": W}, ("w",), -1), "got glu_interleave_size=-1"),
    "none": (lambda: join_llama_mlp({"w": W}), "got no gate_proj.weight, expected one of w"),
    "up": (
        lambda: join_llama_mlp({"m.gate_proj.weight": W}), "no m.up_proj.weight, expected it beside"
    ),
    "bias": (
        lambda: join_llama_mlp(
            {f"{k}_proj.weight": W for k in ("gate", "up", "down")} | {"up_proj.bias": W[:, 0]}
        ),
        "got up_proj.bias alone, expected both",
    ),
    "shapes": (
        lambda: join_llama_mlp(
            {"gate_proj.weight": W, "up_proj.weight": W[1:], "down_proj.weight": W}
        ),
        "shapes .8, 6. and .7, 6., expected two equal",
    ),
    "odd": (
        lambda: split_llama_mlp({"fc1_weight": W[1:], "fc2_weight": W}), "expected an even number"
    ),
    "no fc2": (lambda: split_llama_mlp({"fc1_weight": W}), "no fc1_weight with fc2_weight"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(og.OpError, match=message):
        call()


# -- te.ops --


class _Never:
    def __reduce__(self) -> Any:
        raise AssertionError("it was pickled or unpickled")


def _te_state(prefix: str, **parts: State) -> dict[str, Any]:
    """As te.ops 2.20 writes it: a Linear's parameters are those of the ops inside it."""
    made: dict[str, Any] = {}
    for name, state in parts.items():
        key = f"{prefix}{name.removeprefix('op')}."
        if "weight" in state and state["weight"].dim() == 2 and name != "op4":
            for i, (kind, value) in enumerate(state.items()):
                made[f"{key}basic_ops.{i}.{kind}"] = value
                made[f"{key}basic_ops.{i}._extra_state"] = _Never()
        else:
            made |= {f"{key}{kind}": value for kind, value in state.items()}
            made[f"{key}_extra_state"] = _Never()
    return made


def _sequence() -> og.Sequential:
    return og.Sequential(
        ops.LayerNorm(6), ops.Linear(6, 8), ops.GELU(), ops.Linear(8, 6, bias=False),
        ops.BasicLinear(6, 6), ops.Bias(6), ops.Reshape(-1, 6),
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "layers.3.mlp."])
def test_a_checkpoint_of_te_ops_loads_strictly(prefix: str) -> None:
    torch.manual_seed(0)
    source = _sequence()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    parts = {f"op{k}": dict(op.state_dict()) for k, op in enumerate(source)}
    state = _te_state(prefix, **parts)
    assert f"{prefix}1.basic_ops.1.bias" in state
    given = dict(state)
    target: nn.Module = _sequence()
    module = target
    for name in reversed(prefix.split(".")[:-1]):
        module = nn.ModuleDict({name: module})
    module.load_state_dict(state, strict=True)
    assert state == given
    x = torch.randn(3, 6)
    torch.testing.assert_close(target(x), source(x))


def test_keys_of_te_ops_load_where_a_linear_stands() -> None:
    source = ops.Linear(6, 6)
    state = _te_state("", op0=dict(source.state_dict()))
    alone = {k.removeprefix("0."): v for k, v in state.items()}
    x = torch.randn(3, 6)
    for build, shape in (
        (lambda: ops.Linear(6, 6), ""),
        (lambda: ops.Linear(), ""),  # sizes from the checkpoint
        (lambda: ops.Residual(ops.Linear(6, 6)), "ops.0."),
        (lambda: og.Sequential(og.Sequential(ops.Linear(6, 6))), "0.0."),
    ):
        module = build()
        module.load_state_dict({f"{shape}{k}": v for k, v in alone.items()})
        expected = source(x) + (x if shape == "ops.0." else 0)
        torch.testing.assert_close(module(x), expected)


def test_what_a_checkpoint_of_te_ops_lacks_is_still_missed() -> None:
    state = _te_state("", op0=dict(ops.Linear(6, 6).state_dict()))
    without = {k: v for k, v in state.items() if not k.endswith("bias")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"'):
        og.Sequential(ops.Linear(6, 6)).load_state_dict(without)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.bias"'):
        og.Sequential(ops.Linear(6, 6, bias=False)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight"):
        og.Sequential(ops.Linear(6, 5)).load_state_dict(state)
