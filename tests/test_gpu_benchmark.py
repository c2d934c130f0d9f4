"""`benchmarks/gpu.py` and its parts, on the CPU: what they make of times, not the times."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    device_time,
    gpu,
    gpu_bandwidth,
    gpu_grouped,
    gpu_products,
    gpu_report,
    gpu_steps,
    peers,
)
from benchmarks.device_time import Event, Kernel
from benchmarks.gpu_parts import Case, Options, Task, warm
from benchmarks.gpu_targets import Target, targets
from benchmarks.peers import Block, Candidate, Peer

MARK = Event("at::cuda::spin_kernel(long)", 0, 1)
SIZE = (8192, 4096, 14336)


def fake_measure(
    calls: Mapping[Any, Callable[[], Any]], repeats: int, before: Any = None
) -> dict[Any, list[device_time.Sample]]:
    """Every call takes a millisecond in two launches; it is called once."""
    for call in calls.values():
        call()
    return {name: [{"void gemm<int>(int)": Kernel(2, 10**6)}] * repeats for name in calls}


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_time, "measure", fake_measure)


def at(start: int, event: Event) -> Event:
    return event._replace(start=start)


def test_kernels_belong_to_the_marks_around_them_whatever_their_order() -> None:
    one, two = Event("one", 0, 5), Event("two", 0, 7)
    events = [at(2, one), at(9, two), at(1, MARK), at(3, two), at(4, one), at(5, MARK)]
    events += [at(11, MARK), at(10, MARK)]
    assert device_time.between_marks(events) == [{"one": Kernel(2, 10), "two": Kernel(1, 7)}, {}]
    with pytest.raises(ValueError, match="no second one"):
        device_time.between_marks([MARK])


def test_a_summary_has_medians_of_samples_and_of_each_kernel() -> None:
    samples = [{"a": Kernel(1, 3_000_000)}, {"a": Kernel(1, 1_000_000), "b": Kernel(2, 500_000)}]
    found = device_time.summary([*samples, samples[0]])
    assert found["device_ms"] == {"median": 3.0, "low": 2.25, "high": 3.0}
    assert found["kernels"] == [
        {"name": "a", "ms": 3.0, "count": 1},
        {"name": "b", "ms": 0.0, "count": 0},
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::copy<4, (int)2>(int)", "at::native::copy"),
        ("void (anonymous namespace)::norm<float>(float*)", "norm"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"),
    ],
)
def test_names_of_kernels_are_short(name: str, short: str) -> None:
    assert device_time.short(name) == short


def test_columns_of_a_recipe() -> None:
    options = Options()
    plain, current = (set(gpu_steps.candidates(recipe, options)) for recipe in ("bf16", "current"))
    assert plain == {
        "nn.Sequential", "torch.compile", "Liger", "TE LayerNormMLP", "te.ops", "opsgraph", "quack",
    }  # fmt: skip
    assert current == {"TE LayerNormMLP", "te.ops", "opsgraph", "torchao"}
    assert set(gpu_steps.candidates("delayed", replace(options, without=("te.ops",)))) == {
        "TE LayerNormMLP",
        "opsgraph",
    }
    assert set(gpu_steps.candidates("bf16", replace(options, peers=False))) == {"opsgraph"}


@pytest.mark.usefixtures("no_device")
def test_a_step_is_measured_beside_its_products() -> None:
    options = Options(
        recipes=("bf16", "current"), without=("torch.compile",), repeats=2, walls=1
    )  # fmt: skip
    found = gpu_steps.measure((8, 32, 48), options)
    columns = found["columns"]
    assert set(columns) == {
        "bf16/nn.Sequential", "bf16/opsgraph", "current/opsgraph", "six products",
    }  # fmt: skip
    assert all(column["device_ms"]["median"] == 1 for column in columns.values())
    assert all(column["wall_ms"] > 0 for column in columns.values())
    assert "ModuleNotFoundError" in found["refused"]["current/TE LayerNormMLP"]
    assert "bf16/opsgraph, as a graph" in found["refused"]
    assert "step at (8, 32, 48)" in gpu_report.steps_text(found)


def test_a_wrong_result_is_not_measured() -> None:
    def wrong(block: Block, weights: peers.Weights) -> Peer:
        return peers.eager(block, (weights[0] * 3, *weights[1:]))

    block, expected = gpu_steps.block_of((8, 32, 48), "bf16"), []
    weights = peers.make_weights(block)
    gpu_steps.build(block, "bf16", "right", Candidate(peers.eager), weights, expected)
    with pytest.raises(ValueError, match="the result is wrong"):
        gpu_steps.build(block, "bf16", "wrong", Candidate(wrong), weights, expected)


def test_saved_bytes_leave_parameters_out() -> None:
    block = gpu_steps.block_of((8, 32, 48), "bf16")
    column = gpu_steps.build(
        block, "bf16", "opsgraph", peers.CANDIDATES["opsgraph"], peers.make_weights(block), []
    )
    rows, hidden, ffn = 8, 32, 48
    saved = gpu_steps.saved_bytes(column.module, column.forward)
    assert saved == rows * (2 * hidden + 4 * ffn + 4)
    assert gpu_steps.saved_by_rows(column) == saved


def test_saved_bytes_leave_weights_in_low_precision_out() -> None:
    block = gpu_steps.block_of((16, 32, 48), "current")
    column = gpu_steps.build(
        block, "current", "opsgraph", peers.CANDIDATES["opsgraph"], peers.make_weights(block), []
    )
    by_rows = gpu_steps.saved_by_rows(column)
    assert by_rows == 16 * (2 * 32 + 4 * 48 + 4)
    assert gpu_steps.saved_bytes(column.module, column.forward) > by_rows


@pytest.mark.usefixtures("no_device")
def test_products_are_those_of_a_step() -> None:
    size = rows, hidden, ffn = 16, 32, 48
    work = sum(m * k * n for m, k, n in gpu_products.shapes(size).values())
    assert work == 9 * rows * hidden * ffn
    for name, (m, k, n) in gpu_products.shapes(size).items():
        a, b = gpu_products.operands(name, (m, k, n))
        assert (a.shape, b.shape) == ((m, k), (k, n))
    for dtype in gpu_products.DTYPES:
        found = gpu_products.measure(size, dtype, 2)
        assert found["sums_ms"]["PyTorch"] == pytest.approx(6)
        assert "together" in gpu_report.products_text(found)


def test_groups_add_up_to_the_rows() -> None:
    for groups in gpu_grouped.CASES:
        sizes = groups.sizes()
        assert (len(sizes), sum(sizes)) == (groups.count, groups.rows)
        assert all(size >= 0 and size % gpu_grouped.MULTIPLE == 0 for size in sizes)
        assert (len(set(sizes)) > 1) == groups.uneven


@pytest.mark.usefixtures("no_device")
def test_a_grouped_step_is_compared_with_that_of_pytorch() -> None:
    groups = gpu_grouped.Groups(4, 256, 32, 48, True)
    calls, refused = gpu_grouped.ready(groups, peers=False)
    assert (list(calls), refused) == ([gpu_grouped.OURS, gpu_grouped.SINGLE], {})
    found = gpu_grouped.measure(groups, Options(peers=False, repeats=1, walls=1))
    assert "4 groups, 256x32x48, uneven" in gpu_report.grouped_text(found)


@pytest.mark.usefixtures("no_device")
def test_shares_are_those_of_a_copy_of_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bandwidth, "FLUSH", 64)

    def fails() -> None:
        raise ValueError("cannot")

    def make() -> gpu_bandwidth.Functions:
        return {
            "small": gpu_bandwidth.Measured(lambda: None, 2e6),
            "large": gpu_bandwidth.Measured(lambda: None, 8e6),
            "broken": gpu_bandwidth.Measured(fails, 1),
        }

    facts = {"group": "norms", "rows": 8, "width": 16}
    found = gpu_bandwidth.measure(make, facts, 2)
    functions = found["functions"]
    assert {name: each["share"] for name, each in functions.items()} == {"small": 1, "large": 1}
    assert functions["small"]["TB/s"] == pytest.approx(2e-3)
    assert found["refused"] == {"broken": "ValueError: cannot"}
    assert "norms [8, 16]" in gpu_report.bandwidth_text(found)


def test_a_run_leaves_out_what_it_has_no_time_for_and_survives_failures() -> None:
    recorded: list[dict[str, Any]] = []

    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    cases = [
        Case("slow", 1e6, lambda: {"x": 0}),
        Case("broken", 0.0, fails),
        Case("good", 1.0, lambda: {"x": 1}),
    ]
    left_out = gpu.run_cases(cases, gpu.Deadline(60), recorded.append)
    assert left_out == ["slow: no time left", "broken: RuntimeError: out of memory"]
    assert [record["x"] for record in recorded] == [1]


def fail(about: str) -> None:
    raise ValueError(about)


def lack() -> None:
    raise ModuleNotFoundError("no such library")


@pytest.mark.slow
def test_tasks_run_in_other_processes_and_tell_what_fails() -> None:
    tasks = [Task("one", fail, ("no",)), Task("two", lack, ()), Task("late", time.sleep, (60,))]
    told = warm(tasks, 2, 20)
    assert told == ["late: no time left to compile it ahead", "one: ValueError: no"]
    assert warm(tasks, 0, 20) == []


def column(device: float, **others: Any) -> dict[str, Any]:
    return {"device_ms": {"median": device}, "kernels": [], "graph_ms": device, **others}


RESULTS: dict[str, Any] = {
    "machine": "a GPU",
    "date": "today",
    "not_measured": ["steps 1x1x1: no time left"],
    "parts": {
        "steps": {
            "cases": [
                {
                    "rows": SIZE[0], "hidden": SIZE[1], "ffn": SIZE[2], "refused": {},
                    "columns": {
                        "bf16/opsgraph": column(11.7, saved_bytes=8192 * 65540, peak_bytes=80),
                        "bf16/TE LayerNormMLP": column(12.4, saved_bytes=2, peak_bytes=100),
                        "current/opsgraph": column(7.0),
                        "current/TE LayerNormMLP": column(7.5),
                        "six products": column(11.6),
                    },
                }
            ]
        },
        "bandwidth": {
            "cases": [
                {
                    "group": "norms", "rows": 8192, "width": 4096, "copy_TB/s": 4.2, "refused": {},
                    "functions": {"RMSNorm backward": column(0.1) | {"share": 0.85, "TB/s": 3.5}},
                }
            ]
        },
        "grouped": {
            "cases": [
                {
                    "name": "8 groups", "refused": {},
                    "columns": {
                        "opsgraph": column(5.0), "torch._grouped_mm, compiled": column(5.9),
                    },
                }
            ]
        },
    },
}  # fmt: skip


def test_targets_are_told_with_their_ratios() -> None:
    found = {target.name: target for target in targets(RESULTS)}
    ratios = {name.partition(",")[0]: target for name, target in found.items()}
    over = ratios["bf16/opsgraph / six products"]
    assert (round(over.found, 3), over.limit, over.reached) == (1.009, 1.0, False)
    assert not ratios["current/opsgraph / current/TE LayerNormMLP"].reached
    faster = ratios["bf16/opsgraph / current/opsgraph"]
    assert (faster.at_least, faster.reached) == (True, True)
    assert ratios["saved bytes a row / (2H + 4F + 4)"].reached
    assert ratios["peak memory / TE LayerNormMLP's"].reached
    assert ratios["share of a copy's bandwidth: RMSNorm backward"].reached
    assert ratios["grouped step / torch._grouped_mm"].reached
    assert str(Target("a", 1.0, 0.93)).startswith("not reached   1.000  at most 0.93")


def test_results_are_shown_as_text_markdown_and_bars(tmp_path: Path) -> None:
    told = gpu_report.text(RESULTS)
    assert "not measured: steps 1x1x1" in told
    assert "bf16/opsgraph" in told
    readme = gpu_report.markdown(RESULTS)
    assert "| 8192, 4096, 14336 | 11.70 / 12.40 (0.94) | 7.00 / 7.50 (0.93) | - | - | 11.60 |" in (
        readme
    )
    assert "| 8 groups | 5.00 | - | 5.90 |" in readme
    assert "RMSNorm backward 0.85" in readme
    made = gpu_report.bars(RESULTS, tmp_path, "gpu")
    assert [path.name for path in made] == ["gpu.png", "gpu_bandwidth.png"]
    assert all(path.stat().st_size > 1000 for path in made)


def test_a_file_keeps_the_parts_that_a_run_does_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps(RESULTS))
    measured = partial(dict, RESULTS["parts"]["grouped"]["cases"][0], name="9 groups")
    monkeypatch.setattr(gpu_grouped, "cases", lambda options: [Case("9", 0.0, measured)])
    args = gpu.parse(["--parts", "grouped", "--jobs", "0", "--out", str(out)])
    gpu.measure(args, gpu.options_of(args))
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == set(RESULTS["parts"])
    assert [case["name"] for case in parts["grouped"]["cases"]] == ["9 groups"]
    assert gpu.main(["--show", "--out", str(out)]) == 0
    assert gpu.main(["--readme", "--out", str(out)]) == 0
    assert "| 9 groups | 5.00 | - | 5.90 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected some of steps"):
        gpu.measure(gpu.parse(["--parts", "nothing", "--jobs", "0", "--out", "x.json"]), Options())
