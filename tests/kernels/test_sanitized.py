"""The CPU's kernels, compiled with AddressSanitizer, read and write nothing that is not theirs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitized_kernels.py")
REPOSITORY = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
SECONDS = 60


def _of_the_compiler(name: str) -> str:
    """Where the compiler's library of that name is; the name itself where it has none."""
    assert COMPILER is not None
    command = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMPILER is None or not os.path.isabs(_of_the_compiler("libasan.so")),
        reason="there is no g++ with AddressSanitizer",
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process whose kernels are watched."""
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = folder / "compiler"
    flags = "-fsanitize=address -g1 -fno-omit-frame-pointer"
    compiler.write_text(f'#!/bin/sh\nLD_PRELOAD= exec {COMPILER} {flags} "$@"\n')
    compiler.chmod(0o755)
    # libstdc++ too, or AddressSanitizer finds nothing to throw PyTorch's exceptions with.
    preloaded = map(_of_the_compiler, ("libasan.so", "libstdc++.so.6"))
    return {
        **os.environ,
        "CXX": str(compiler),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


def _run(environment: dict[str, str], seconds: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), seconds, "0"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=3600
    )


def test_no_kernel_reads_or_writes_past_what_it_is_given(environment: dict[str, str]) -> None:
    """First that one which does is found."""
    control = _run(environment, "control")
    assert control.returncode != 0
    assert "heap-buffer-overflow" in control.stderr, control.stderr[-2000:]
    assert "norms.h" in control.stderr
    swept = _run(environment, str(SECONDS))
    assert swept.returncode == 0, swept.stderr[-4000:]
    assert int(swept.stdout.split()[0]) >= 20
