"""Tiny models of transformers' families, patched: what runs as plans, and whether it is right.

python -m benchmarks.families [--only NAME ...] [--out FILE]

Each family's model is built from its config with sizes cut, random weights, run on a small input,
patched and compared: outputs and gradients of all parameters in fp32, outputs in bf16 beside those
in fp64. Writes one line a family to benchmarks/results/families.txt.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opsgraph.integrations.transformers import patch
from opsgraph.integrations.transformers.example import examples

RESULTS = Path(__file__).parent / "results" / "families.txt"
SECONDS = 240
FP32, BF16 = 1e-5, 1.1
DRAWS, MANY = 8, 32
"""Inputs over which errors are compared where one does not tell: of outputs, and of gradients."""
SURE = 3.0
"""Standard errors by which a quotient of errors is to be above BF16."""
MOST = 120e6
"""Parameters of a model that is built."""

REACHED = "full", "part", "none", "beyond", "failed", "too long", "not built"
"""See `Result`."""

_ALIKE: dict[Any, str] = {
    64: """hidden_size d_model n_embd dim embed_dim embedding_size emb_dim encoder_hidden_size
        decoder_hidden_size hidden_dim projection_dim fpn_hidden_size mask_feature_size
        conv_dim_size width model_dim out_hidden_size decoder_hidden_dim encoder_hidden_dim
        audio_hidden_size
        word_embed_proj_dim cross_attention_hidden_size lru_width hidden_channels n_embed
        embedding_dim max_position_embeddings n_positions max_source_positions max_target_positions
        max_seq_len""",
    96: """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        dim_feedforward feedforward_dim moe_intermediate_size d_inner mlp_dim intermediate_dim
        shared_expert_intermediate_size dense_intermediate_size decoder_intermediate_size
        encoder_feedforward_dim decoder_feedforward_dim shared_intermediate_size
        intermediate_size_mlp expert_ffn_hidden_size mlp_hidden_size""",
    2: """num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_layers
        num_decoder_layers num_encoder_layers depth num_blocks encoder_num_layers decoder_num_layers
        decoder_num_hidden_layers encoder_num_hidden_layers num_key_value_heads n_head_kv
        num_kv_heads num_experts_per_tok top_k_experts moe_k spatial_merge_size
        temporal_patch_size eos_token_id""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts""",
    16: "head_dim kv_channels d_kv num_mel_bins kv_lora_rank v_head_dim sliding_window",
    1: "n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id",
    200: "vocab_size text_vocab_size",
    32: "image_size q_lora_rank",
    8: "patch_size qk_rope_head_dim qk_nope_head_dim",
    5: "num_queries",
    0: "pad_token_id",
}
_SMALL: dict[str, Any] = {name: size for size, names in _ALIKE.items() for name in names.split()}


_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "glm4v_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"is_decoder": True},
    "step3p7": {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What some families need beside the sizes."""


@dataclass
class Result:
    """One family.

    reached: "full" (MLP and residual are one plan, with the norm unless others read that too),
    "part", "none", "beyond" (results or gradients beyond the bounds), "failed", "too long" or
    "not built". fp32, gradients: the largest relative differences; where one is above FP32, as
    `_exactly` compares: then the largest of errors against fp64, or 0 if those above FP32 are none
    that the unpatched model has not, too. bf16: the quotient of both errors.
    """

    family: str
    reached: str
    shown: str = ""
    fp32: float = 0.0
    gradients: float = 0.0
    bf16: float = 0.0
    seconds: float = 0.0


def _sizes(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(kind.__init__).parameters) | set(dir(kind))
    names |= set(getattr(kind, "__dataclass_fields__", ()))
    names |= set(getattr(kind, "attribute_map", ()))
    default = kind()
    found: dict[str, Any] = {}
    for name in names & set(given):
        value = getattr(default, name, None)
        if isinstance(getattr(kind, name, None), property) or isinstance(value, bool):
            continue
        if isinstance(value, int) and (value > 0 or "token" in name):
            found[name] = given[name] if "experts" in name else min(given[name], value)
        elif isinstance(value, list | tuple) and name in ("image_size", "patch_size"):
            found[name] = type(value)([given[name]] * len(value))
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope and "head_dim" in given:
        found["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    for name in getattr(kind, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None:
            found[name] = type(sub)(**_sizes(type(sub), given)).to_dict()
    return found


def tiny_configs(kind: Any) -> Iterator[Any]:
    """Configs with sizes cut, the smallest first: not every family takes all cuts together."""
    few = {n: v for n, v in _SMALL.items() if v == 2 or "vocab" in n or "token" in n}
    forced = {"head_dim": 16, "num_key_value_heads": 4}
    special = _SPECIAL.get(kind.model_type, {})
    for given, more in (
        (_SMALL, {}),
        (_SMALL, forced),
        ({n: v for n, v in _SMALL.items() if n not in ("head_dim", "kv_channels", "d_kv")}, {}),
        ({n: v for n, v in _SMALL.items() if n not in ("image_size", "patch_size")}, {}),
        ({n: v for n, v in _SMALL.items() if v != 2}, {}),
        (few, {}),
    ):
        try:
            yield kind(**{**_sizes(kind, given), **more, **special})
        except Exception:
            continue


def families() -> list[str]:
    """Every model type."""
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING)


def listed() -> dict[str, str]:
    """The families that RESULTS has, each with what was reached."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [line for line in lines if line[:1].isalpha()]
    found = {row.split()[0]: row[len(row.split()[0]) :].lstrip() for row in rows}
    return {name: next(r for r in REACHED if rest.startswith(r)) for name, rest in found.items()}


def build(family: str) -> nn.Module:
    """A tiny model of a family that runs on an example, its random weights not all alike."""
    return _built(family)[0]


def _built(family: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CONFIG_MAPPING

    last: Exception = ValueError("no config of cut sizes is valid")
    for config in tiny_configs(CONFIG_MAPPING[family]):
        try:
            if (count := _count(config)) > MOST:
                raise ValueError(f"{count / 1e6:.0f}M parameters")
            torch.manual_seed(0)
            model = _model(config).float().eval()
            _vary(model)
            return model, _example(model)
        except Exception as error:
            last = error
    raise last


def _count(config: Any) -> int:
    """How many parameters a model would have; 0 where it cannot be made on the meta device."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _model(copy.deepcopy(config)).parameters())
    except Exception:
        return 0


def _model(config: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    for auto in (AutoModelForCausalLM, AutoModel):
        with suppress(ValueError):
            return auto.from_config(config)  # type: ignore[no-any-return]
    return min(_classes(config), key=lambda kind: len(kind.__name__))(config)


def _classes(config: Any) -> list[Any]:
    """The models of a config that no class for all names, as of a part or of one task."""
    from transformers import PreTrainedModel

    module = type(config).__module__.replace(".configuration_", ".modeling_")
    return [
        kind for kind in vars(importlib.import_module(module)).values()
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        and kind.config_class is type(config) and "forward" in vars(kind)
    ]  # fmt: skip


def _vary(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim == 2 and float(parameter.std()) < 0.05 and "embed" not in name:
                parameter.mul_(3)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _example(model: nn.Module) -> dict[str, Any]:
    last: Exception = ValueError("no example")
    for example in examples(model):
        try:
            with torch.no_grad():
                model(**example)
            return example
        except Exception as error:
            last = error
    raise last


def _run(model: nn.Module, example: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    outputs = [t for t in _tensors(model(**example)) if t.requires_grad]
    loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() / t.numel() ** 0.5
               for t in outputs)  # fmt: skip
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients


def _difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    size = max(float(b.double().norm()), floor, 1e-30)
    return float((a.double() - b.double()).norm()) / size


def _cast(example: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in example.items()
    }


def check(family: str) -> Result:
    """Build, patch and compare one family."""
    start = time.perf_counter()
    try:
        model, example = _built(family)
        plain = copy.deepcopy(model)
        before, gradients = _run(model, example)
    except Exception as error:
        return Result(
            family, "not built", f"{type(error).__name__}: {error}"[:160].replace("\n", " ")
        )
    report = patch(model, example)
    after, patched = _run(model, example)
    fp32 = max(map(_difference, after, before), default=0.0)
    typical = sorted(float(g.norm()) for g in gradients.values())[len(gradients) // 2]
    worst = max(
        (_difference(patched[n], g, 1e-2 * typical) for n, g in gradients.items()), default=0.0
    )
    if not (fp32 <= FP32 and worst <= FP32):
        with suppress(RuntimeError):  # of models that do not run in fp64: differences stand
            fp32, worst = _exactly(plain, model, example)
    bf16 = _bf16(plain, model, example)
    rows = [row.found for row in report.rows]
    full = any(
        ("residual" in found or "add" in found) and found.count("Linear") > 1 for found in rows
    )
    norm = any("Norm" in found for found in rows)
    reached = "full" if full and norm else "part" if rows else "none"
    if gradients.keys() != patched.keys() or not (fp32 <= FP32 and worst <= FP32):
        reached = "beyond"
    shown = "; ".join(dict.fromkeys(rows)) or "; ".join(row.reason for row in report.left)[:160]
    return Result(family, reached, shown, fp32, worst, bf16, time.perf_counter() - start)


class _Doubles(TorchFunctionMode):
    """fp64 where a model's code names fp32, as most norms do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: wider(value) for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(wider, args), **named)


def _in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype, with what modules keep of earlier calls, as codebooks do."""
    for module in model.to(dtype).modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.to(dtype))
    return model


def _exact(model: nn.Module) -> nn.Module:
    """A copy in fp64, whose experts run one after the other: PyTorch groups no such products."""
    exact = _in(copy.deepcopy(model), torch.float64)
    with suppress(AttributeError, ValueError):
        exact.set_experts_implementation("eager")  # type: ignore[operator]
    return exact


@contextmanager
def _wide() -> Iterator[None]:
    """fp64 for tensors that a model makes, whether it names a dtype or not."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _others(example: dict[str, Any], count: int = DRAWS) -> Iterator[dict[str, Any]]:
    """The example, and others of its shapes."""
    yield example
    for k in range(1, count):
        generator = torch.Generator().manual_seed(k)
        made = dict(example)
        for name, value in example.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                made[name] = torch.randn(value.shape, generator=generator)
            elif name.endswith("input_ids"):
                length = value.shape[-1]
                order = torch.randperm(length, generator=generator) if k >= length else None
                made[name] = value.roll(k, -1) if order is None else value[..., order]
        yield made


class _Contributions:
    """Of a model's biases: the norm of the sums of `|dy|` over rows, what their gradients add up.

    A bias whose exact gradient is 0, as a key's, adds up numbers of that size, and their rounding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.register_forward_hook(partial(self._follow, f"{name}.bias".lstrip(".")))

    def _follow(self, name: str, module: nn.Module, args: Any, y: Any) -> None:
        if isinstance(y, Tensor) and y.requires_grad:
            of = y.ndim - 1 if module.bias.shape[0] == y.shape[-1] else 1
            y.register_hook(lambda dy: self._add(name, dy.abs().transpose(of, -1), module))

    def _add(self, name: str, size: Tensor, module: nn.Module) -> None:
        if size.shape[-1:] == module.bias.shape:
            self.sums[name] = self.sums.get(name, 0) + size.flatten(0, -2).sum(0)

    def norms(self) -> dict[str, float]:
        found = {name: float(total.norm()) for name, total in self.sums.items()}
        self.sums.clear()
        return found


def _exactly(plain: nn.Module, patched: nn.Module, example: dict[str, Any]) -> tuple[float, float]:
    """Errors against fp64, of outputs and of the worst gradient; means over inputs.

    For models whose own fp32 results are further from the exact ones than FP32. An output's is 0
    if it is within BF16 of the unpatched model's. A gradient's is

        e = |g - g64| / max(|g64|, 0.01 of the typical |g64|, |sum of |dy| over rows| of a bias)

    and only those count that the unpatched model does not have too: e > FP32, and over MANY
    inputs exp(m - SURE * s) > BF16, with m the mean of log(e / e of the unpatched model), and s
    its standard error.
    """
    exact = _exact(plain)
    contributions = _Contributions(exact)
    outputs = [0.0, 0.0]
    errors: list[defaultdict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for k, given in enumerate(_others(example, MANY)):
        with _wide():
            values, gradients = _run(exact, _cast(given, torch.float64))
        floor = 1e-2 * sorted(float(g.norm()) for g in gradients.values())[len(gradients) // 2]
        scales = contributions.norms()
        for which, model in enumerate((patched, plain)):
            found, own = _run(model, given)
            if k < DRAWS:
                outputs[which] += max(map(_difference, found, values)) / DRAWS
            for n, g in own.items():
                size = max(floor, scales.get(n, 0.0))
                errors[which][n].append(_difference(g, gradients[n], size))
        if k + 1 == DRAWS and all(sum(e) <= FP32 * DRAWS for e in errors[0].values()):
            break
    worst = 0.0
    for name, mine in errors[0].items():
        mean = sum(mine) / len(mine)
        if mean > FP32:
            own = torch.tensor(errors[1][name], dtype=torch.float64).clamp_min(1e-15)
            quotients = torch.tensor(mine).div(own).log()
            least = quotients.mean() - SURE * quotients.std() / len(mine) ** 0.5
            print(
                f"{name}: {mean:.1e}, {quotients.mean().exp():.2f} of the unpatched model's error"
            )
            worst = max(worst, mean if float(least.exp()) > BF16 else 0.0)
    if worst == 0.0:
        worst = max(
            (m for m in (sum(e) / len(e) for e in errors[0].values()) if m <= FP32), default=0.0
        )
    return (0.0 if outputs[0] <= BF16 * outputs[1] else outputs[0]), worst


def _bf16(plain: nn.Module, patched: nn.Module, example: dict[str, Any]) -> float:
    """The error of the patched model in bf16 against fp64, by that of the plain one.

    The worst output's, of errors summed over as many inputs as it takes to be within BF16.
    """
    exact = _exact(plain)
    plain, patched = _in(plain, torch.bfloat16), _in(patched, torch.bfloat16)
    ours: Counter[int] = Counter()
    own: Counter[int] = Counter()
    worst = 0.0
    for given in _others(example):
        try:
            with torch.no_grad():
                with _wide():
                    right = list(_tensors(exact(**_cast(given, torch.float64))))
                half = _cast(given, torch.bfloat16)
                before = list(_tensors(plain(**half)))
        except Exception:  # models that do not run in that dtype
            return float("nan")
        with torch.no_grad():
            after = list(_tensors(patched(**half)))
        for k, (a, b, c) in enumerate(zip(after, before, right, strict=True)):
            if a.numel() >= 256:  # a few numbers tell of chance alone
                ours[k] += _difference(a, c)
                own[k] += _difference(b, c)
        worst = max((ours[k] / own[k] for k in own if own[k] > 1e-4), default=1.0)
        if worst <= BF16:
            break
    return worst


def _stop(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def line(result: Result) -> str:
    numbers = f"{result.fp32:.0e} {result.gradients:.0e} {result.bf16:.2f}"
    return f"{result.family:32} {result.reached:9} {numbers:20} {result.shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", default="0/1", help="K/N: each Nth family, from the Kth on")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _stop)
    import transformers

    transformers.logging.set_verbosity_error()
    k, n = map(int, args.part.split("/"))
    lines, counts = [], Counter[str]()
    for family in (args.only or families())[k::n]:
        signal.alarm(SECONDS)
        try:
            result = check(family)
        except Exception as error:
            if len(args.only) == 1:
                traceback.print_exc()
            reached = "too long" if isinstance(error, TimeoutError) else "failed"
            text = f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
            result = Result(family, reached, text)
        finally:
            signal.alarm(0)
        counts[result.reached] += 1
        lines.append(line(result))
        print(lines[-1][:180], flush=True)
        if not args.only or args.out != RESULTS:
            args.out.write_text("\n".join([*lines, str(dict(counts)), ""]))
    print(dict(counts))


if __name__ == "__main__":
    sys.exit(main())
