"""What the documentation shows runs, as one reads it: a page's blocks one after the other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = [
    "README.md",
    "docs/index.md",
    "docs/design.md",
    "docs/extending.md",
    "docs/recipes.md",
    "docs/checkpoints.md",
]
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def added(diff: str) -> list[str]:
    """The lines that a diff adds to one file."""
    assert len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) == 1
    return re.findall(r"^\+(?!\+\+ )(.*)$", diff, re.MULTILINE)


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A page's code in its own process: a page may register a fuser."""
    return subprocess.run(
        [sys.executable, "-"], input=script, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str) -> None:
    blocks = BLOCK.findall(text(page))
    assert blocks
    code = [body if kind == "python" else "\n".join(added(body)) for kind, body in blocks]
    done = run("\n".join(code))
    assert done.returncode == 0, done.stderr


def test_what_is_added_is_short() -> None:
    blocks = BLOCK.findall(text("docs/extending.md"))
    diffs = [added(body) for kind, body in blocks if kind == "diff"]
    assert len(diffs) == 5  # an activation, a norm, a backend for one op, a fused step, a recipe
    for diff in diffs:
        fuser = any("(og.Fuser)" in line for line in diff)
        assert len(diff) <= (12 if fuser else 8), diff


def test_the_design_shows_what_a_plan_runs() -> None:
    """The generated function on the page is that of the plan on the page."""
    page = text("docs/design.md")
    [(_, code)] = BLOCK.findall(page)
    done = run(code)
    [shown] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert shown in done.stdout


def test_the_rooms_are_those_of_the_contract() -> None:
    """The design's and CONTRIBUTING's floors are import-linter's, top to bottom."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    floors = [re.findall(r"\w+", layer) for layer in contracts[0]["layers"]]
    rows = re.findall(r"^\| (`.*`) \|", text("docs/design.md"), re.MULTILINE)
    assert [re.findall(r"`(\w+)", row) for row in rows] == floors
    [block] = re.findall(r"```\n(parallel.*?)```", text("CONTRIBUTING.md"), re.DOTALL)
    lines = [re.split(r"  +", line)[0] for line in block.splitlines()]
    assert [re.findall(r"\w+", line) for line in lines] == floors


def test_the_glossary_is_short_and_true() -> None:
    rows = re.findall(r"^\| (\w+) \| .* \| `(\S+)` \|$", text("docs/glossary.md"), re.MULTILINE)
    assert 0 < len(rows) <= 12
    assert all((ROOT / "opsgraph" / path).exists() for _, path in rows)


def test_links_and_names_of_files_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        words = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", re.sub(r"`[^`]*`", "", words)):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        if page.name != "CHANGELOG.md":
            for name in re.findall(r"`(\w+/[\w/]+\.(?:py|cpp|json|txt|md))`", words):
                places = ROOT / name, ROOT / "opsgraph" / name, ROOT / "opsgraph/kernels/cpu" / name
                assert any(place.exists() for place in places), f"{page.name}: {name}"
