"""Every example runs in a process of its own, as a reader would start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str) -> str:
    """Standard output of an example that must succeed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # small sizes, and other tests run beside it
        "COLUMNS": "100",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # `make demo` trains it for longer
def test_byte_lm(tmp_path: Path) -> None:
    sizes = "--steps 12 --hidden 32 --layers 1 --context 32 --batch 4 --every 5 --sample 10"
    out = run("byte_lm", *sizes.split(), "--device", "cpu", "--out", str(tmp_path))
    for text in ("forward", "backward", "held-out loss", "steps per second", "bytes per token"):
        assert text in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_fp8_training(tmp_path: Path) -> None:
    sizes = "--steps 4 --hidden 32 --layers 1 --context 32 --batch 4 --seeds 2"
    out = run("fp8_training", *sizes.split(), "--device", "cpu", "--out", str(tmp_path))
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
def test_small_example(name: str, text: str) -> None:
    assert text in run(name)
