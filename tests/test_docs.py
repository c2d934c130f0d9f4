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
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    code = [text if kind == "python" else "\n".join(added(text)) for kind, text in blocks]
    done = run("\n".join(code))
    assert done.returncode == 0, done.stderr


def test_what_is_added_is_short() -> None:
    blocks = BLOCK.findall((ROOT / "docs/extending.md").read_text())
    diffs = [added(text) for kind, text in blocks if kind == "diff"]
    assert len(diffs) == 5  # an activation, a norm, a backend for one op, a fused step, a recipe
    for diff in diffs:
        fuser = any("(og.Fuser)" in line for line in diff)
        assert len(diff) <= (12 if fuser else 8), diff


def test_the_design_shows_what_a_plan_runs() -> None:
    """The generated function on the page is that of the plan on the page."""
    page = (ROOT / "docs/design.md").read_text()
    [(_, code)] = BLOCK.findall(page)
    done = run(code)
    [shown] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert shown in done.stdout
