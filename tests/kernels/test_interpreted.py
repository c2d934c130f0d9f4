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


EVERYDAY = "not gpu and not slow"


@pytest.mark.parametrize(
    "target, chosen, marked",
    [
        pytest.param(FOLDER, "not torch.float16", EVERYDAY, id="kernels"),
        pytest.param(FOLDER, "torch.float16", EVERYDAY, id="kernels, fp16", marks=pytest.mark.slow),
        pytest.param(
            FOLDER, "", "slow and not gpu", id="kernels, other cases", marks=pytest.mark.slow
        ),
        pytest.param(FUSERS, "torch.bfloat16", EVERYDAY, id="fusers"),
        pytest.param(
            FUSERS, "not torch.bfloat16", EVERYDAY, id="fusers, all else", marks=pytest.mark.slow
        ),
    ],
)
def test_under_the_interpreter(target: Path, chosen: str, marked: str) -> None:
    # Not pytest's own variables: a worker's would make this process report to that worker's run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    plugin = "tests.kernels.interpreted.quick_interpreter"
    command = [sys.executable, "-m", "pytest", str(target), "-q", "-n0", "-k", chosen, "-m", marked]
    result = subprocess.run(
        [*command, "-p", plugin, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, timeout=1800,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout, result.stdout
