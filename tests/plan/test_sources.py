"""Generated sources as text: a change of them is read as a diff.

`pytest --update-plans` writes `tests/plan/texts` again.
"""

from pathlib import Path

import pytest

from tests.plan.sources import NETS, RECIPES, Call

FOLDER = Path(__file__).parent / "texts"

CALLS = [
    *(Call("llama", "plain", recipe) for recipe in RECIPES),
    Call("large", "plain", "none"),
    *(Call("gpt", "delayed", recipe, cast=True) for recipe in ("none", "delayed", "current")),
    *(Call(net, "plain", "none", training=False) for net in NETS if net != "large"),
    *(Call("residual", options, "none") for options in ("plain", "keep", "checkpoint", "optimal")),
    *(Call(net, "frozen", "none", cast=True) for net in NETS if net != "large"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_source_is_the_expected_text(
    call: Call, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "aten,reference")  # the same on any machine
    text = call.text().rstrip() + "\n"
    path = FOLDER / f"{call.name}.txt"
    if pytestconfig.getoption("--update-plans"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_every_expected_source_belongs_to_a_call() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {call.name for call in CALLS}
