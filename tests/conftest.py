"""What every test runs under: one thread, poisoned fresh memory, repeatable Hypothesis."""

import gc
import os
from collections.abc import Iterator

# For cuBLAS to be deterministic; read when CUDA starts, so before torch is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A pool of compile processes in each of two test processes only slows both down.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from broken_cuda import leave_if_broken, look_after, skip_unless_whole
from crashed import end_the_run
from hypothesis import settings
from quick_torch import leave_out
from sampling import mark_slow

from opsgraph.features import verify

# Each pytest-xdist worker is a process of its own and imports this file.
torch.set_num_threads(1)

settings.register_profile("dev", derandomize=True, deadline=None)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=30)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    """See `crashed`."""
    end_the_run(config)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are collected: there is none, and much to look at."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device; pyproject.toml deselects them before."""
    mark_slow(items)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have the names of folders, too
            item.add_marker(no_gpu)


_file = ""


def pytest_runtest_logstart(nodeid: str) -> None:
    """Have collections of garbage look at what the tests of a file make, and at nothing older.

    All else took a third of the time of all tests. See `quick_torch`, too.
    """
    global _file
    if (file := nodeid.partition("::")[0]) != _file:
        _file = file
        leave_out()
        gc.collect()
        gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """See `broken_cuda`."""
    skip_unless_whole(item)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """See `broken_cuda`."""
    look_after(item, call)


def pytest_runtest_logfinish() -> None:
    """See `broken_cuda`."""
    leave_if_broken()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory (`torch.empty` and its like) with NaN, or the largest integer.

    A kernel that leaves a part of its result unwritten then fails its test on every run.
    PyTorch fills only while deterministic algorithms are on.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unpoisoned() -> None:
    """Memory as PyTorch gives it, where filling it would take too long or be seen."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def verified_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every function that is generated, as OPSGRAPH_CHECK=1 does."""
    monkeypatch.setattr(verify, "every", True)


@pytest.fixture
def without_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that are the same whether there is a C++ compiler or not."""
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "triton,aten,reference")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the CPU, and with `-m gpu` on a CUDA device."""
    found: str = request.param
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --update-plans` writes the expected plans again instead of comparing with them."""
    parser.addoption("--update-plans", action="store_true", help="rewrite tests/plan/plans/*.txt")
