"""`benchmarks/parallel_gpu.py`: records and tables that ranks over Gloo make, which say nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.calls import Clock
from benchmarks.parallel_gpu import (
    EAGER,
    HOW,
    ON_ONE,
    PRODUCTS,
    add,
    kept,
    measured,
    slowest,
    table,
)
from benchmarks.peers import Block
from opsgraph.testing.distributed import Ranks

NAMES = (EAGER, "plain", "bulk", "pieces", "opsgraph", "kept", "symmetric")
CLOCK = Clock(2, 1, 1)
ROWS = 1024
"""From which exchanges between two ranks are cut into pieces."""


def body(rank: int, size: int, ranks: int) -> dict[str, Any]:
    block = Block(ROWS, 16, 32, torch.bfloat16, torch.device("cpu"), ranks=ranks)
    names = NAMES if ranks > 1 else ON_ONE
    return slowest(measured(block, names, False, CLOCK))


def test_each_way_is_measured_and_runs_what_it_says(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks.run(body, 2, 2)
    assert set(one["seconds"]) == {*NAMES, PRODUCTS}
    assert one["seconds"] == other["seconds"]  # of the slower rank
    assert not one["refused"]
    plans = one["plans"]
    assert "overlap" not in plans["plain"].split("rejected")[0]
    forward, backward = plans["bulk"].split("rejected")[0].split("backward")
    assert "overlap" not in forward
    assert "GatherLinearBackward" in backward
    assert "GatherLinear " in plans["pieces"]
    path = tmp_path / "found.json"
    add(ranks.run(body, 1, 1)[0], path, CLOCK)
    for record in (one, one):  # the second takes the first one's place
        add(record, path, CLOCK)
    records = kept(path)
    assert [record["ranks"] for record in records] == [1, 2]
    lines = table(records).splitlines()
    assert sum(line.startswith("(1024, 16, 32), bfloat16") for line in lines) == 2
    last = [line.split() for line in lines if line.split()[0] == "pieces"][-1]
    assert len(last) == 5  # name, wall, of products, of eager, efficiency
    wall = records[1]["seconds"]["pieces"]["wall"]["median"]
    assert float(last[1]) == pytest.approx(1e3 * wall, abs=1e-3)
    assert {"plain", "overlapped", "products"} <= set(records[1]["predicted"])


@pytest.mark.slow
def test_it_runs_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "benchmarks.parallel_gpu", "--device=cpu", "--sizes=64x16x32", f"--out={out}"]
    done = subprocess.run(
        [*command, "--repeats=1", "--steps=1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(out.read_text())["cases"]
    assert set(record["seconds"]) | set(record["refused"]) == {*HOW, PRODUCTS}
