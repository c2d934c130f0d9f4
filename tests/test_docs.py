"""What the documentation shows runs, as one reads it: a page's blocks one after the other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = ["README.md", "docs/index.md", "docs/recipes.md", "docs/checkpoints.md"]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    # Its own process: a page may register a fuser.
    done = subprocess.run(
        [sys.executable, "-"], input="\n".join(blocks), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
