"""Runs the folder `interpreted` in a process of its own, where Triton interprets on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("interpreted")
ROOT = FOLDER.parents[2]


def test_kernels_under_the_interpreter() -> None:
    # Not pytest's own variables: a worker's would make this process report to that worker's run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-n0", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout, result.stdout
