"""Exchanges within replayed passes: the bits of calls in Python, and what a step costs in calls."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from replays import compare, replaying, step, told
from torch import Tensor

import opsgraph as og
from opsgraph.kernels.cpu import build as library
from opsgraph.ops import AllReduce, Linear, RMSNorm, SwiGLU
from opsgraph.testing.distributed import Ranks

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")
WIDTH, INNER = 16, 32
WHOLE, PIECES = 64, 2048
"""Rows of all ranks for which exchanges stay whole, and from which they are cut into pieces."""


def block(rank: int, sequence_parallel: bool, **options: Any) -> og.Sequential:
    torch.manual_seed(rank)
    bias, overlap = options.pop("bias", False), options.pop("overlap", ())
    split = dict(sequence_parallel=sequence_parallel, bias=bias, overlap=overlap)
    return og.Sequential(
        RMSNorm(WIDTH),
        Linear(WIDTH, 2 * INNER, tensor_parallel_mode="column", **split),
        SwiGLU(),
        Linear(INNER, WIDTH, tensor_parallel_mode="row", **split),
        **options,
    )


def rows_of(rank: int, size: int, rows: int, sequence_parallel: bool) -> Tensor:
    torch.manual_seed(rank if sequence_parallel else 7)
    return torch.randn(rows // size if sequence_parallel else rows, WIDTH)


PLAIN = dict(backends=("cpu", "aten", "reference"))
"""Options without overlap."""
CASES = (
    (WHOLE, True, PLAIN),
    (WHOLE, False, {}),
    (PIECES, True, dict(bias=True)),
    (PIECES, False, {}),
)


def same_bits(rank: int, size: int) -> list[list[str]]:
    """What the plans say of their passes."""
    texts = []
    for rows, sequence_parallel, options in CASES:
        x = rows_of(rank, size, rows, sequence_parallel)

        def make(given: Any = options, parallel: bool = sequence_parallel) -> Any:
            return block(rank, parallel, **given)

        def use(module: og.Sequential, x: Tensor = x) -> Any:
            return [step(module, x) for _ in range(4)]

        passes = told(compare(make, use).plan())
        texts.append([text for each in passes.values() for text in each])
    return texts


def test_bits_are_those_of_calls_in_python(ranks: Ranks) -> None:
    for texts in ranks.run(same_bits, 2):
        assert not [text for each in texts for text in each if "c10d" in text]
        assert texts[0][0] == "0, 1, 2, 3, 4, 5: 4 launches in 2 native calls and 2 exchanges"
        assert texts[2][0].endswith("and 8 exchanges")


def same_bits_on_gpus(rank: int, size: int) -> list[list[str]]:
    """What the plans say of their passes, with row counts that change from call to call."""
    device, texts = torch.device("cuda", rank), []
    torch.cuda.set_device(device)
    for dtype in (torch.float32, torch.bfloat16):
        for sequence_parallel in (True, False):
            x = rows_of(rank, size, PIECES, sequence_parallel).to(device, dtype)

            def make(parallel: bool = sequence_parallel, dtype: torch.dtype = dtype) -> Any:
                return block(rank, parallel).to(device, dtype)

            def use(module: og.Sequential, x: Tensor = x) -> Any:
                whole = [step(module, x) for _ in range(20)]
                return whole + [step(module, x[: 32 * n]) for n in (1, 7, 3, 7, 5, 1, 9)]

            passes = told(compare(make, use).plan())
            texts.append([text for each in passes.values() for text in each])
    torch.cuda.synchronize()
    return texts


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_bits_on_gpus_are_those_of_calls_in_python(ranks: Ranks) -> None:
    for texts in ranks.run(same_bits_on_gpus, 2, timeout=240):
        assert not [text for each in texts for text in each if "c10d" in text]
        assert "exchanges" in texts[0][0]


def another_group(rank: int, size: int) -> None:
    """Of a group that takes the place, and the name, of another one; then of none."""
    x, made = rows_of(rank, size, WHOLE, True), block(rank, True)
    before = [step(made, x) for _ in range(3)][-1]
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    with pytest.raises((RuntimeError, ValueError)):
        step(made, x)
    dist.init_process_group("gloo", store=dist.PrefixStore("b", store), rank=rank, world_size=size)
    for one, other in zip(step(made, x), before, strict=True):
        assert torch.equal(one, other)


def test_groups_are_found_by_name_at_each_call(ranks: Ranks) -> None:
    ranks.run(another_group, 2)


def unlike_sums(rank: int, size: int) -> list[str]:
    """A line whose exchange is no sum, and one that leaves it under way."""
    from opsgraph.replay.recorder import Recorder

    ops, group, reasons = torch.ops._c10d_functional, AllReduce().group, []
    x = torch.ones(4)
    for op, wait in (("max", True), ("sum", False), ("sum", True)):
        recorder = Recorder(1)
        recorder.argument(0, x)
        with recorder:
            y = ops.all_reduce(x, op, group)
            if wait:
                y = ops.wait_tensor(y)
        events, reason = recorder.take()
        ops.wait_tensor(y)
        reasons.append(str(reason) if reason else " ".join(type(e).__name__ for e in events))
    return reasons


def test_what_is_not_replayed(ranks: Ranks) -> None:
    for found in ranks.run(unlike_sums, 2):
        other, left, known = found
        assert other.endswith("only sums are replayed")
        assert left == "it leaves an exchange under way"
        assert known == "Aten Exchange Wait"


def counted(rank: int, size: int, replay: bool) -> list[int]:
    """Python's frames in a step's forward and backward, once both are replayed."""
    x, counts = rows_of(rank, size, WHOLE, True).requires_grad_(), Counter[str]()
    dy = torch.randn_like(x)

    def watch(frame: Any, event: str, _: Any) -> None:
        counts[event] += 1

    def frames(call: Any, *arguments: Any) -> tuple[int, Any]:
        counts.clear()
        sys.setprofile(watch)
        try:
            result = call(*arguments)
        finally:
            sys.setprofile(None)
        return counts["call"], result

    with replaying(replay):
        module = block(rank, True)
        for _ in range(4):
            forward, y = frames(module, x)
            backward, _ = frames(y.backward, dy)
    return [forward, backward]


def test_a_step_with_exchanges_takes_few_frames_of_python(ranks: Ranks) -> None:
    (native, _), (python, _) = (ranks.run(counted, 2, on) for on in (True, False))
    assert native[0] <= 20
    assert native[1] <= 36
    assert 4 * sum(native) < sum(python)
