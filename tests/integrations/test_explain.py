"""`python -m opsgraph explain`: plans of what is named, and of a model that a config makes."""

import sys
from pathlib import Path

import pytest
from torch import nn

import opsgraph as og
from opsgraph.__main__ import main
from opsgraph.ops import Linear, RMSNorm


class Net(nn.Module):
    """Two equal sequences inside, and one in two plans."""

    def __init__(self) -> None:
        super().__init__()
        self.equal = nn.ModuleList(og.Sequential(RMSNorm(16), Linear(16, 16)) for _ in range(2))
        self.mlp = og.LayerNormMLP(16, 32, device="cpu")
        self.two = og.Sequential(RMSNorm(16), nn.Tanh(), Linear(16, 8))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "net", sys.modules[__name__])


def test_plans_of_all_that_has_some_equal_ones_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["explain", "net:Net", "--html", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    net = Net()
    assert f"equal.0, equal.1\n{net.equal[0].plan()}\n" in told
    assert f"mlp\n{net.mlp.plan()}\n" in told
    assert f"two\n{net.two.plan()}\n" in told
    pages = {"equal.0.html", "mlp.html", "two-0.html", "two-1.html"}
    assert {page.name for page in tmp_path.iterdir()} == pages
    assert all(f"wrote {tmp_path / page}" in told for page in pages)


def test_an_op_alone_is_a_sequence_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = Linear(16, 8)
    monkeypatch.setattr(sys.modules[__name__], "op", op, raising=False)
    assert main(["explain", "net:op"]) == 0
    assert capsys.readouterr().out == f"Linear\n{og.Sequential(op).plan()}\n\n"
    net = nn.Module()
    net.fc = op
    monkeypatch.setattr(sys.modules[__name__], "op", net)
    assert main(["explain", "net:op"]) == 0
    assert capsys.readouterr().out.startswith("fc\nforward\n")


def test_plans_of_inference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "net:Net", "--inference"]) == 0
    told = capsys.readouterr().out
    assert str(Net().mlp.plan(training=False)) in told
    assert "\nbackward\n" not in told


def test_a_config_of_transformers_makes_a_model_that_is_patched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    ).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path / "config.json"), "--layers", "1"]) == 0
    told = capsys.readouterr().out
    assert "residual(RMSNorm, Linear(gate, up), SwiGLU, Linear)" in told
    assert "layers.0" in told
    assert "layers.1" not in told


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("net:nothing",), "expected MODULE:OBJECT that can be imported"),
        (("net:Net", "--layers", "0"), "got --layers 0, expected at least 1"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["explain", *arguments])
    assert expected in capsys.readouterr().err


def test_a_config_without_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "config.json"])
    assert "expected MODULE:OBJECT, or transformers to be installed" in capsys.readouterr().err


def test_no_such_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match="2"):
        main(["explain", str(tmp_path)])
    assert "expected a config that makes a model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["explain", str(tmp_path / "none.json")])
    assert "none.json, expected a config.json that is there" in capsys.readouterr().err
