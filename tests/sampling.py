"""The marker `sampled(n)`: n cases of a parametrised test are run every day, the others are slow.

Each value that several cases have is in one of the n; else the choice hangs on the cases' names
alone, so it is the same in every process and changes little as cases come and go.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from zlib import crc32

import pytest


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark the cases slow that are not chosen; those of a GPU stay as they are."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("gpu"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, given in cases.items():
        (count,) = given[0].get_closest_marker("sampled").args
        kept = chosen(name, {item.nodeid: values(item) for item in given}, count)
        for item in given:
            if item.nodeid not in kept:
                item.add_marker(pytest.mark.slow)


def values(item: pytest.Item) -> set[str]:
    """What the case is made of: its arguments and, of one that is a NamedTuple, the fields."""
    found: set[str] = set()
    for argument, value in item.callspec.params.items():
        fields = value._asdict() if hasattr(value, "_fields") else {argument: value}
        found |= {f"{name}={field!r}" for name, field in fields.items()}
    return found


def chosen(name: str, cases: dict[str, set[str]], count: int) -> set[str]:
    """That many cases, by how much they have that none before has, then by their names' sums."""
    often = Counter(value for found in cases.values() for value in found)
    missing = {value for value, times in often.items() if times > 1}
    left = sorted(cases, key=lambda case: crc32(case.encode()))
    kept: set[str] = set()
    for _ in range(min(count, len(cases))):
        best = max(left, key=lambda case: len(cases[case] & missing))
        left.remove(best)
        kept.add(best)
        missing -= cases[best]
    if missing:
        raise pytest.UsageError(
            f"{name}: sampled({count}) leaves out {', '.join(sorted(missing))}, expected more cases"
        )
    return kept
