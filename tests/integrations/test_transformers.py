"""`patch` on models of transformers, which is imported here alone."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import families
from opsgraph.integrations.transformers import patch, unpatch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it
IDS = torch.arange(5, 21).view(2, 8)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A patched model, and a plain one with the same weights."""
    plain = families.build("llama")
    patched = copy.deepcopy(plain)
    patch(patched)
    return patched, plain


def _gradients(model: Any) -> list[Tensor | None]:
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def _same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_generate_gives_the_same_tokens(llama: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    patched, plain = (model.generate(IDS, **options) for model in llama)
    assert torch.equal(patched, plain)


def test_what_is_saved_is_a_plain_model(llama: Any, tmp_path: Path) -> None:
    patched, plain = llama
    patched.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert torch.equal(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored < 1.1 * sum(p.nbytes for p in plain.parameters()) + 10_000


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(llama: Any, reentrant: bool) -> None:
    patched, plain = llama
    expected = _gradients(plain)
    model = copy.deepcopy(patched).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    _same(_gradients(model), expected)
    assert len(calls) == 2  # the layer is run again


@pytest.mark.slow
def test_torch_compile(llama: Any) -> None:
    patched, plain = llama
    model = copy.deepcopy(patched)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    _same(_gradients(compiled), _gradients(plain))


def test_the_same_model_after_unpatch(llama: Any) -> None:
    patched, plain = llama
    model = copy.deepcopy(patched)
    unpatch(model)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


_REDUCED = {
    "bert": "residual(Linear, GELU, Linear), LayerNorm",
    "gemma2": "residual(RMSNorm, Linear(gate, up), GEGLU, Linear, RMSNorm)",
    "gpt2": "residual(LayerNorm, TransposedLinear, GELU, TransposedLinear)",
    "llama": "residual(RMSNorm, Linear(gate, up), SwiGLU, Linear)",
    "phi3": "residual(RMSNorm, Linear, SwiGLU, Linear)",
    "t5": "residual(RMSNorm, Linear, ReLU, Linear)",
}


@pytest.mark.parametrize(
    "family",
    [f if f in ("gemma2", "phi3") else pytest.param(f, marks=pytest.mark.slow) for f in _REDUCED],
)
def test_a_family_runs_as_plans_with_its_results(family: str) -> None:
    result = families.check(family)
    assert result.reached == "full", families.line(result)
    assert _REDUCED[family] in result.shown.split("; ")
    assert result.bf16 <= families.BF16


def test_the_page_about_models_has_the_counts_of_the_table() -> None:
    counts = Counter(families.listed().values())
    last = families.RESULTS.read_text().splitlines()[-1]
    assert last == str({name: counts[name] for name in eval(last)})
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for reached in ("full", "part", "none", "beyond"):
        assert f"| {reached} | {counts[reached]} |" in page
    left = counts["not built"] + counts["too long"] + counts["failed"]
    assert f"| not built, too long | {left} |" in page
    assert f"Of {counts.total()} types" in page


def test_experts_run_in_fp64_beside_a_mixture() -> None:
    result = families.check("mixtral")
    assert "experts(GroupedLinear, SwiGLU, GroupedLinear)" in result.shown
    assert 0 < result.bf16 <= families.BF16


@pytest.mark.families
@pytest.mark.parametrize("family, reached", families.listed().items())
def test_every_family(family: str, reached: str) -> None:
    result = families.check(family)
    assert result.reached in (reached, "full", "part"), families.line(result)


def test_the_page_about_models_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    blocks = page.read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(block.partition("```")[0], {})
