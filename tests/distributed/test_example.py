"""The tensor-parallel example, on ranks that are there and started as a reader would."""

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from opsgraph.testing.distributed import Ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/tensor_parallel.py")
SIZES = ("--steps=8", "--hidden=64", "--layers=1", "--context=32", "--batch=4", "--every=1")


def as_under_torchrun(rank: int, size: int) -> tuple[int, str]:
    """The example's exit code and output, with the group that is there in place of torchrun's."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with (
        mock.patch.dict(os.environ, {name: str(number) for name, number in numbers.items()}),
        mock.patch.object(sys, "argv", [EXAMPLE, *SIZES]),
        mock.patch.object(sys, "path", [os.path.dirname(EXAMPLE), *sys.path]),
        mock.patch.object(dist, "init_process_group"),
        redirect_stdout(io.StringIO()) as output,
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(EXAMPLE, run_name="__main__")
    return int(end.value.code or 0), output.getvalue()


def check(output: str) -> None:
    rows = re.findall(r"^ +\d+ +(\d\.\d+) +(\d\.\d+) +\S+e\S+$", output, re.MULTILINE)
    losses = [(float(parallel), float(alone)) for parallel, alone in rows]
    assert len(losses) == 8
    assert all(abs(a - b) <= 2e-4 for a, b in losses)
    assert losses[-1][1] < losses[0][1], "it learns"
    assert "GatherLinear" in output


def test_two_ranks_train_to_the_losses_of_one_process(ranks: Ranks) -> None:
    (code, output), (other, _) = ranks.run(as_under_torchrun, 2, timeout=240)
    assert code == other == 0, output
    check(output)


@pytest.mark.slow
def test_it_runs_under_torchrun() -> None:
    """Two ranks; a port that is free is found by torchrun."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [EXAMPLE, *SIZES],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout)


@pytest.mark.slow
def test_it_says_how_to_start_it() -> None:
    alone = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, EXAMPLE],
        env={**alone, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
