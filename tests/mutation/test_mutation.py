"""The list of planted faults fits the product as it is, so it cannot rot."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.__main__ import RECORD
from tests.mutation.faults import FAULTS
from tests.mutation.form import Edit, Fault, misfits, plant
from tests.mutation.reverted import REPORTS, REVERTED, SEEDS

ALL = (*FAULTS, *REVERTED)


def test_every_fault_can_be_planted() -> None:
    assert [reason for fault in ALL for reason in misfits(fault)] == []


def test_names_are_unique_and_words_are_there() -> None:
    assert max(Counter(fault.name for fault in ALL).values()) == 1
    assert all(fault.breaks.endswith(".") for fault in ALL)


def test_every_fault_was_run_and_tests_notice_it() -> None:
    """A fault that is new here is run by `python -m tests.mutation NAME --fuzz 0`."""
    record = json.loads(RECORD.read_text())
    assert {*record} == {fault.name for fault in ALL}
    assert all(found["tests"]["noticed"] for found in record.values())


def test_what_was_reported_and_found_is_a_fault_that_is_listed() -> None:
    names = {fault.name for fault in REVERTED}
    listed = [name for those in REPORTS.values() for name in those]
    assert len(listed) == len({*listed})
    assert names.issuperset(listed)
    assert names.issuperset(SEEDS)


def test_a_fault_is_planted_and_taken_out_again(tmp_path: Path) -> None:
    (tmp_path / "opsgraph").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").touch()
    path = tmp_path / "opsgraph/it.py"
    path.write_text("one two")
    edits = Edit("it.py", "one", "1"), Edit("it.py", "two", "2")
    fault = Fault("it", "All.", edits, ("test_it.py",))
    with plant(fault, tmp_path):
        assert path.read_text() == "1 2"
    assert path.read_text() == "one two"
    path.write_text("one one two")
    with pytest.raises(ValueError, match="got 2 times 'one'"), plant(fault, tmp_path):
        pass
