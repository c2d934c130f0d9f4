"""Launch configurations: the usual one, unless another was measured."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opsgraph.kernels import choices, configs
from opsgraph.kernels.choices import Choice, Choices
from opsgraph.kernels.configs import asked, configured, decide

WHERE = ("norm", 64, 2)


def offered(width: int, size: int) -> list[dict[str, int]]:
    return [{"BLOCK": width, "num_warps": warps * size} for warps in (1, 2, 4)]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Choices]:
    """As on a GPU: the last configuration is the fastest."""

    def last(candidates):
        for run in candidates.values():
            run()
        return Choice([*candidates][-1], next(iter(candidates)), 0.9)

    made = Choices("launch", lambda: ("chip",), last, lambda: [tmp_path / "launch.json"])
    monkeypatch.setattr(configs, "choices", lambda: made)
    monkeypatch.setattr(configs, "_chosen", {})
    return made


def test_without_a_gpu_the_usual_one() -> None:
    assert configured("norm", (64, 2), offered) == {"BLOCK": 64, "num_warps": 2}
    with asked() as found:
        configured("norm", (64, 2), offered)
    assert found == {WHERE: offered(64, 2)}
    decide(WHERE, offered(64, 2), pytest.fail)


def test_decided_by_measuring_and_kept(kept: Choices, monkeypatch) -> None:
    seen = []

    def line() -> None:
        seen.append(configured("norm", (64, 2), offered)["num_warps"])

    line()
    with asked() as found:
        line()
        configured("other", (), lambda: [{}])
    assert list(found) == [WHERE, ("other",)]
    decide(WHERE, found[WHERE], line)
    assert seen == [2, 2, *(2, 4, 8), *(2, 4, 8)], "each was tried, then measured"
    assert kept.all()["norm 64 2"][:3] == ("BLOCK 64 num_warps 8", "BLOCK 64 num_warps 2", 0.9)
    monkeypatch.setattr(configs, "_chosen", {})  # the next process
    with asked() as found:
        assert configured("norm", (64, 2), offered)["num_warps"] == 8
    assert not found, "it is known"


def test_gpus_of_two_kinds_have_a_choice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [
        Choices("launch", lambda: ("chip",), lambda runs, k=k: [*runs][k], list) for k in (0, 2)
    ]
    found, number = [], [0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: number[0])
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(configs, "gpu", lambda device: (f"chip {device.index}",))
        patch.setattr(configs, "_kinds", configs._kinds.__wrapped__)
        patch.setattr(configs, "_chosen", {})
        patch.setattr(configs, "choices", lambda: stores[number[0]])
        patch.setattr(choices, "measurable", lambda: True)
        for number[0] in (0, 1):
            decide(WHERE, offered(64, 2), lambda: None)
        for number[0] in (0, 1, 0):
            found.append(configured("norm", (64, 2), offered)["num_warps"])
    assert found == [2, 8, 2]


def test_what_is_offered_no_longer_is_not_taken(kept: Choices) -> None:
    kept.choose("norm 64 2", lambda: {"BLOCK 1 num_warps 1": list})
    assert configured("norm", (64, 2), offered)["num_warps"] == 2


def test_a_configuration_that_does_not_run_is_left_out(kept: Choices) -> None:
    def line() -> None:
        if configured("norm", (64, 2), offered)["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")

    decide(WHERE, offered(64, 2), line)
    assert configured("norm", (64, 2), offered)["num_warps"] == 4


def test_an_error_leaves_the_usual_one(kept: Choices) -> None:
    with pytest.raises(ZeroDivisionError):
        decide(WHERE, offered(64, 2), lambda: 1 // 0)
    assert configured("norm", (64, 2), offered)["num_warps"] == 2
