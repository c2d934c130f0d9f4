"""Which cases a test marked `sampled` runs every day."""

import os
import re
import subprocess
import sys
from pathlib import Path

_TESTS = """
import pytest
from typing import NamedTuple

class Case(NamedTuple):
    kind: str
    size: int

@pytest.mark.sampled({count})
@pytest.mark.parametrize("dtype", "012")
@pytest.mark.parametrize("shape", "abcd")
@pytest.mark.parametrize("order", ["x", "y", pytest.param("z", marks=pytest.mark.gpu)])
def test_it(order, shape, dtype): pass

@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [Case(*c) for c in zip("aaaabb", range(6))], ids=lambda c: c.kind)
def test_kinds(case): pass
"""
_CONFTEST = """
import pytest, sampling

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items): sampling.mark_slow(items)
"""


def collect(path: Path, count: int, chosen: str) -> tuple[list[str], str]:
    """The cases that -m chooses, and all that pytest prints."""
    (path / "test_it.py").write_text(_TESTS.format(count=count))
    (path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  slow\n  sampled")
    (path / "conftest.py").write_text(_CONFTEST)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", chosen]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)
    return re.findall(r"::(\S+)", done.stdout), done.stdout + done.stderr


def test_every_value_is_in_the_sample_and_the_other_cases_are_slow(tmp_path: Path) -> None:
    everyday, _ = collect(tmp_path, 6, "not slow and not gpu")
    own = [name for name in everyday if name.startswith("test_it")]
    assert len(own) == 6
    assert {*"".join(re.findall(r"\[(.*)\]", " ".join(own)))} >= {*"012abcdxy"}
    kinds = [name[len("test_kinds[")] for name in everyday if name not in own]
    assert sorted(kinds) == ["a", "b"]
    slow, _ = collect(tmp_path, 6, "slow")
    assert not {*everyday} & {*slow}
    assert len({*everyday, *slow}) == 24 + 6
    gpu, _ = collect(tmp_path, 6, "gpu")
    assert len(gpu) == 12
    assert not {*gpu} & {*slow}


def test_a_sample_too_small_for_every_value_is_refused(tmp_path: Path) -> None:
    _, told = collect(tmp_path, 3, "not slow")
    assert re.search(r"test_it: sampled\(3\) leaves out shape='.', expected more cases", told), told
