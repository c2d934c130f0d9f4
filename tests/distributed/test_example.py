"""The tensor-parallel example, started with torchrun as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks; a port that is free is found by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(ROOT / "examples/tensor_parallel.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_ranks_train_to_the_losses_of_one_process() -> None:
    sizes = "--steps 8 --hidden 64 --layers 1 --context 32 --batch 4 --every 1"
    done = torchrun(*sizes.split())
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +\d+ +(\d\.\d+) +(\d\.\d+) +\S+e\S+$", done.stdout, re.MULTILINE)
    losses = [(float(parallel), float(alone)) for parallel, alone in rows]
    assert len(losses) == 8
    assert all(abs(a - b) <= 2e-4 for a, b in losses)
    assert losses[-1][1] < losses[0][1], "it learns"
    assert "GatherLinear" in done.stdout


@pytest.mark.slow
def test_it_says_how_to_start_it() -> None:
    example = str(ROOT / "examples/tensor_parallel.py")
    alone = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, example],
        env={**alone, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
