"""Replays on CUDA: the bits of OPSGRAPH_REPLAY=0 on any stream, device, address, row count."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import recipe_cases
import torch
from replays import (
    NETS,
    ROWS,
    WIDTH,
    assert_same_bits,
    build,
    compare,
    is_native,
    leaves,
    random,
    replaying,
    step,
    told,
)
from torch import Tensor

import opsgraph as og
from opsgraph.kernels.triton import pairs
from opsgraph.ops import GroupedLinear, Linear, RMSNorm, SwiGLU
from opsgraph.replay import native

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(params=[False, True], ids=["", "pairs"])
def pairs_too(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size have their activation beside them, too."""
    if request.param:
        monkeypatch.setattr(pairs, "TILES", -1)
        monkeypatch.setattr(pairs, "LEAST", 0)


def net(name: str = "llama", device: str = "cuda") -> og.Sequential:
    return build(name, BF16, device=device)


def example(rows: int = ROWS, seed: int = 3, device: str = "cuda") -> Tensor:
    return random(rows, WIDTH, seed=seed, dtype=BF16, device=device)


def test_replays_are_possible() -> None:
    assert native.why_not("cuda") is None


@pytest.mark.usefixtures("pairs_too")
@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_in_bf16(name: str) -> None:
    def use(module: Any) -> Any:
        found = [leaves(step(module, example(seed=k), seed=k)) for k in range(5)]
        with torch.no_grad():
            torch.manual_seed(0)
            return [found, [leaves(module(example(seed=k))) for k in range(5)]]

    compare(lambda: net(name), use)


@pytest.mark.usefixtures("pairs_too")
@pytest.mark.parametrize("rows", [ROWS, 64, 256])
def test_all_passes_of_the_block_are_native(rows: int) -> None:
    module, x = net(), example(rows)
    for _ in range(3):
        step(module, x)
    plan = module.plan(True, x)
    assert is_native(plan), told(plan)
    with torch.no_grad():
        for _ in range(3):
            module(x)
    plan = module.plan(False, x)
    assert told(plan)["forward"][0].endswith("in one native call")


def groups_net() -> og.Sequential:
    torch.manual_seed(0)
    make: dict[str, Any] = {"bias": False, "device": "cuda", "dtype": BF16}
    first, second = GroupedLinear(4, 64, 256, **make), GroupedLinear(4, 128, 64, **make)
    return og.Sequential(first, SwiGLU(), second)


@pytest.mark.usefixtures("pairs_too")
def test_groups_of_rows() -> None:
    """Their kernels make descriptors in scratch memory; sizes differ from call to call."""
    rows = torch.tensor([[100, 0, 28, 128], [1, 2, 3, 250], [0, 0, 256, 0]], device="cuda")

    def use(module: Any) -> Any:
        found = []
        for k in range(6):
            x = random(256, 64, seed=k, dtype=BF16, device="cuda").requires_grad_()
            module.zero_grad()
            y = module(x, rows[k % 3], rows[k % 3])
            y.backward(random(256, 64, seed=9, dtype=BF16, device="cuda"))
            found.append([y, x.grad, *(p.grad.clone() for p in module.parameters())])
        return found

    compare(groups_net, use)
    module = groups_net()
    use(module)
    plan = module.plan(True, random(256, 64, dtype=BF16, device="cuda"))
    assert is_native(plan), told(plan)


def test_amaxes_take_one_launch() -> None:
    """Blocks have none: what quantizes leaves its amax in parts, and one kernel notes all."""
    launches: dict[str, list[int]] = {}
    for name in ("delayed", "blocks"):
        layers = Linear(128, 256, bias=False), SwiGLU(), Linear(128, 128, bias=False)
        module = og.Sequential(RMSNorm(128), *layers, device="cuda", dtype=BF16)
        x = random(128, 128, dtype=BF16, device="cuda").requires_grad_()
        with og.autocast(recipe=recipe_cases.RECIPES[name]):
            for _ in range(4):
                module(x).backward(x.detach())
                with torch.no_grad():
                    module(x)
            plan, other = module.plan(True, x), module.plan(False, x).joined
            silent = other.silent() if name == "delayed" else other.forward
            texts = told(plan) | {"silent": silent.told()}
        lines = [line for each in texts.values() for line in each]
        assert all(line.endswith("in one native call") for line in lines), texts
        counts = [line.split(": ")[1].split()[0] for line in lines]
        launches[name] = [*map(int, counts)]
    assert [a - b for a, b in zip(*launches.values(), strict=True)] == [1, 0, 0]


@pytest.mark.parametrize("name", recipe_cases.RECIPES)
def test_the_same_bits_under_recipes(name: str) -> None:
    recipe = recipe_cases.RECIPES[name]

    def use(module: Any) -> Any:
        x = recipe_cases.example().cuda()
        found = []
        for k in range(5):
            torch.manual_seed(k)  # of stochastic rounding in the forward
            found.append(recipe_cases.results(module, recipe, x + k))
        return found

    compare(lambda: recipe_cases.mlp(device="cuda"), use)


def test_a_side_stream() -> None:
    """A stretch is launched where the caller's kernels are, and memory is of that stream."""

    def use(module: Any) -> Any:
        found = [step(module, example(seed=k)) for k in range(3)]
        stream = torch.cuda.Stream()
        for k in range(5):
            x = example(256, seed=k)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # what runs on another stream is done before x is
                found.append(leaves(step(module, x * 2)))
            torch.cuda.current_stream().wait_stream(stream)
            found.append(step(module, example(seed=k)))
        torch.cuda.synchronize()
        return found

    compare(net, use)


@pytest.mark.usefixtures("pairs_too")
def test_a_cuda_graph_of_a_step() -> None:
    """Captured after three steps, one of each kind: in Python, recorded, replayed."""
    module = net()
    x, dy = example(seed=1).requires_grad_(), example(seed=2)
    wanted = [x, *module.parameters()]

    def once() -> list[Tensor]:
        y = module(x)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    assert is_native(module.plan(True, x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = once()
    for seed in range(3, 6):
        with torch.no_grad():
            x.copy_(example(seed=seed))
            dy.copy_(example(seed=seed + 10))
            for parameter in module.parameters():
                parameter.mul_(1.25)
        graph.replay()
        found = leaves(results)
        with replaying(False):
            other = net()
            other.load_state_dict(module.state_dict())
            y = other(x)
            expected = [y, *torch.autograd.grad(y, [x, *other.parameters()], dy)]
        assert_same_bits(found, leaves(expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("current", [0, 1])
def test_two_devices(current: int) -> None:
    """Whichever is the current one, results are on the input's."""

    def use(modules: Any) -> Any:
        found = []
        with torch.cuda.device(current):
            for k in range(5):
                for index, module in enumerate(modules):
                    results = step(module, example(seed=k, device=f"cuda:{index}"))
                    assert all(t is None or t.device.index == index for t in results)
                    found.append(leaves(results))
        return found

    compare(lambda: [net(device=f"cuda:{index}") for index in range(2)], use)


@pytest.mark.usefixtures("pairs_too")
@pytest.mark.parametrize("first", ["aligned", "unaligned"])
def test_tensors_that_begin_one_element_in(first: str) -> None:
    """Kernels are compiled for addresses that are multiples of 16 bytes, and for others."""

    def aligned(seed: int) -> Tensor:
        return example(seed=seed)

    def unaligned(seed: int) -> Tensor:
        flat = example(ROWS + 1, seed=seed).flatten()
        return flat[1 : 1 + ROWS * WIDTH].view(ROWS, WIDTH)

    makers: list[Callable[[int], Tensor]] = [aligned, unaligned]
    if first == "unaligned":
        makers.reverse()

    def use(module: Any) -> Any:
        found = []
        for k in range(12):
            x = makers[k // 3 % 2](k).detach().requires_grad_()
            y = module(x)
            dy = makers[k // 2 % 2](k + 20)
            found.append([y, *torch.autograd.grad(y, [x, *module.parameters()], dy)])
        torch.cuda.synchronize()
        return found

    compare(net, use)


@pytest.mark.usefixtures("pairs_too")
def test_weights_that_begin_one_element_in() -> None:
    def use(module: Any) -> Any:
        found = [leaves(step(module, example())) for _ in range(3)]
        for _ in range(2):
            for parameter in module.parameters():
                flat = torch.cat((parameter.data.new_zeros(1), parameter.data.flatten()))
                parameter.data = flat[1:].view(parameter.shape)
            found += [leaves(step(module, example())) for _ in range(3)]
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
            found += [leaves(step(module, example())) for _ in range(3)]
        return found

    compare(net, use)


@pytest.mark.usefixtures("pairs_too")
def test_two_hundred_row_counts() -> None:
    x = example(256)
    compare(
        net,
        lambda m: [leaves(step(m, x[:n], seed=n)) for _ in range(2) for n in range(1, 201)],
    )


def test_row_counts_that_come_again_replay() -> None:
    module, x = net(), example(256)
    counts = [1, 16, 17, 64, 100, 129]
    right = {n: leaves(step(net(), x[:n], seed=n)) for n in counts}
    for _ in range(4):
        for n in counts:
            assert_same_bits(leaves(step(module, x[:n], seed=n)), right[n])
    assert is_native(module.plan(True, x))


def test_no_rows_between_others() -> None:
    some, none = example(), example(0)
    module = compare(
        net,
        lambda m: [leaves(step(m, x)) for x in (*[none] * 3, *[some] * 3, none, some)],
    )
    assert is_native(module.plan(True, some))


@pytest.mark.usefixtures("pairs_too")
def test_memory_of_a_step_is_at_most_that_in_python() -> None:
    """Of tensors that all count as large, between which a stretch ends."""
    peaks = {}
    for on in (False, True):
        with replaying(on):
            module, x = net(), example(2**14)
            for _ in range(3):
                step(module, x)
            torch.cuda.synchronize()
            gc.collect()  # what others left is not given back meanwhile
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(module, x)
            torch.cuda.synchronize()
            peaks[on] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] <= 1.01 * peaks[False]


def test_a_failing_launch_is_named_and_the_next_call_works() -> None:
    module, x = net(), example()
    expected = leaves(step(module, x))
    for _ in range(3):
        step(module, x)
    record = module.plan(True, x).passes.forward.record
    stretch = record.parts[0]
    assert is_native(module.plan(True, x))
    (words,) = stretch.programs
    at = next(  # of the first launch: its line, the length of the rest, function, grid, threads
        k for k in starts(words) if words[k] == native.LAUNCH
    )
    threads, words[at + 7] = words[at + 7], 4096  # more than a block may have
    try:
        with pytest.raises(og.OpsgraphError, match=r": got error 1 from its launch"):
            module(x.detach().requires_grad_())
    finally:
        words[at + 7] = threads
    torch.cuda.synchronize()
    assert_same_bits(leaves(step(module, x)), expected)


def starts(words: Any) -> list[int]:
    """Where the steps of a program begin."""
    found, at = [], 2
    while words[at] != native.END:
        found.append(at)
        at += 3 + words[at + 2]
    return found
