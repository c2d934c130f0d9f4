"""Runs tests in a process of their own, where Triton interprets its kernels on the CPU.

The folder `interpreted` tests kernels alone; the test of all fusers then finds Triton's there too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
ROOT = FOLDER.parents[2]


FUSERS = ROOT / "tests" / "fusers" / "test_fusers.py"


@pytest.mark.parametrize(
    "target, chosen",
    [
        pytest.param(FOLDER, "not torch.float16", id="kernels"),
        pytest.param(FOLDER, "torch.float16", id="kernels, fp16", marks=pytest.mark.slow),
        pytest.param(FUSERS, "torch.bfloat16", id="fusers"),
        pytest.param(FUSERS, "not torch.bfloat16", id="fusers, all else", marks=pytest.mark.slow),
    ],
)
def test_under_the_interpreter(target: Path, chosen: str) -> None:
    # Not pytest's own variables: a worker's would make this process report to that worker's run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    plugin = "tests.kernels.interpreted.quick_interpreter"
    command = [sys.executable, "-m", "pytest", str(target), "-q", "-n0", "-k", chosen, "-p", plugin]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout, result.stdout
