"""A plan's page: what it says, that it asks for nothing, and in a browser what keys do."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import BasicLinear, Bias, Linear, RMSNorm, SiLU
from opsgraph.plan.lines import Line

VOID = {"meta", "input"}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Greedy(og.Fuser):
    """Linear, bias and SiLU in one; it cannot hand out what SiLU's backward needs."""

    backend, pattern = "reference", dict(fc=BasicLinear, bias=Bias, act=SiLU)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> tuple[Tensor, tuple[()]]:
        return nn.functional.silu(nn.functional.linear(x, fc_weight, bias_bias)), ()


class Reader(HTMLParser):
    """Elements with their attributes and all text inside; raises for what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = dict(attrs, tag=tag, text="")
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, Any]]:
        """Elements of a tag that have the classes or attributes given."""
        return [
            element
            for element in self.found
            if element["tag"] == tag
            and all(value in element.get(name, "").split() for name, value in attributes.items())
        ]


@pytest.fixture
def plan() -> og.Plan:
    """A plan with a refusal."""
    with og.register(Greedy):
        layers = RMSNorm(8), Linear(8, 4), SiLU(), Linear(4, 8, bias=False)
        return og.Sequential(*layers, backends=("reference",)).plan()


@pytest.fixture
def page(plan: og.Plan, tmp_path: Path) -> Path:
    plan.draw(tmp_path / "plan.html")
    return tmp_path / "plan.html"


def test_every_step_refusal_and_kept_value_is_there_with_its_facts(
    plan: og.Plan, page: Path
) -> None:
    read = Reader(page.read_text())
    facts = {article["id"]: article["text"] for article in read.all("article")}
    for kind, steps in (
        ("taken", (*plan.forward, *plan.backward)),
        ("refused", [refused for refused in plan.rejected if refused.ops]),
    ):
        buttons = read.all("button", **{"class": kind})
        assert sorted(button["text"] for button in buttons) == sorted(
            f"{step.name}{'refused, ' * (kind == 'refused')}{step.backend}" for step in steps
        )
        assert all(button["data-facts"] in facts for button in buttons)
    [greedy] = read.all("button", **{"class": "refused"})
    assert "backward needs x3" in facts[greedy["data-facts"]]
    assert "grid-area: 4 / 2 / auto / 5" in greedy["style"]  # ops 1 to 3, below what is taken
    values = read.all("button", **{"class": "value"})
    assert [value["text"] for value in values] == [
        f"{n} {size:,} B" for n, size in plan.saved.items()
    ]
    x0 = facts["value x0"]
    assert "32 bytes per row" in x0
    assert "made bythe caller" in x0
    assert "needed by0 reference" in x0
    assert [op["text"] for op in read.all("div", **{"class": "op"})] == [
        f"{number} {kind}" for number, kind in zip(plan.numbers, plan.kinds, strict=True)
    ]


def test_the_source_is_whole_and_its_lines_belong_to_steps(plan: og.Plan, page: Path) -> None:
    read = Reader(page.read_text())
    assert [pre["text"] for pre in read.all("pre")] == [plan.forward_source, plan.backward_source]
    keys = {line["data-key"] for line in read.all("span") if "data-key" in line}
    for button in read.all("button", **{"class": "taken"}):
        assert button["data-key"] in keys, button["text"]


def test_it_asks_for_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    for element in Reader(text).found:
        assert not {"src", "href", "srcset", "action", "data"} & {*element}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    [policy] = [m for m in Reader(text).all("meta") if m.get("http-equiv")]
    assert policy["content"].startswith("default-src 'none';")


def test_a_long_plan_has_a_page_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is looked at once, however many values are kept."""
    layers = [layer for _ in range(100) for layer in (RMSNorm(8), Linear(8, 8, bias=False), SiLU())]
    plan = og.Sequential(*layers, backends=("reference",)).plan()
    seen = 0
    reads: Any = vars(Line)["reads"]

    def counted(line: Line) -> list[str]:
        nonlocal seen
        seen += 1
        return reads.__get__(line, Line)  # type: ignore[no-any-return]

    monkeypatch.setattr(Line, "reads", property(counted))
    plan.draw(tmp_path / "plan.html")
    assert len(plan.saved) >= 200
    assert seen == len(plan.functions.backward.lines)


def test_a_name_with_markup_stays_text(tmp_path: Path) -> None:
    class Strange(og.Op):
        def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
            return x, ()

    Strange.__name__ = "<script>&"
    html = og.Sequential(Strange(), RMSNorm(8))._repr_html_()
    assert "&lt;script&gt;&amp;" in html
    assert "<script" not in html


def test_notebooks_show_a_sequence_with_its_plan() -> None:
    mlp = og.Sequential(RMSNorm(8), Linear(8, 4), backends=("reference",))
    for shown, source in (
        (mlp.plan()._repr_html_(), "def backward"),
        (mlp._repr_html_(), "0): RMSNorm"),
    ):
        read = Reader(shown)
        assert "RMSNormreference" in [box["text"] for box in read.all("div", **{"class": "taken"})]
        assert not read.all("button")  # which nothing would listen to
        assert source in shown
        assert not read.all("script")
    assert "def backward" not in mlp.eval()._repr_html_()
    assert "no plan yet: " in og.Sequential(SiLU())._repr_html_()
    between = og.Sequential(RMSNorm(8), nn.Tanh(), Linear(8, 4))._repr_html_()
    assert between.count('class="op"') == 3


PRESSES = """
<script>
const log = [], seen = () => ({
  pressed: buttons.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.innerText),
  focus: document.activeElement.innerText,
  facts: [...document.querySelectorAll("article:not([hidden])")].map((a) => a.innerText),
  marked: lines.filter((line) => line.classList.contains("marked")).map((line) => line.innerText),
  shown: shown().length,
});
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
log.push(seen());
buttons[0].focus();
for (const key of ["ArrowRight", "ArrowDown", "End", "Home"]) { press(key); log.push(seen()); }
lines.find((line) => line.innerText.includes("SiLU.fwd")).click(); log.push(seen());
document.getElementById("refused").click(); log.push(seen());
log.push(getComputedStyle(document.body).backgroundColor);
const made = document.createElement("pre");
made.id = "log"; made.textContent = JSON.stringify(log); document.body.append(made);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_keys_and_colors_in_a_browser(
    plan: og.Plan, page: Path, tmp_path: Path, scheme: int
) -> None:
    """scheme: 0 for dark, 1 for light, as Chromium numbers what a user prefers."""
    page.write_text(page.read_text().replace("</body>", PRESSES + "</body>"))
    command = [
        str(BROWSER),
        "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    [found] = re.findall(r'<pre id="log">(.*?)</pre>', done.stdout, re.DOTALL)
    first, right, down, end, home, clicked, taken, background = json.loads(found)
    assert [len(state["pressed"]) for state in (first, right, down, end, home, clicked)] == [1] * 6
    assert first["pressed"] == home["pressed"] == ["RMSNorm\nreference"]
    assert "rstd0, 4 bytes per row" in first["facts"][0]
    assert first["marked"][0].strip().startswith("x1, (rstd0,) = RMSNorm.fwd")
    assert right["focus"] == "BasicLinear\nreference"
    assert down["focus"] == "Greedy\nrefused, reference"
    assert "backward needs x3" in down["facts"][0]
    assert down["marked"] == []
    assert end["focus"] == f"{plan.backward[-1].name}\nreference"
    assert "gradient from" in end["facts"][0]
    assert clicked["pressed"] == ["SiLU\nreference"]
    assert taken["shown"] == first["shown"] - 1
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == bool(scheme)
