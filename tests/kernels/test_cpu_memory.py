"""Kept memory: a block is handed out again only when no tensor has it."""

import threading
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opsgraph.kernels.cpu import memory
from opsgraph.kernels.cpu.memory import LEAST, Pool

SHAPE = (LEAST // 4096, 1024)
"""A float32 tensor of the least size."""


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(memory, "pool", made)
    return made


def fresh() -> Tensor:
    return memory.empty(SHAPE, torch.float32)


def test_a_dead_tensors_block_is_taken_again() -> None:
    first = fresh()
    place = first.data_ptr()
    del first
    assert fresh().data_ptr() == place


HOLDERS = {
    "tensor": lambda t: t,
    "row": lambda t: t[3],
    "transpose": lambda t: t.t(),
    "detached": lambda t: t.detach(),
    "storage": lambda t: t.untyped_storage(),
    "numpy": lambda t: t.numpy(),
    "saved": lambda t: (torch.ones(1, requires_grad=True) * t).grad_fn,
    "dlpack": torch.utils.dlpack.to_dlpack,
    "buffer": lambda t: memoryview(t.numpy()),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whatever_holds_the_memory_keeps_it(hold, pool: Pool) -> None:
    tensor = fresh()
    place, held = tensor.data_ptr(), hold(tensor)
    del tensor
    assert fresh().data_ptr() != place
    assert pool.held() == (LEAST, LEAST)
    del held
    assert pool.held() == (0, 2 * LEAST)


def test_blocks_have_exactly_the_tensors_size(pool: Pool) -> None:
    tensor = memory.empty((LEAST + 2,), torch.uint8)
    assert tensor.untyped_storage().nbytes() == LEAST + 2
    place = tensor.data_ptr()
    pool._most += 2 * LEAST
    del tensor
    assert memory.empty((LEAST + 1,), torch.uint8).data_ptr() != place
    assert memory.empty((LEAST // 2 + 1,), torch.int16).data_ptr() == place


def test_a_small_tensor_is_no_block(pool: Pool) -> None:
    tensor = memory.empty((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.bfloat16
    assert pool.held() == (0, 0)


def test_a_resized_or_shared_block_is_dropped(pool: Pool) -> None:
    grown, shared = fresh(), fresh()
    grown.resize_(SHAPE[0] * 2, SHAPE[1])
    shared.share_memory_()
    del grown, shared
    found = [fresh(), fresh()]
    assert not any(t.is_shared() for t in found)
    assert all(t.untyped_storage().nbytes() == LEAST for t in found)
    assert pool.held()[0] == 2 * LEAST


def test_no_more_is_held_than_was_in_use_at_once(pool: Pool) -> None:
    for size in range(1, 30):
        memory.empty((LEAST + size,), torch.uint8)
        assert sum(pool.held()) == LEAST + size
    kept = [memory.empty((LEAST,), torch.uint8) for _ in range(5)]
    del kept
    assert pool.held() == (0, 5 * LEAST)
    for size in range(100, 110):
        memory.empty((LEAST + size,), torch.uint8)
        assert sum(pool.held()) <= 5 * LEAST


def test_release_frees_what_is_idle(pool: Pool) -> None:
    kept = fresh()
    assert fresh() is not kept
    pool.release()
    assert pool.held() == (LEAST, 0)
    assert kept.shape == SHAPE


def test_inference_mode_and_versions() -> None:
    with torch.inference_mode():
        place = fresh().data_ptr()
    normal = fresh()
    assert normal.data_ptr() == place
    assert not normal.is_inference()
    before = normal._version
    y = (torch.ones(1, requires_grad=True) * normal).sum()
    with torch.inference_mode():
        fresh()
    assert normal._version == before
    y.backward()


def test_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert fresh().device.type == "cpu"
        assert memory.empty((3,), torch.float32).device.type == "cpu"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [(), (3,), (2, 3), [2, 3, 4], torch.Size((0, 3)), (2, 0, 3)])
def test_small_memory_is_laid_out_as_torchs(sizes: Sequence[int], deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    for dtype in (torch.float32, torch.float8_e4m3fn):
        x, expected = memory.empty(sizes, dtype), torch.empty(sizes, dtype=dtype)
        assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), dtype)
    with torch.inference_mode():
        assert memory.empty(sizes, dtype).is_inference()


def test_fresh_memory_is_poisoned_where_asked() -> None:
    fresh().zero_()
    assert fresh().isnan().all()
    assert (memory.empty((LEAST,), torch.int32) == torch.iinfo(torch.int32).max).all()
    torch.use_deterministic_algorithms(False)
    fresh().zero_()
    assert not fresh().any()


def test_threads_never_share_a_block() -> None:
    wrong = []
    begin = threading.Barrier(4)

    def work(mark: int) -> None:
        begin.wait()
        held: list[Tensor] = []
        for k in range(60):
            tensor = memory.empty((LEAST,), torch.uint8)
            tensor[::4096] = mark
            held.append(tensor)
            if k % 3:
                held.pop(0)
            wrong.extend(t for t in held if (t[::4096] != mark).any())
            del held[:-3]

    torch.use_deterministic_algorithms(False)  # poisoning costs most of the time
    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_storage_may_be_resized_although_numpy_had_its_block(pool: Pool) -> None:
    for _ in range(2):
        first = fresh()
        first.numpy()
        del first
        second = fresh()
        second.untyped_storage().resize_(0)
        assert not second.untyped_storage().nbytes()
        del second


def test_without_torchs_count_memory_is_torchs(monkeypatch, pool: Pool) -> None:
    monkeypatch.setattr(memory, "use_count", None)
    assert fresh().shape == SHAPE
    assert pool.held() == (0, 0)


def test_a_variable_alone_is_ours_and_anything_else_is_not() -> None:
    tensor = fresh()
    assert memory.ours(tensor)
    for name, hold in (HOLDERS | {"twice": lambda t: [t]}).items():
        held = hold(tensor)
        assert not memory.ours(tensor), name
        del held
        assert memory.ours(tensor), name
    plain = torch.empty(SHAPE)
    assert not memory.ours(plain), "whoever made it may have kept its address"


def test_what_autograd_saved_is_not_ours() -> None:
    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(memory.empty(SHAPE, torch.float32))
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            saved = list(ctx.saved_tensors)
            ctx.maybe_clear_saved_tensors()
            tensor = saved.pop()
            found.append(memory.ours(tensor))
            return dy

    found: list[bool] = []
    y = Saves.apply(torch.ones(1, requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert found == [False, True]


def test_what_another_allocates_is_adopted(pool: Pool) -> None:
    made = memory.adopted(lambda: torch.ones(SHAPE), SHAPE, torch.float32)
    assert memory.ours(made)
    assert pool.held() == (LEAST, 0)
    del made
    assert pool.held() == (0, LEAST)
    idle = weakref.ref(pool._blocks[LEAST][0].storage)

    def make() -> Tensor:
        assert idle() is None, "the idle block is there until the new one is"
        return torch.ones(SHAPE)

    again = memory.adopted(make, SHAPE, torch.float32)
    assert pool.held() == (LEAST, 0), "the idle block went back to the system"
    place = again.data_ptr()
    del again
    assert fresh().data_ptr() == place
    small = memory.adopted(lambda: torch.ones(3), (3,), torch.float32)
    larger = memory.adopted(lambda: torch.ones(2 * LEAST)[: LEAST // 4], SHAPE, torch.float32)
    assert not memory.ours(small)
    assert not memory.ours(larger), "it has a part of a larger storage"


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), [2, 3]])
def test_memory_of_any_shape(shape: Sequence[int], deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    made = memory.empty(shape, torch.float32)
    assert made.shape == tuple(shape)
    assert made.is_contiguous()
    assert not deterministic or bool(made.isnan().all())  # as PyTorch fills it then
