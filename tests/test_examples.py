"""Every example runs in a process of its own, as a reader would start it."""

import json
import os
from pathlib import Path

import fresh
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """Standard output of an example that must succeed."""
    environment = {**os.environ, "COLUMNS": "100"}
    done = fresh.run(EXAMPLES / f"{name}.py", folder, environment, *arguments)
    assert done.code == 0, done.output + done.error
    return done.output


@pytest.mark.slow  # `make demo` trains it for longer
def test_byte_lm(tmp_path: Path) -> None:
    sizes = "--steps 12 --hidden 32 --head-width 16 --layers 1 --context 32 --batch 4 --sample 10"
    out = run("byte_lm", tmp_path, *sizes.split(), "--device", "cpu", "--out", str(tmp_path))
    for text in ("forward", "backward", "held-out loss", "ms a step", "bytes a token"):
        assert text in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "def backward" in (tmp_path / "plan.html").read_text()
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["steps"] == 12
    names = {"opsgraph", "torch.compile", "PyTorch"}
    assert {*figures["runs"]} == {f"{name}, bf16" for name in names} | {
        "opsgraph, fp32",
        "PyTorch, fp32",
    }
    ours, theirs = (figures["runs"][f"{name}, bf16"] for name in ("opsgraph", "PyTorch"))
    assert ours["saved_bytes_per_token"] < theirs["saved_bytes_per_token"]


def test_fp8_training(tmp_path: Path) -> None:
    sizes = "--steps 4 --hidden 32 --layers 1 --context 32 --batch 4 --seeds 2"
    out = run("fp8_training", tmp_path, *sizes.split(), "--device", "cpu", "--out", str(tmp_path))
    for name in ("bf16", "DelayedScaling", "NVFP4BlockScaling", "QuantizeGrad"):
        assert name in out
    assert (tmp_path / "fp8_loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, text",
    (
        ("layernorm_mlp", "fc1_weight"),
        ("custom_op", "gradcheck"),
        ("custom_fuser", "LinearSquaredReLU"),
    ),
)
def test_small_example(name: str, text: str, tmp_path: Path) -> None:
    assert text in run(name, tmp_path)
