"""Measured choices: made once, kept in the process and on disk, whatever happens to the file."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opsgraph.kernels import choices
from opsgraph.kernels.choices import Choice, Choices, kept, measurable, store, stores, working
from opsgraph.kernels.cpu import choices as cpu
from opsgraph.kernels.cpu.choices import fastest
from opsgraph.kernels.cpu.gemm import choices as products
from opsgraph.kernels.timing import fastest_on_cuda


class Recorder:
    """Measures by a given rule; counts."""

    def __init__(self, answer: Callable[[Mapping[str, object]], str] = min) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, candidates: Mapping[str, object]) -> str:
        self.calls += 1
        return self.answer(candidates)


def runs(*names: str):
    return lambda: dict.fromkeys(names, lambda: None)


def made_at(paths: Path | list[Path], measure: Callable) -> Choices:
    where = [paths] if isinstance(paths, Path) else paths
    return Choices("kind", lambda: ("machine",), measure, lambda: where)


def names(path: Path) -> dict[str, str]:
    return {key: made["name"] for key, made in json.loads(path.read_text())["choices"].items()}


def content(**chosen: str) -> str:
    listed = {key: {"name": name, "usual": name} for key, name in chosen.items()}
    return json.dumps({"kind": "kind", "machine": ["machine"], "choices": listed})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some" / "folder" / "file.json"


def test_measured_once_and_read_by_the_next_process(path: Path) -> None:
    first = Recorder()
    made = made_at(path, first)
    assert [made.choose("key", runs("b", "a")) for _ in range(3)] == ["a"] * 3
    assert made.choose("other", runs("c")) == "c"
    assert first.calls == 2
    assert names(path) == {"key": "a", "other": "c"}
    assert list(path.parent.iterdir()) == [path], "a temporary file was left"
    second = Recorder(max)
    assert made_at(path, second).choose("key", runs("b", "a")) == "a"
    assert second.calls == 0


def test_a_choice_stays_though_the_file_changes(path: Path) -> None:
    made = made_at(path, Recorder())
    assert made.choose("key", runs("a", "b")) == "a"
    path.write_text(content(key="b"))
    assert made.choose("key", runs("a", "b")) == "a"


def test_another_process_measured_meanwhile(path: Path) -> None:
    def slowly(candidates: Mapping[str, object]) -> str:
        path.parent.mkdir(parents=True)
        path.write_text(content(key="b", theirs="x"))
        return "a"

    assert made_at(path, slowly).choose("key", runs("a", "b")) == "b"
    assert names(path) == {"key": "b", "theirs": "x"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"choices": 3}',
        '{"choices": {"key": "a"}}',
        '"key"',
        "\x00\xff",
        '{"choices": {"key": {"name": 3, "usual": "a"}}}',
        '{"choices": {"key": {"x": "a"}}}',
    ],
)
def test_a_spoilt_file_is_ignored_with_a_warning(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="is ignored"):
        assert made_at(path, Recorder()).choose("key", runs("a")) == "a"
    assert names(path) == {"key": "a"}


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(content(key="gone", other="b"))
    assert made_at(path, Recorder()).choose("key", runs("a", "b")) == "a"
    assert names(path) == {"key": "a", "other": "b"}


def test_what_cannot_be_written_goes_to_the_next_place_or_stays_in_memory(
    tmp_path: Path, path: Path
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "below.json"
    measure = Recorder()
    assert made_at([nowhere, path], measure).choose("key", runs("a")) == "a"
    assert made_at([nowhere, path], measure).choose("key", runs("b", "a")) == "a"
    assert measure.calls == 1
    made = made_at(nowhere, measure)
    with pytest.warns(UserWarning, match=r"choices are not kept: .*below\.json"):
        assert made.choose("key", runs("a")) == "a"
    assert made.choose("key", runs("a")) == "a"
    assert measure.calls == 2


def test_many_writers_leave_a_whole_file(path: Path) -> None:
    made = [made_at(path, Recorder()) for _ in range(8)]
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
    found = names(path)
    assert set(found.values()) == {"a"}
    assert list(path.parent.iterdir()) == [path]


def test_one_thread_measures_and_the_others_wait() -> None:
    measure = Recorder()
    made, found = made_at([], measure), []
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
    first, second = products.files()
    assert first.parent == tmp_path / "opsgraph"
    assert second.name == first.name


def test_what_is_kept_is_listed_by_kind_and_machine(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_stores", {})
    slow = store("slow", ("chip", "torch 3"), lambda runs: Choice("b", "a", 0.5))
    assert store("slow", ("chip", "torch 3"), max) is slow
    assert slow in stores()
    assert slow.known("key") is None
    began = time.time()
    assert slow.choose("key", runs("a", "b")) == "b"
    assert slow.known("key") == "b"
    (found,) = (f for f in kept() if f.path.parent == tmp_path / "opsgraph")
    assert (found.kind, found.machine) == ("slow", ("chip", "torch 3"))
    assert found.choices == slow.all() == slow.since(began)
    assert found.choices["key"][:3] == ("b", "a", 0.5)
    assert slow.since(time.time() + 1) == {}


def test_forgotten_choices_are_measured_again(path: Path) -> None:
    measure = Recorder()
    made = made_at(path, measure)
    for key in ("one", "two", "three"):
        made.choose(key, runs("a"))
    told = []
    made.forgotten = lambda: told.append(None)
    assert made.forget(["four"]) == 0
    assert not told
    assert made.forget(["two", "four"]) == 1
    assert told == [None]
    assert set(names(path)) == set(made.all()) == {"one", "three"}
    made.choose("two", runs("a"))
    assert measure.calls == 4
    assert made.forget() == 3
    assert names(path) == {}
    assert made.forget() == 0


def test_what_was_measured_before_a_moment_is_measured_again(path: Path, monkeypatch) -> None:
    measure = Recorder()
    made = made_at(path, measure)
    made.choose("key", runs("a"))
    monkeypatch.setattr(Choices, "renewed", time.time())
    assert made.known("key") is None
    made.choose("key", runs("a"))
    made.choose("key", runs("a"))
    assert measure.calls == 2
    assert made.known("key") == "a"


def test_what_does_not_run_is_no_candidate() -> None:
    def fails() -> None:
        raise RuntimeError("out of shared memory")

    assert [*working({"usual": list, "large": fails})] == ["usual"]
    with pytest.raises(RuntimeError, match="shared memory"):
        working({"usual": fails, "other": list})


def test_nothing_is_measured_while_kernels_are_traced(path: Path) -> None:
    measure = Recorder(max)
    made = made_at(path, measure)
    with FakeTensorMode():
        assert not measurable()
        assert made.choose("key", runs("a", "b")) == "a", "the usual one"
    assert measure.calls == 0
    assert made.choose("key", runs("a", "b")) == "b"


def test_fastest_takes_turns_and_drops_the_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    times = {"usual": [9, 4, 4] + [5] * 5, "slow": [6, 6], "quick": [9, 5, 3, 3] + [4] * 5}

    def run(name: str) -> None:
        clock[0] += times[name].pop(0)
        order.append(name)

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    candidates = {name: lambda name=name: run(name) for name in times}
    assert fastest(candidates, rounds=3) == Choice("quick", "usual", 0.8)
    assert "".join(name[0] for name in order) == "usq" * 2 + "uq" + "q" + "qu" * 5
    assert not any(times.values())


def test_what_is_far_slower_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def run(name: str, seconds: float) -> None:
        clock[0] += seconds
        calls.append(name)

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    candidates = {
        name: lambda name=name, seconds=seconds: run(name, seconds)
        for name, seconds in (("usual", 0.5), ("slow", 0.6), ("best", 0.05))
    }
    assert fastest(candidates, rounds=3) == Choice("best", "usual", pytest.approx(0.1))
    assert (calls.count("usual"), calls.count("slow")) == (1, 1)
    calls.clear()
    candidates["usual"] = lambda: run("usual", 0.19)  # far from none
    assert fastest(candidates, rounds=3).name == "best"
    assert calls.count("usual") == 2 + cpu.PAIRS


def test_what_was_quick_while_the_machine_was_is_not_taken(monkeypatch) -> None:
    clock, calls = [0.0], [0]

    def run(seconds: float) -> None:
        calls[0] += 1
        clock[0] += seconds / 2 if calls[0] == 4 else seconds

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    candidates = {"usual": lambda: run(1.0), "other": lambda: run(1.1)}
    assert fastest(candidates, rounds=3) == Choice("usual", "usual")
    assert calls == [2 + 2 + 2 + 2 * cpu.PAIRS], "then it ran alone, then both did in turns"


def test_the_usual_one_stays_unless_another_is_clearly_faster(monkeypatch) -> None:
    def chosen(usual: float, other: float) -> str:
        clock = [0.0]
        monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])

        def run(seconds: float) -> None:
            clock[0] += seconds

        return fastest({"usual": lambda: run(usual), "other": lambda: run(other)}).name

    assert chosen(1.0, 0.99) == "usual"
    assert chosen(1.0, 0.9) == "other"


@pytest.mark.gpu
def test_the_fastest_on_a_gpu() -> None:
    x = torch.randn(2**24, device="cuda")
    less = {"usual": lambda: x.add_(x), "half": lambda: x[: 2**23].add_(1)}
    made = fastest_on_cuda(less)
    assert made.name == "half"
    assert 0.3 < made.ratio < 0.7
    assert fastest_on_cuda(dict(reversed(less.items()))) == Choice("half", "half")
