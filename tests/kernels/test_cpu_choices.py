"""Measured choices: made once, kept in the process and on disk, whatever happens to the file."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from opsgraph.kernels.cpu import choices
from opsgraph.kernels.cpu.choices import Choices, cache_files, fastest


class Recorder:
    """Measures by a given rule; counts."""

    def __init__(self, answer: Callable[[Mapping[str, object]], str] = min) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, candidates: Mapping[str, object]) -> str:
        self.calls += 1
        return self.answer(candidates)


def runs(*names: str):
    return lambda: dict.fromkeys(names, lambda: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some" / "folder" / "file.json"


def test_measured_once_and_read_by_the_next_process(path: Path) -> None:
    first = Recorder()
    made = Choices(lambda: [path], first)
    assert [made.choose("key", runs("b", "a")) for _ in range(3)] == ["a"] * 3
    assert made.choose("other", runs("c")) == "c"
    assert first.calls == 2
    assert json.loads(path.read_text()) == {"key": "a", "other": "c"}
    assert list(path.parent.iterdir()) == [path], "a temporary file was left"
    second = Recorder(max)
    assert Choices(lambda: [path], second).choose("key", runs("b", "a")) == "a"
    assert second.calls == 0


def test_a_choice_stays_though_the_file_changes(path: Path) -> None:
    made = Choices(lambda: [path], Recorder())
    assert made.choose("key", runs("a", "b")) == "a"
    path.write_text('{"key": "b"}')
    assert made.choose("key", runs("a", "b")) == "a"


def test_another_process_measured_meanwhile(path: Path) -> None:
    def slowly(candidates: Mapping[str, object]) -> str:
        path.parent.mkdir(parents=True)
        path.write_text('{"key": "b", "theirs": "x"}')
        return "a"

    assert Choices(lambda: [path], slowly).choose("key", runs("a", "b")) == "b"
    assert json.loads(path.read_text()) == {"key": "b", "theirs": "x"}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"key": 3}', '"key"', "\x00\xff"])
def test_a_spoilt_file_is_ignored_with_a_warning(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="is ignored"):
        assert Choices(lambda: [path], Recorder()).choose("key", runs("a")) == "a"
    assert json.loads(path.read_text()) == {"key": "a"}


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"key": "gone", "other": "b"}')
    assert Choices(lambda: [path], Recorder()).choose("key", runs("a", "b")) == "a"
    assert json.loads(path.read_text()) == {"key": "a", "other": "b"}


def test_what_cannot_be_written_goes_to_the_next_place_or_stays_in_memory(
    tmp_path: Path, path: Path
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "below.json"
    measure = Recorder()
    assert Choices(lambda: [nowhere, path], measure).choose("key", runs("a")) == "a"
    assert Choices(lambda: [nowhere, path], measure).choose("key", runs("b", "a")) == "a"
    assert measure.calls == 1
    made = Choices(lambda: [nowhere], measure)
    with pytest.warns(UserWarning, match=r"choices are not kept: .*below\.json"):
        assert made.choose("key", runs("a")) == "a"
    assert made.choose("key", runs("a")) == "a"
    assert measure.calls == 2


def test_many_writers_leave_a_whole_file(path: Path) -> None:
    made = [Choices(lambda: [path], Recorder()) for _ in range(8)]
    threads = [
        threading.Thread(
            target=lambda c=c, n=n: [c.choose(f"{n} {k}", runs("a")) for k in range(20)]
        )
        for n, c in enumerate(made)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = json.loads(path.read_text())
    assert set(found.values()) == {"a"}
    assert list(path.parent.iterdir()) == [path]


def test_one_thread_measures_and_the_others_wait() -> None:
    measure = Recorder()
    made, found = Choices(lambda: [], measure), []
    threads = [
        threading.Thread(target=lambda: found.append(made.choose("key", runs("a", "b"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a"] * 8
    assert measure.calls == 1


def test_choices_lie_where_the_compiled_kernels_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = cache_files()
    assert first.parent == tmp_path / "opsgraph"
    assert second.name == first.name


def test_fastest_takes_turns_and_drops_the_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    times = {"usual": [9, 4, 4] + [5] * 5, "slow": [1, 6], "quick": [9, 5, 3, 3] + [4] * 5}

    def run(name: str) -> None:
        clock[0] += times[name].pop(0)
        order.append(name)

    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])
    candidates = {name: lambda name=name: run(name) for name in times}
    assert fastest(candidates, rounds=3) == "quick"
    assert "".join(name[0] for name in order) == "uussqq" + "uq" + "q" + "qu" * 5
    assert not any(times.values())


def test_what_was_quick_while_the_machine_was_is_not_taken(monkeypatch) -> None:
    clock, calls = [0.0], [0]

    def run(seconds: float) -> None:
        calls[0] += 1
        clock[0] += seconds / 2 if calls[0] == 4 else seconds

    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])
    candidates = {"usual": lambda: run(1.0), "other": lambda: run(1.1)}
    assert fastest(candidates, rounds=3) == "usual"
    assert calls == [2 + 2 + 2 + 2 * choices.PAIRS], "then it ran alone, then both did in turns"


def test_the_usual_one_stays_unless_another_is_clearly_faster(monkeypatch) -> None:
    def chosen(usual: float, other: float) -> str:
        clock = [0.0]
        monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])

        def run(seconds: float) -> None:
            clock[0] += seconds

        return fastest({"usual": lambda: run(usual), "other": lambda: run(other)})

    assert chosen(1.0, 0.99) == "usual"
    assert chosen(1.0, 0.9) == "other"
