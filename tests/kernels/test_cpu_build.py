"""The library of the CPU's kernels: first use by many, bad caches, compilers that are not there.

A script that hands out the library compiled already stands for the compiler, but for what needs
none: so a test takes a process at most, not a compilation.
"""

import errno
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import fresh
import pytest

from opsgraph.kernels.cpu import build

REASON = build.why_not()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))

RUN = """
import torch
from opsgraph.kernels.cpu import activations, build
x = torch.randn(4, 8)
y = activations.activation_forward(x, "relu")[0]
assert torch.equal(y, x.clamp(min=0))
print(build.library("activations")._name)
"""

PLAN = """
import torch, opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU
from opsgraph.testing import assert_same
mlp = og.Sequential(RMSNorm(8), Linear(8, 32), SwiGLU(), Linear(16, 8))
reference = og.Sequential(*mlp, backends=("reference",))
x = torch.randn(4, 8)
assert_same(mlp(x), reference(x), "y")
mlp(x).sum().backward()
plan = mlp.plan(training=True)
assert "cpu" not in {step.backend for step in (*plan.forward, *plan.backward)}
why = [run.told() for run in (plan.passes.forward, plan.passes.backward)]
assert why == [[f"in Python: {next(r.reason for r in plan.rejected if r.name == 'cpu')}"]] * 2, why
print(*(r.reason for r in plan.rejected if r.name == "cpu"), sep="\\n")
"""


class Home:
    """A cache directory of its own, and a compiler that copies the library there is."""

    def __init__(self, path: Path) -> None:
        self.cache, self.temporary, self.log = path / "cache", path / "tmp", path / "log"
        self.temporary.mkdir()
        self.compiler = path / "compiler"
        self.script('sleep 0.2\ncp "$COMPILED" "$out"')
        self.environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(self.cache),
            "TMPDIR": str(self.temporary),
            "CXX": str(self.compiler),
            "COMPILED": "" if REASON else build.library("activations")._name,
            "LOG": str(self.log),
        }

    def script(self, body: str) -> None:
        """Have the compiler do that, $out being the file to make."""
        find = 'for a in "$@"; do [ "$last" = -o ] && out="$a"; last="$a"; done'
        self.compiler.write_text(f'#!/bin/sh\necho run >> "$LOG"\n{find}\n{body}\n')
        self.compiler.chmod(0o755)

    def start(self, code: str) -> fresh.Started:
        """A process in which nothing has been loaded."""
        return fresh.start(code, self.cache.parent, self.environment)

    def run(self, code: str = RUN) -> str:
        """What it prints, without its end of line; its failure is the test's."""
        done = self.start(code).done()
        assert done.code == 0, done.error
        return done.output.strip()

    @property
    def compiled(self) -> int:
        """How often the compiler ran."""
        return self.log.read_text().count("run") if self.log.exists() else 0

    def files(self) -> list[Path]:
        return sorted((self.cache / "opsgraph").iterdir())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def here(home: Home, monkeypatch: Any) -> Home:
    """The same for this very process."""
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(home.temporary))
    return home


@needs_compiler
def test_the_library_is_compiled_once_and_kept(home: Home) -> None:
    first = home.run()
    assert Path(first).parent == home.cache / "opsgraph"
    assert home.run() == first
    assert home.compiled == 1
    assert stat.S_IMODE((home.cache / "opsgraph").stat().st_mode) == 0o700


TOGETHER = """
from opsgraph.kernels.cpu import build
print(build.why_not(), len(build._found))
"""


@needs_compiler
def test_libraries_are_compiled_side_by_side_and_that_of_recipes_is_not(home: Home) -> None:
    """Each compiler waits for the others, and fails if they do not come."""
    count = len(build.EVERYDAY)
    everyone = f'[ $(wc -l < "$LOG") -eq {count} ] && cp "$COMPILED" "$out" && exit'
    home.script(f"for n in $(seq 200); do {everyone}; sleep 0.1; done; exit 1")
    assert home.run(TOGETHER) == f"None {count}"
    names = {path.name.partition("-")[0] for path in home.files()}
    assert names == set(build.EVERYDAY)
    assert home.run(TOGETHER) == f"None {count}"
    assert home.compiled == count


ONE_FAILS = """
import torch
from opsgraph.kernels.cpu import build
from opsgraph.kernels.cpu.quantize import quantize
from opsgraph.kernels.formats import E4M3, Format
for _ in range(2):
    try:
        quantize(torch.ones(2, 2), Format("tensor", E4M3))
    except build.BuildError as error:
        print(error)
print(build.why_not(), build.reason("quantize"))
"""


@needs_compiler
def test_a_library_that_does_not_compile_leaves_the_others(home: Home) -> None:
    failing = 'case "$*" in *quantize.cpp*) echo "quantize.h:1: error: boom"; exit 1;; esac >&2'
    home.script(f'{failing}\ncp "$COMPILED" "$out"')
    reason = f"the C++ compiler {home.compiler} failed: quantize.h:1: error: boom"
    assert home.run(ONE_FAILS).splitlines() == [reason, reason, f"None {reason}"]


@needs_compiler
def test_processes_that_start_together(home: Home) -> None:
    started = [home.start(RUN) for _ in range(3)]
    found = [one.done() for one in started]
    assert [done.code for done in found] == [0] * 3, found
    assert len({done.output for done in found}) == 1
    assert [str(path) for path in home.files()] == [found[0].output.strip()]


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "short", "a byte off"])
def test_a_damaged_file_is_made_again(here: Home, damage: bytes | None) -> None:
    path = Path(build._load("activations")._name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it is mapped here
    path.write_bytes(bytes(content) if damage is None else damage)
    path.chmod(0o600)
    assert build._load("activations")._name == str(path)
    assert here.compiled == 2


@needs_compiler
def test_an_interrupted_compilation_leaves_no_trap(here: Home) -> None:
    (here.cache / "opsgraph").mkdir(parents=True, mode=0o700)
    (here.cache / "opsgraph" / "left.tmp").write_bytes(b"\x7fELF")
    assert Path(build._load("activations")._name) in here.files()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(here: Home) -> None:
    here.cache.write_text("a file where the directory should be")
    path = Path(build._load("activations")._name)
    assert path.parent.parent == here.temporary
    assert build._load("activations")._name == str(path)
    assert here.compiled == 1


@needs_compiler
def test_nothing_is_loaded_that_others_can_write(here: Home) -> None:
    mine = Path(build._load("activations")._name)
    mine.parent.chmod(0o777)
    other = Path(build._load("activations")._name)
    assert other.parent.parent == here.temporary
    other.parent.chmod(0o777)
    assert "writable by others" in here.run(PLAN)


@needs_compiler
def test_no_library_is_loaded_that_others_made_or_can_write(here: Home, monkeypatch: Any) -> None:
    """Of those in our own directory, on any way that they may have come there."""
    path = Path(build._load("activations")._name)
    assert build._intact(path)
    path.chmod(0o666)
    assert not build._intact(path), "others can write it"
    assert Path(build._load("activations")._name) == path, "it is made again in its place"
    assert here.compiled == 2
    assert build._intact(path)
    link = path.with_name(f"link{path.name}")
    link.symlink_to(path)
    assert not build._intact(link), "a link leads anywhere"
    here.cache.chmod(0o777)
    assert not build._intact(path), "others can put another directory there"
    here.cache.chmod(0o1777)
    assert build._intact(path), "not where it is sticky"
    monkeypatch.setattr(
        Path, "lstat", lambda path: os.stat_result((0o600, 0, 0, 0, 6789, *[0] * 5))
    )
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not build._intact(path), "another user's"


@needs_compiler
def test_a_link_in_the_temporary_directory_is_not_followed(here: Home) -> None:
    here.cache.write_text("a file where the directory should be")
    elsewhere = here.cache.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    (here.temporary / f"opsgraph-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build._load("activations")
    assert not list(elsewhere.iterdir())


@needs_compiler
def test_a_full_disk_is_left_for_the_temporary_directory(here: Home, monkeypatch: Any) -> None:
    def full(source: Any, target: Path) -> None:
        if "cache" in target.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", full)
    path = Path(build._load("activations")._name)
    assert path.parent.parent == here.temporary
    assert build._load("activations")._name == str(path)
    assert here.compiled == 1
    assert not here.files(), "nothing is left half written"
    assert list(path.parent.iterdir()) == [path]


@needs_compiler
def test_a_library_that_the_system_will_not_load_is_made_elsewhere(
    here: Home, monkeypatch: Any
) -> None:
    def load(path: str) -> Any:
        if "cache" in Path(path).parts:
            raise OSError(f"{path}: failed to map segment from shared object")
        return library(path)

    library = build.ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", load)
    assert Path(build._load("activations")._name).parent.parent == here.temporary
    assert Path(build._load("activations")._name).parent.parent == here.temporary
    assert here.compiled == 1


@needs_compiler
def test_without_a_temporary_directory_what_is_kept_is_used(here: Home, monkeypatch: Any) -> None:
    path = build._load("activations")._name
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/such"])
    assert build._load("activations")._name == path
    Path(path).unlink()
    with pytest.raises(build.BuildError, match="No usable temporary directory"):
        build._load("activations")


def test_a_relative_cache_directory_is_ignored(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert next(build.directories()) == tmp_path / ".cache" / "opsgraph"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    assert next(build.directories()) == tmp_path / "given" / "opsgraph"


CPUS = {
    "AVX-512": "processor: 0\nmodel name\t: X\nMHz: {n}\nflags\t\t: sse2 avx2 fma avx512f\n",
    "AVX2": "processor: 0\nmodel name\t: X\nMHz: {n}\nflags\t\t: sse2 avx2 fma\n",
    "NEON": "processor\t: 0\nBogoMIPS\t: {n}\nFeatures\t: fp asimd\n",
    "SVE": "processor\t: 0\nBogoMIPS\t: {n}\nFeatures\t: fp asimd sve\n",
}


def test_machines_that_share_a_home_keep_libraries_apart(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")
    keys = {}
    for name, text in CPUS.items():
        for n in range(2):  # what varies from one moment to the next does not count
            build.CPUINFO.write_text("\n".join([text.format(n=n)] * 4))
            keys.setdefault(name, set()).add(build._key([sys.executable]))
    assert [len(found) for found in keys.values()] == [1] * 4
    assert len(set.union(*keys.values())) == 4
    build.CPUINFO.unlink()
    assert build._key([sys.executable]) not in set.union(*keys.values())
    other = {build._key([sys.executable, "-march=haswell"]), build._key(["/bin/sh"])}
    assert len(other | {build._key([sys.executable])}) == 3


def test_without_a_compiler_the_next_backend_runs_and_doctor_says_why(home: Home) -> None:
    del home.environment["CXX"]
    home.environment["PATH"] = str(home.temporary)
    reason = "no C++ compiler: none of c++, g++ and clang++ is found"
    assert home.run(PLAN) == reason
    told = home.run("from opsgraph.__main__ import main; main(['doctor'])")
    assert f"absent: {reason}" in told


@pytest.mark.parametrize(
    "body, reason",
    [
        (
            "echo 'activations.cpp:1: error: boom' >&2; exit 1",
            "failed: activations.cpp:1: error: boom",
        ),
        (r"printf '\344: error: boom' >&2; exit 1", "failed: .: error: boom"),
        ('[ "$LC_ALL" = C ] && echo in English >&2; exit 1', "failed: in English"),
        ("exit 3", "failed: exit status 3"),
        ('echo nonsense > "$out"', "file too short"),
        ("exit 0", "No such file or directory: .*activations.so"),
    ],
    ids=["an error", "no text", "in English", "a silent failure", "no library", "nothing"],
)
def test_a_compiler_that_fails_is_a_reason(here: Home, body: str, reason: str) -> None:
    here.script(body)
    with pytest.raises(build.BuildError, match=reason):
        build._load("activations")


def test_a_compiler_that_is_not_there_is_a_reason(here: Home, monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler is not found"):
        build._load("activations")


@needs_compiler
def test_a_compiler_of_another_machine_gets_other_flags(here: Home) -> None:
    here.script('case "$*" in *prefer-vector*|*mtune*) exit 1;; esac\ncp "$COMPILED" "$out"')
    build._load("activations")
    assert here.compiled == 3


def test_a_compiler_that_is_told_the_machine_gets_no_other(here: Home, monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", f"{here.compiler} -march=x86-64-v3")
    here.script('echo "error: $*" >&2; exit 1')
    with pytest.raises(build.BuildError, match="failed: error: -march=x86-64-v3 -std") as raised:
        build._load("activations")
    assert "native" not in str(raised.value)
    assert here.compiled == 1


def test_a_compiler_that_does_not_end_is_a_reason(here: Home, monkeypatch: Any) -> None:
    here.script("exec sleep 60")
    monkeypatch.setattr(build, "TIMEOUT", 0.5)
    with pytest.raises(build.BuildError, match=r"compiler did not end within 0.5 s"):
        build._load("activations")
    assert here.compiled == 1


FORK = """
import os, torch
from opsgraph.kernels.cpu import activations
torch.set_num_threads(2)
x = torch.randn(4096, 64)
first = activations.activation_forward(x, "silu")[0]
child = os.fork()
if child == 0:
    again = activations.activation_forward(x, "silu")[0]
    torch.set_num_threads(1)  # PyTorch's own operators would wait for the parent's threads
    os._exit(0 if torch.equal(first, again) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_compiler
def test_fork_after_first_use(home: Home) -> None:
    assert home.run(FORK) == "0"


THREADS = """
import threading, torch
from opsgraph.kernels.cpu import activations
x = torch.randn(2048, 64)
found = []
def work():
    torch.set_num_threads(2)
    for _ in range(20):
        found.append(activations.activation_backward(x, x, "gelu", want=("x", "y", "bias")))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(found) == 80
print(all(torch.equal(a, b) for made in found for a, b in zip(made, found[0])))
"""


@needs_compiler
def test_threads_that_start_together(home: Home) -> None:
    assert home.run(THREADS) == "True"
    assert home.compiled == 1
