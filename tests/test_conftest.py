"""The tests' own guards hold."""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    x = torch.ones(4, dtype=dtype)
    for fresh in (torch.empty(4, dtype=dtype), torch.empty_like(x), x.new_empty(4)):
        assert fresh.float().isnan().all()


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_seeds_wait_for_no_device_with_the_stack_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack was formatted"))
    torch.manual_seed(0)


_TORCH = """
class cuda:
    broken = False
    is_initialized = staticmethod(lambda: True)

    @classmethod
    def synchronize(cls):
        if cls.broken:
            raise RuntimeError("an illegal memory access")
"""
_CONFTEST = """
import broken_cuda

def pytest_runtest_setup(item): broken_cuda.skip_unless_whole(item)
def pytest_runtest_makereport(item, call): broken_cuda.look_after(item, call)
def pytest_runtest_logfinish(): broken_cuda.leave_if_broken()
"""
_TESTS = """
import pytest, torch

@pytest.mark.gpu
def test_that_breaks():
    torch.cuda.broken = True
    assert False

@pytest.mark.gpu
def test_after(): assert not torch.cuda.broken

def test_without_a_device(): pass
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", "1 failed, 1 passed, 1 skipped"), ("-n1 -pxdist", "2 failed, 2 passed")],
)
def test_what_breaks_the_device_hides_no_other_result(
    tmp_path: Path, options: str, expected: str
) -> None:
    """The second failure is the process that ended."""
    done = run(tmp_path, options, torch=_TORCH, conftest=_CONFTEST, test_it=_TESTS)
    assert re.search(rf"\b{expected} in ", done.stdout), done.stdout + done.stderr
    assert options or "test_that_breaks broke CUDA: an illegal memory access" in done.stdout


_ABORTING = """
import os, pytest

@pytest.mark.parametrize("case", range(40))
def test_it(case): assert case != 7 or os.abort()
"""


def test_a_process_that_crashes_ends_the_run(tmp_path: Path) -> None:
    conftest = "import crashed\ndef pytest_configure(config): crashed.end_the_run(config)"
    options = "-n2 -pxdist --dist=loadgroup"
    done = run(tmp_path, options, conftest=conftest, test_it=_ABORTING)
    assert done.returncode == 1
    assert re.search(r"worker 'gw\d' crashed while running .*test_it\[7\]", done.stdout), (
        done.stdout
    )


def run(folder: Path, options: str, **modules: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder with these modules, and those of this one."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join((str(folder), str(Path(__file__).parent)))
    command = [sys.executable, "-m", "pytest", "-rs", "-pno:cacheprovider", *options.split()]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
