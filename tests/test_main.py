"""`python -m opsgraph`: doctor, ops, fusers."""

from typing import Any, ClassVar

import pytest
import torch

import opsgraph.ops
from opsgraph.__main__ import main
from opsgraph.base import backend
from opsgraph.base.backend import backends
from opsgraph.fuser import Fuser, register, registered
from opsgraph.fusers.cublaslt import products as cublaslt
from opsgraph.kernels.cpu import build, product
from opsgraph.ops import GELU, BasicLinear, Bias


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that a command prints, each with its runs of spaces made one."""
    assert main(arguments) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_doctor_prints_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "doctor")
    assert f"torch {torch.__version__}" in lines
    for name in ("python", "opsgraph", "triton", "networkx", "cpu"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert any(line.startswith("cuda") for line in lines)


def test_doctor_says_of_each_backend_that_it_is_there_or_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, "doctor")
    for known in backends().values():
        why_not = known.why_not()
        state = "there" if why_not is None else f"absent: {why_not}"
        assert f"{known.name} {known.about} {state}" in lines


def test_doctor_says_which_formats_are_emulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = backend.Backend("cublaslt", "scaled GEMMs", probe=lambda: "no CUDA device")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", absent)
    for name in ("FP8, a scale per row", "NVFP4"):
        assert f"{name} emulated" in printed(capsys, "doctor")
    monkeypatch.setattr(cublaslt, "chip", lambda: 0)
    everywhere = backend.Backend("cublaslt", "the same calls")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", everywhere)
    lines = printed(capsys, "doctor")
    assert "FP8, a scale per row scaled GEMMs" in lines
    assert "NVFP4 emulated: units for it are those of sm_100" in lines


def test_doctor_says_what_multiplies_on_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "reason", lambda library: None)
    monkeypatch.setattr(product, "room", lambda unit, depth: 0 if unit == "tiles" else 64)
    lines = printed(capsys, "doctor")
    assert "pairs AVX-512's dot products of pairs there" in lines
    assert "tiles AMX absent: this CPU has none" in lines
    monkeypatch.setattr(build, "reason", lambda library: "no C++ compiler")
    assert "floats fp32 multiply-adds absent: no C++ compiler" in printed(capsys, "doctor")


def test_ops_lists_every_op_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ops")
    assert [line.split()[0] for line in lines] == sorted(opsgraph.ops.__all__, key=str.lower)
    assert all(len(line.split()) > 1 for line in lines), "an op without a docstring"


def test_fusers_lists_every_fuser(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "fusers")
    assert len(lines) == len(registered()) > 0
    for fuser in registered():
        assert any(line.startswith(f"{fuser.backend} {fuser.name} ") for line in lines)


def test_fusers_shows_passes_and_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    class Probe(Fuser):
        backend = "reference"
        pattern: ClassVar[dict[str, Any]] = dict(fc=BasicLinear, bias=Bias | None, act=GELU)

        def fwd(self, fc: BasicLinear, x: torch.Tensor) -> None: ...

    with register(Probe):
        lines = printed(capsys, "fusers")
    assert "reference Probe forward fc=BasicLinear, bias=Bias | None, act=GELU" in lines
    assert lines != printed(capsys, "fusers")


@pytest.mark.parametrize("arguments", [[], ["cure"]])
def test_an_unknown_command_is_an_error_that_lists_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: opsgraph" in capsys.readouterr().err
