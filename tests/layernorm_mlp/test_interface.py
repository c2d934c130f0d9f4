"""LayerNormMLP as TransformerEngine's users know it: names, signature, checkpoints, errors."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import opsgraph as og
from tests.layernorm_mlp.test_module import FFN, GATES, HIDDEN, Setting

SHAPES = {
    "layer_norm_weight": (HIDDEN,),
    "layer_norm_bias": (HIDDEN,),
    "fc1_weight": (FFN, HIDDEN),
    "fc1_bias": (FFN,),
    "fc2_weight": (HIDDEN, FFN),
    "fc2_bias": (HIDDEN,),
}


def shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def make(**options: Any) -> og.LayerNormMLP:
    return og.LayerNormMLP(HIDDEN, FFN, device="cpu", **options)


def test_names_order_and_shapes() -> None:
    assert shapes(make()) == list(SHAPES.items())
    assert list(make().state_dict()) == list(SHAPES)
    rms = make(normalization="RMSNorm", bias=False)
    assert shapes(rms) == [
        (n, SHAPES[n]) for n in ("layer_norm_weight", "fc1_weight", "fc2_weight")
    ]
    assert rms.layer_norm_bias is None
    for activation in (*GATES, "clamped_swiglu"):
        gated = dict(shapes(make(activation=activation)))
        assert gated["fc1_weight"] == (2 * FFN, HIDDEN)
        assert gated["fc1_bias"] == (2 * FFN,)
        assert gated["fc2_weight"] == (HIDDEN, FFN)
    assert {p.dtype for p in make(params_dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("zero_centered_gamma", [False, True])
def test_initial_values(zero_centered_gamma: bool) -> None:
    torch.manual_seed(0)
    mlp = og.LayerNormMLP(200, 300, device="cpu", zero_centered_gamma=zero_centered_gamma)
    assert (mlp.layer_norm_weight == (0 if zero_centered_gamma else 1)).all()
    for name in ("layer_norm_bias", "fc1_bias", "fc2_bias"):
        assert (getattr(mlp, name) == 0).all()
    for weight in (mlp.fc1_weight, mlp.fc2_weight):
        assert abs(weight.mean().item()) < 4 * 0.023 / math.sqrt(weight.numel())
        assert abs(weight.std().item() - 0.023) < 5e-4
        kurtosis = (weight / weight.std()).pow(4).mean().item()
        assert abs(kurtosis - 3) < 0.15, "it is not normal"
    assert not torch.equal(mlp.fc1_weight.flatten()[:100], mlp.fc2_weight.flatten()[:100])


def test_init_methods_run_in_the_trackers_fork() -> None:
    events: list[str] = []

    class Tracker:
        @contextmanager
        def fork(self) -> Iterator[None]:
            events.append("fork")
            yield
            events.append("join")

    def fill(value: float) -> Any:
        def init(weight: Tensor) -> None:
            events.append(f"{tuple(weight.shape)}")
            weight.fill_(value)

        return init

    mlp = make(
        init_method=fill(2.0), output_layer_init_method=fill(3.0), get_rng_state_tracker=Tracker
    )
    assert events == ["fork", str((FFN, HIDDEN)), str((HIDDEN, FFN)), "join"]
    assert (mlp.fc1_weight == 2).all()
    assert (mlp.fc2_weight == 3).all()
    assert (mlp.fc1_bias == 0).all()


class Bomb:
    """Says so when it is unpickled."""

    went_off = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "went_off", True)


@pytest.mark.parametrize("nested", [False, True])
def test_a_transformer_engine_checkpoint_loads(nested: bool) -> None:
    prefix = "layers.0.mlp." if nested else ""
    given = {prefix + n: torch.randn(shape) for n, shape in SHAPES.items()}
    state = torch.frombuffer(bytearray(pickle.dumps(Bomb())), dtype=torch.uint8)
    for extra in (state, io.BytesIO(pickle.dumps(Bomb())), None):
        mlp = make()
        module: nn.Module = mlp
        if nested:
            module = nn.Module()
            module.layers = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
        result = module.load_state_dict({**given, f"{prefix}_extra_state": extra}, strict=True)
        assert result.missing_keys == result.unexpected_keys == []
        assert not Bomb.went_off
        for name in SHAPES:
            assert torch.equal(getattr(mlp, name), given[prefix + name])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc3_weight"):
        module.load_state_dict({**given, f"{prefix}fc3_weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1_bias"):
        module.load_state_dict({k: v for k, v in given.items() if not k.endswith("fc1_bias")})


def copies(mlp: og.LayerNormMLP) -> Iterator[og.LayerNormMLP]:
    yield copy.deepcopy(mlp)
    yield pickle.loads(pickle.dumps(mlp))
    buffer = io.BytesIO()
    torch.save(mlp, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    other = Setting().module()
    other.load_state_dict(mlp.state_dict())
    yield other


@pytest.mark.parametrize("used", [False, True])
def test_copies_are_equal_and_their_own(used: bool) -> None:
    mlp, x = Setting().module(), torch.randn(3, HIDDEN)
    if used:
        mlp(x).sum().backward()
        mlp.zero_grad()
    for other in copies(mlp):
        assert torch.equal(other(x), mlp(x))
        with torch.no_grad():
            other.fc1_weight.zero_()
            other.fc1_bias.zero_()
        torch.testing.assert_close(other(x), other.fc2_bias.expand(3, HIDDEN))
        other(x).sum().backward()
        assert other.fc2_weight.grad is not None
        assert mlp.fc2_weight.grad is None
        assert not torch.equal(other(x), mlp(x))


def pickled(module: og.LayerNormMLP) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_may_be_compiled_or_transformed_at_its_first_call(made: Any) -> None:
    mlp, x = Setting().module(), torch.randn(3, HIDDEN)
    right = mlp(x)
    torch.compiler.reset()
    compiled = torch.compile(made(mlp), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), right)
    torch.testing.assert_close(torch.func.vmap(made(mlp))(x[None])[0], right)
    traced = make_fx(made(mlp))(x)
    assert not [node for node in traced.graph.nodes if "uniform" in node.name]
    torch.testing.assert_close(traced(x), right)


def test_meta_device_then_empty_then_reset() -> None:
    made: list[str] = []
    mlp = og.LayerNormMLP(HIDDEN, FFN, device="meta", init_method=lambda w: made.append("init"))
    assert {p.device.type for p in mlp.parameters()} == {"meta"}
    mlp = og.LayerNormMLP(HIDDEN, FFN, device="meta", zero_centered_gamma=True).to_empty(
        device="cpu"
    )
    torch.manual_seed(1)
    mlp.reset_parameters()
    torch.manual_seed(1)
    right = make(zero_centered_gamma=True)
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter, right.get_parameter(name)), name
    x = torch.randn(3, HIDDEN)
    assert torch.equal(mlp(x), right(x))


def test_parameters_may_be_replaced_and_moved() -> None:
    mlp, x = Setting().module(), torch.randn(3, HIDDEN)
    mlp(x)
    mlp.fc2_weight = nn.Parameter(torch.zeros(HIDDEN, FFN))
    torch.testing.assert_close(mlp(x), mlp.fc2_bias.expand(3, HIDDEN))
    assert mlp.double()(x.double()).dtype == torch.float64


# -- the signature and its errors --

SIGNATURE = """
hidden_size ffn_hidden_size eps sequence_parallel return_bias get_rng_state_tracker tp_group tp_size
init_method bias normalization activation activation_params output_layer_init_method
fuse_wgrad_accumulation params_dtype return_layernorm_output return_layernorm_output_gathered
seq_length micro_batch_size set_parallel_mode zero_centered_gamma device ub_overlap_ag name
ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad delay_wgrad_compute symmetric_ar_type
checkpoint
"""


def test_signature_is_transformer_engines() -> None:
    parameters = inspect.signature(og.LayerNormMLP).parameters
    ours = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert [n for n in parameters if n not in ours] == SIGNATURE.split()
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values())
    defaults = {n: p.default for n, p in parameters.items() if p.default not in (None, False)}
    required = {"hidden_size": inspect.Parameter.empty, "ffn_hidden_size": inspect.Parameter.empty}
    some = dict(eps=1e-5, tp_size=1, bias=True, normalization="LayerNorm", activation="gelu")
    some |= dict(recompute=True)
    assert defaults == required | some
    assert list(inspect.signature(og.LayerNormMLP.forward).parameters)[1:] == [
        "inp",
        "is_first_microbatch",
    ]


OVERLAPS = [name for name in SIGNATURE.split() if name.startswith("ub_")]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(normalization="BatchNorm"), "normalization 'BatchNorm'.*one of LayerNorm, RMSNorm"),
        (dict(activation="cubic"), "activation 'cubic', expected one of gelu, geglu.*swiglu, glu"),
        (dict(tp_size=5), "ffn_hidden_size 12, expected a multiple of tp_size 5"),
        (dict(tp_size=2), "tp_size 2 and no tp_group"),
        (dict(symmetric_ar_type="ring"), "symmetric_ar_type 'ring', expected one of multimem"),
        *(({name: True}, f"{name} without sequence par") for name in OVERLAPS),
        (dict(sequence_parallel=True, ub_overlap_ag=True), "ub_overlap_ag without sequence par"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_errors_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(og.OpsgraphError, match=f"LayerNormMLP: got .*{message}"):
        make(**options)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(3, 6), "got input width 6, expected 8"),
        (torch.randn(3, 8).double(), "got input dtype torch.float64, expected torch.float32"),
        (torch.randn(3, 8).bfloat16(), "input dtype torch.bfloat16, .*or an active autocast"),
        (torch.ones(3, 8, dtype=torch.int64), "got dtype torch.int64, expected a float"),
        (torch.randn(3, 8, device="meta"), "got input on meta, expected cpu, where weight is"),
        (torch.tensor(1.0), r"got a scalar, expected \[\*, width\]"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else "",
)
def test_errors_of_a_call(x: Tensor, message: str) -> None:
    with pytest.raises(og.OpsgraphError, match=message):
        make()(x)


WRONG = {
    "eps None": dict(eps=None),
    "eps text": dict(eps="1e-5"),
    "eps negative": dict(eps=-1e-5, normalization="RMSNorm"),
    "hidden_size": dict(hidden_size=8.0),
    "ffn_hidden_size": dict(ffn_hidden_size="16"),
    "tp_size": dict(tp_size=0),
    "bias": dict(bias="no"),
    "checkpoint": dict(checkpoint=None),
    "ub_overlap_ag": dict(ub_overlap_ag="x"),
    "normalization": dict(normalization=None),
    "activation": dict(activation=["gelu"]),
    "activation_params": dict(activation_params="x"),
    "init_method": dict(init_method=3),
    "output_layer_init_method": dict(output_layer_init_method="x"),
    "get_rng_state_tracker": dict(get_rng_state_tracker=1.5),
    "dtype": dict(params_dtype="float32"),
    "dtype int8": dict(params_dtype=torch.int8),
    "device": dict(device="nowhere"),
    "seq_length": dict(seq_length="x"),
    "micro_batch_size": dict(micro_batch_size=2.5),
    "name": dict(name=3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_at_construction(name: str) -> None:
    arguments = dict(hidden_size=8, ffn_hidden_size=16, device="cpu") | WRONG[name]
    with pytest.raises(og.OpsgraphError, match=f"LayerNormMLP: got {name.split()[0]}"):
        og.LayerNormMLP(**arguments)


def test_unknown_and_wrong_activation_params_are_named() -> None:
    def make(activation: str, **params: Any) -> None:
        og.LayerNormMLP(8, 16, activation=activation, activation_params=params, device="cpu")

    message = r"got activation_params 'limits' for 'clamped_swiglu', expected some of limit, alpha"
    with pytest.raises(og.OpsgraphError, match=message):
        make("clamped_swiglu", limits=2.0)
    with pytest.raises(og.OpsgraphError, match=r"'beta1' for 'swiglu', expected some of glu_inter"):
        make("swiglu", beta1=2.0)
    with pytest.raises(og.OpsgraphError, match=r"SwiGLU: got glu_interleave_size=2\.0"):
        make("swiglu", glu_interleave_size=2.0)
    make("gelu", approximate="none", cache_quantized_input=True)
    make("situglu", beta1=2, glu_interleave_size=4)
