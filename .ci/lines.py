"""The line budget of the package: each room's lines, what it may have, and what the release had.

`make lint` prints the table and fails where a room has more than its budget. Budgets are in
pyproject.toml, under [tool.lines]; a change that needs more raises one there, and says why.
"""

import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path) -> int:
    """Lines of a module, or of all modules of a package."""
    modules = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(len(module.read_text().splitlines()) for module in modules)


def main() -> int:
    """Print the table; 1 if a room is over its budget."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["lines"]
    over = 0
    print(f"{'':34}{'lines':>8}{'budget':>8}{'0.1.0':>8}")
    for room in table["rooms"]:
        found = sum(lines(ROOT / "opsgraph" / name) for name in room["modules"])
        mark = "" if found <= room["budget"] else "  over"
        over += bool(mark)
        release = room.get("release", "")
        print(f"{room['name']:34}{found:8}{room['budget']:8}{release:>8}{mark}")
    longest = max((ROOT / "opsgraph").rglob("*.py"), key=lines)
    over += lines(longest) > table["module"]
    name = str(longest.relative_to(ROOT / "opsgraph"))
    print(f"{'longest: ' + name:34}{lines(longest):8}{table['module']:8}")
    entries = {path.name for path in (ROOT / "opsgraph").iterdir()} - {"__pycache__"}
    over += len(entries) > table["entries"]
    print(f"{'entries of the package':34}{len(entries):8}{table['entries']:8}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
