"""The CPU's C++ kernels compiled by other compilers, and for other machines: the same tests.

ARM's run in an emulator: `apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from opsgraph.kernels.cpu import build

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CROSS, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (CROSS, EMULATOR) if shutil.which(tool) is None]
LOOPS = (
    "normalize", "add", "mean_square", "dots", "input_gradient", "add_weight_gradient", "add_row",
    "loaded", "stored", "accumulate", "biased", "forward_columns", "backward_columns",
)  # fmt: skip

pytestmark = pytest.mark.slow
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")
arm = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")

# Every activation's results in one number; multiply-adds are fused on both machines or on neither.
DIGEST = """
import hashlib, torch
from opsgraph.kernels.cpu import activations
torch.manual_seed(0)
made = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    x, dy, bias = torch.randn(70, 1208) * 3, torch.randn(70, 1208), torch.randn(1208)
    for name, kind in activations.KINDS.items():
        given = dy[:, :604] if kind.gated else dy
        y = activations.activation_forward(x.to(dtype), name, bias=bias)[0]
        want = ("x", "y", "bias")
        found = activations.activation_backward(given.to(dtype), x.to(dtype), name, want=want)
        for value in (y, *found):
            made.update(value.contiguous().view(torch.uint8).numpy().tobytes())
print(made.hexdigest())
"""


def python(*arguments: str, **environment: str) -> str:
    """What a fresh process prints; its failure is the test's."""
    # Not pytest's own variables: a worker's would make that process report to that worker's run.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    path = os.pathsep.join((str(ROOT), str(FOLDER / "emulated")))
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_tests(*arguments: str, **environment: str) -> str:
    """The tests of the kernels, in a process of their own."""
    files = [str(FOLDER / f"test_cpu_{name}.py") for name in ("kernels", "product")]
    command = ("-m", "pytest", *files, "-q", "-n0", "-k", "not tiles")
    told = python(*command, "-p", "no:cacheprovider", *arguments, **environment)
    assert " passed" in told
    assert "skipped" not in told, told
    return told


def compiled_in(cache: Path) -> list[Path]:
    """The libraries that a process left in a cache directory of its own."""
    found = sorted((cache / "opsgraph").glob("*.so"))
    assert len(found) == len(build.EVERYDAY)
    return found


def disassembled(*libraries: Path, tool: str = "objdump") -> str:
    command = [tool, "--disassemble", "--demangle", "--no-show-raw-insn", *map(str, libraries)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# The last is near to what macOS has.
@pytest.mark.parametrize(
    "command", ["g++", "g++-9", "g++-10", "g++-11", "clang++", "clang++ -stdlib=libc++"]
)
def test_compilers(command: str, tmp_path: Path) -> None:
    header = tmp_path / "header.cpp"
    header.write_text("#include <cmath>")
    try:
        subprocess.run([*command.split(), "-E", header], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"needs {command}")
    run_tests(CXX=command, XDG_CACHE_HOME=str(tmp_path))
    for library in compiled_in(tmp_path):
        assert b"omp.so" not in library.read_bytes(), "brings an OpenMP runtime of its own"


@x86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(
    "machine, has, lacks", [("x86-64", "xmm", "ymm"), ("haswell", "ymm", "zmm")]
)
def test_x86_with_fewer_instructions(machine: str, has: str, lacks: str, tmp_path: Path) -> None:
    if has == "ymm" and not torch.cpu._is_avx2_supported():
        pytest.skip("needs a CPU with AVX2")
    command = f"{build.compiler()[0]} -march={machine}"
    run_tests(CXX=command, XDG_CACHE_HOME=str(tmp_path))
    found = disassembled(*compiled_in(tmp_path))
    assert has in found
    assert lacks not in found


class Arm(NamedTuple):
    libraries: list[Path]
    command: str
    """Of the program that runs the libraries' kernels."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    """The libraries as they are built on ARM, and what runs them here."""
    folder = tmp_path_factory.mktemp("arm")
    compiler, serve = shutil.which(CROSS), folder / "serve"
    assert compiler is not None
    libraries = [folder / f"{name}.so" for name in build.EVERYDAY]
    for library in libraries:
        library.write_bytes(build._compiled(library.stem, [compiler]))
    command = [compiler, "-O1", "-fopenmp", str(FOLDER / "emulated" / "serve.cpp"), "-o"]
    subprocess.run([*command, str(serve), "-ldl"], check=True, timeout=300)
    return Arm(libraries, f"{EMULATOR} -L {SYSROOT} {serve} {' '.join(map(str, libraries))}")


@arm
def test_arm(emulated: Arm) -> None:
    some = "not tiles and not pairs and not threads"  # the program answers one thread
    told = run_tests("-p", "emulated", "-k", some, EMULATED=emulated.command)
    calls = re.search(r"(\d+) emulated calls, exit status 0", told)
    assert calls is not None, told
    assert int(calls[1]) > 1000, "not everything was emulated"


@arm
def test_arm_uses_its_vectors(emulated: Arm) -> None:
    told = disassembled(*emulated.libraries, tool=f"{CROSS[:-3]}objdump")
    bodies = re.split(r"\n\w+ <(?=.*>:\n)", told)
    found = set()
    for body in bodies:
        name = re.match(rf"(?:\S+ )*({'|'.join(LOOPS)})[<(]", body.partition("\n")[0])
        if name is not None:
            found.add(name[1])
            assert re.search(r"\tv\d+\.(4s|8h)", body), f"{body.partition(chr(10))[0]} is scalar"
            if name[1].endswith("_columns") and "Relu" not in body.partition("\n")[0]:
                assert re.search(r"\tfmla\tv\d+\.4s", body)
    assert found == set(LOOPS)


@arm
@x86
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs fused multiply-adds")
def test_activations_have_the_same_bits_on_arm(emulated: Arm) -> None:
    here = python("-c", DIGEST)
    there = python("-c", f"import emulated\n{DIGEST}", EMULATED=emulated.command)
    assert there.startswith(here)
