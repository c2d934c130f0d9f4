"""`python -m opsgraph bench`: what it compares is the same, and what it tells."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.__main__ import main
from opsgraph.features.convert import PlainOp
from opsgraph.ops import (
    GEGLU,
    GELU,
    GLU,
    Add,
    AddExtraInput,
    Dropout,
    Identity,
    LayerNorm,
    Linear,
    ReGLU,
    ReLU,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)
from opsgraph.tune.eager import Eager

ONCE = ("--rows", "8", "--seconds", "0", "--no-compile")
ACTIVATIONS = (GELU(), GELU("none"), ReLU(), SiLU(), SwiGLU(), ReGLU(), GEGLU(), GEGLU("none"))


class Net(nn.Module):
    """Two equal sequences, a LayerNormMLP, and a plain sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.equal = nn.ModuleList(
            og.Sequential(Residual(RMSNorm(16), Linear(16, 16))) for _ in range(2)
        )
        self.mlp = og.LayerNormMLP(16, 32, normalization="RMSNorm", device="cpu")
        self.plain = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 8))


def make_extra() -> og.Sequential:
    return og.Sequential(Linear(16, 16), AddExtraInput())


def lines(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> list[str]:
    """What the command prints, each run of spaces made one."""
    assert main(["bench", *ONCE, "--png", str(tmp_path / "bench.png"), *arguments]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *ONCE, *arguments])
    return capsys.readouterr().err


def test_a_table_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = lines(capsys, tmp_path, "--mlp", "16,32", "--device", "cpu")
    assert told[0].startswith("8 rows, bfloat16, cpu")
    assert told[1] == "RMSNorm, Linear, SwiGLU, Linear"
    assert told[2] == "step ms ratio inference ms ratio kept bytes/row"
    ours, theirs = told[3].split(), told[4].split()
    assert (ours[0], ours[2], ours[4]) == ("opsgraph", "1.00", "1.00")
    assert theirs[0] == "PyTorch"
    assert float(ours[1]) / float(theirs[1]) == pytest.approx(float(theirs[2]), abs=0.3)
    assert ours[5] == str(2 * 16 + 2 * 64 + 4)  # x, the pre-activation, rstd
    assert int(ours[5]) < int(theirs[5])
    assert told[5:] == [f"wrote {tmp_path / 'bench.png'}"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_has_each_kind_of_sequence_measured_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "net", sys.modules[__name__])
    told = lines(capsys, tmp_path, "net:Net")
    assert "Residual(RMSNorm, Linear) (2 times)" in told
    assert "RMSNorm, Linear" in told
    assert "RMSNorm, Linear, GELU, Linear" in told
    assert sum(line.startswith("opsgraph ") for line in told) == 3


def test_a_terminal_has_rich_tables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert any("│ PyTorch" in line for line in lines(capsys, tmp_path, "--mlp", "16,32"))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_eager_is_pytorchs_functions_and_computes_the_same(norm: Any, activation: og.Op) -> None:
    torch.manual_seed(0)
    halves = 1 + isinstance(activation, SwiGLU | ReGLU | GEGLU)
    ours = og.Sequential(
        Tee("r"),
        norm(16),
        Linear(16, 32 * halves),
        activation,
        Residual(Identity(), Linear(32, 32, bias=False)),
        og.Sequential(Linear(32, 16), Dropout(0.0)),
        nn.Tanh(),
        Add("r"),
        dtype=torch.float64,
    )
    eager = Eager(*ours)
    assert not [module for module in eager.modules() if isinstance(module, PlainOp)]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    values = [
        [y := module(x), *torch.autograd.grad(y.sum(), [x, *ours.parameters()])]
        for module in (ours, eager)
    ]
    torch.testing.assert_close(values[0], values[1])


def test_ops_that_pytorch_lacks_run_their_own_functions() -> None:
    ours = og.Sequential(RMSNorm(16, zero_centered_gamma=True), GLU())
    x = torch.randn(5, 16)
    torch.testing.assert_close(Eager(*ours)(x), ours(x))


def test_nothing_is_told_of_results_that_are_not_pytorchs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Wrong(og.Fuser):
        backend, pattern = "reference", dict(act=SwiGLU)

        def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
            gate, value = x.chunk(2, -1)
            return gate.relu() * value, ()

    with og.register(Wrong):
        told = refused(capsys, "--mlp", "16,32", "--dtype", "float32", "--device", "cpu")
    assert "got y that differs from PyTorch's by " in told
    assert "expected at most 0.0001 of its largest value" in told


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), "expected one of the two"),
        (("net:Net", "--mlp", "16,32"), "expected one of the two"),
        (("--mlp", "16"), "expected two sizes, as --mlp 1024,4096"),
        (("--mlp", "16,0"), "expected two sizes, as --mlp 1024,4096"),
        (("--mlp", "16,32", "--rows", "0"), "got --rows 0, expected at least 1"),
        (("net:nothing",), "expected MODULE:OBJECT that can be imported"),
        (("torch.nn:Identity",), "got Identity, expected a Sequential or a LayerNormMLP"),
        (("net:make_extra",), "AddExtraInput in a sequence"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "net", sys.modules[__name__])
    assert expected in refused(capsys, *arguments)


def test_a_candidate_that_fails_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: nn.Module) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no compiler\nmore of it")

        return Broken()

    monkeypatch.setattr(torch, "compile", broken)
    arguments = ("--rows", "8", "--seconds", "0", "--png", str(tmp_path / "bench.png"))
    assert main(["bench", "--mlp", "16,32", *arguments]) == 0
    told = capsys.readouterr().out
    assert "torch.compile failed: no compiler\n" in told
    assert "PyTorch" in told


@pytest.mark.slow
def test_torch_compile_is_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--rows", "8", "--seconds", "0", "--png", str(tmp_path / "bench.png"))
    assert main(["bench", "--mlp", "16,32", *arguments]) == 0
    assert "torch.compile " in capsys.readouterr().out
