"""What a planted fault is: a change of the product's text, and who is expected to notice it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Edit(NamedTuple):
    """One text in the place of another, which stands exactly once in a file of the product."""

    file: str
    """Below `opsgraph/`."""
    old: str
    new: str


class Fault(NamedTuple):
    """A change that makes the product wrong."""

    name: str
    breaks: str
    """In words: what is wrong then."""
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    """Files below `tests/`, one of which is expected to fail; also `file.py::test`."""
    interpreted: bool = False
    """Whether Triton's interpreter runs what is wrong, in the tests and in the fuzzer's lives."""
    seed: int = 0
    """Of the fuzzer's first life."""


def fault(name: str, breaks: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """A fault of one edit. What stands in a folder `triton` is interpreted."""
    edits = (Edit(file, old, new),)
    return Fault(name, breaks, edits, tests, interpreted="/triton/" in file)


def misfits(planted: Fault, root: Path = ROOT) -> list[str]:
    """Why a fault cannot be planted into the product as it is now, or [] if it can."""
    found = []
    for edit in planted.edits:
        path = root / "opsgraph" / edit.file
        times = path.read_text().count(edit.old) if path.exists() else 0
        if times != 1 or edit.old == edit.new:
            found.append(f"{planted.name}: got {times} times {edit.old!r} in {edit.file}, not 1")
    paths = [root / "tests" / name.partition("::")[0] for name in planted.tests]
    found += [f"{planted.name}: there is no {path}" for path in paths if not path.exists()]
    return found if planted.tests else [*found, f"{planted.name}: no test is named"]


@contextmanager
def plant(planted: Fault, root: Path) -> Iterator[None]:
    """Write the fault into a copy of the product, and take it out at the end."""
    wrong = misfits(planted, root)
    if wrong:
        raise ValueError("; ".join(wrong))
    paths = {edit.file: root / "opsgraph" / edit.file for edit in planted.edits}
    before = {path: path.read_text() for path in paths.values()}
    try:
        for edit in planted.edits:
            path = paths[edit.file]
            path.write_text(path.read_text().replace(edit.old, edit.new))
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)
