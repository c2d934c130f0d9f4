"""What the documentation shows runs, as one reads it: a page's blocks one after the other."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import Done, run

from opsgraph.__main__ import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)
SLOW = ("docs/parallel.md",)
"""Pages that start ranks."""
OTHERS = ("transformers",)
"""Packages that pages use, and that may be missing."""
PAGES = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for page in sorted(ROOT.glob("docs/**/*.md"))
    if BLOCK.search(page.read_text())
    for name in [str(page.relative_to(ROOT))]
]
"""All of docs/ that show Python."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def added(diff: str) -> list[str]:
    """The lines that a diff adds to one file."""
    assert len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) == 1
    return re.findall(r"^\+(?!\+\+ )(.*)$", diff, re.MULTILINE)


def code_of(page: str) -> str:
    """A page's code, as one reads it."""
    blocks = BLOCK.findall(text(page))
    assert blocks
    return "\n".join(body if kind == "python" else "\n".join(added(body)) for kind, body in blocks)


def ran(code: str, folder: Path) -> Done:
    """Code that must succeed. In its own process, for a page may register a fuser."""
    for name in OTHERS:
        if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
    one_rank = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    done = run(code, folder, {**os.environ, **one_rank})
    assert done.code == 0, done.output + done.error
    return done


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str, tmp_path: Path) -> None:
    ran(code_of(page), tmp_path)


COUNTED = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call" and frame.f_code is type(LinearSquaredReLU.fuser).fwd.__code__
sys.setprofile(count)
net(x)
sys.setprofile(None)
print("calls", calls)
"""


def test_readme_runs_and_so_does_its_fuser(tmp_path: Path) -> None:
    """On a CPU too, where other fusers of a preferred backend take the same ops."""
    assert ran(code_of("README.md") + COUNTED, tmp_path).output.splitlines()[-1] == "calls 1"


def test_what_is_added_is_short() -> None:
    pages = ("docs/writing-an-op.md", "docs/writing-a-fuser.md", "docs/recipes.md")
    blocks = [block for page in pages for block in BLOCK.findall(text(page))]
    diffs = [added(body) for kind, body in blocks if kind == "diff"]
    assert len(diffs) == 5  # an activation, a norm, a backend for one op, a fused step, a recipe
    for diff in diffs:
        fuser = any("(og.Fuser)" in line for line in diff)
        assert len(diff) <= (12 if fuser else 8), diff


def test_the_design_shows_what_a_plan_runs(tmp_path: Path) -> None:
    """The generated function on the page is that of the plan on the page."""
    page = text("docs/design.md")
    [shown] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert shown in ran(code_of("docs/design.md"), tmp_path).output


def test_the_rooms_are_those_of_the_contract() -> None:
    """The design's and CONTRIBUTING's floors are import-linter's, top to bottom."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    floors = [re.findall(r"\w+", layer) for layer in contracts[0]["layers"]]
    rows = re.findall(r"^\| (`.*`) \|", text("docs/design.md"), re.MULTILINE)
    assert [re.findall(r"`(\w+)", row) for row in rows] == floors
    [block] = re.findall(r"```\n(integrations.*?)```", text("CONTRIBUTING.md"), re.DOTALL)
    lines = [re.split(r"  +", line)[0] for line in block.splitlines()]
    assert [re.findall(r"\w+", line) for line in lines] == floors


def test_the_glossary_is_short_and_true() -> None:
    rows = re.findall(r"^\| (\w+) \| .* \| `(\S+)` \|$", text("docs/glossary.md"), re.MULTILINE)
    assert 0 < len(rows) <= 12
    assert all((ROOT / "opsgraph" / path).exists() for _, path in rows)


def test_the_site_has_every_page_of_the_navigation() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", text("mkdocs.yml"), re.MULTILINE)
    assert len(named) == len({*named}) > 20
    assert all((ROOT / "docs" / name).exists() for name in named)


@pytest.mark.slow
def test_the_site_builds_and_its_pages_ask_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install opsgraph[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.name: page.read_text() for page in tmp_path.glob("*.html")}
    assert "speed over PyTorch" in pages["benchmarks.html"]  # of README
    assert (tmp_path / "results" / "cpu.png").exists()
    for name, page in pages.items():
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=.?https?:", page), name
        assert 'class="mermaid"' not in page, "which would be drawn by a script from elsewhere"


def test_commands_on_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    known = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert {"doctor", "tune", "bench"} <= known
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        named = re.findall(r"python -m opsgraph ([a-z]\w*)", page.read_text())
        assert {*named} <= known, page.name


def test_links_and_names_of_files_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        words = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", re.sub(r"`[^`]*`", "", words)):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        if page.name != "CHANGELOG.md":
            for name in re.findall(r"`(\w+/[\w/]+\.(?:py|cpp|json|txt|md))`", words):
                places = ROOT / name, ROOT / "opsgraph" / name, ROOT / "opsgraph/kernels/cpu" / name
                assert any(place.exists() for place in places), f"{page.name}: {name}"
