"""The exchange of amaxes between ranks: of a fixed size, whatever a rank holds."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Linear
from opsgraph.precision import exchange
from opsgraph.recipe import DelayedScaling


class Group:
    """Stands for a process group."""

    def rank(self) -> int:
        return 0


GROUP = Group()


class Ranks:
    """Runs what one rank does for two, one after the other: the first is recorded."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.others: list[Tensor] | None = None

    def all_reduce(self, values: Tensor, op: Any, group: Any) -> None:
        place = len(self.sent)
        self.sent.append(values.clone())
        if self.others is not None:
            assert values.shape == self.others[place].shape, "it would wait for ever"
            values.copy_(torch.maximum(values, self.others[place]))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    gc.collect()  # layers of other tests, whose amaxes would be exchanged as well
    made = Ranks()
    monkeypatch.setattr(torch.distributed, "all_reduce", made.all_reduce)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cpu:gloo")
    return made


def second(ranks: Ranks) -> None:
    ranks.others, ranks.sent = ranks.sent, []


@pytest.mark.parametrize("count", [0, 1, 5, exchange.SLOTS, exchange.SLOTS + 1, 20_000])
def test_the_largest_of_both_ranks(ranks: Ranks, count: int) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, count)
    for values in (one, other):
        found = exchange.reduce_max(values.split(3), "same", GROUP)
        second(ranks)
    expected = torch.maximum(one, other)
    assert torch.equal(torch.cat([torch.empty(0), *found]), expected)


@pytest.mark.parametrize("counts", [(0, 1), (2, 1), (1, 20_000), (exchange.SLOTS, 3)])
def test_ranks_that_differ_get_an_error(ranks: Ranks, counts: tuple[int, int]) -> None:
    message = r"expected the same layers on all; call recipe\.prepare\(model\) on every rank"
    exchange.reduce_max([torch.ones(counts[0])], counts[0], GROUP)
    second(ranks)
    with pytest.raises(og.OpsgraphError, match=message):
        exchange.reduce_max([torch.ones(counts[1])], counts[1], GROUP)


@pytest.mark.gpu
def test_on_cuda_nobody_waits_for_the_error(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
    exchange.reduce_max([torch.ones(2, device="cuda")], "one", GROUP)
    second(ranks)
    (found,) = exchange.reduce_max([torch.ones(2, device="cuda")], "other", GROUP)
    assert found.tolist() == [-1.0, -1.0]
    torch.cuda.synchronize()
    with pytest.raises(og.OpsgraphError, match="expected the same layers on all"):
        exchange.raise_late()
    exchange.raise_late()


@pytest.mark.parametrize("prepared", [True, False])
def test_layers_are_known_by_name_not_by_the_order_of_first_calls(
    ranks: Ranks, prepared: bool
) -> None:
    """Each rank makes the same model, and first calls its layers in another order."""
    recipe = DelayedScaling(amax_history_len=5 + prepared)
    for order in ((0, 1), (1, 0)):
        model = torch.nn.ModuleList(Linear(16, 16) for _ in range(2))
        if prepared:
            recipe.prepare(model)
        else:  # as a process of its own numbers them
            model[0].serial, model[1].serial = 0, 1
        with og.autocast(recipe=recipe, amax_reduction_group=GROUP):
            for k in order:
                model[k](torch.full((2, 16), 1.0 + k + 10 * (order[0] == k)))
        seen = [m.get_submodule("scaling").amax_history[-1, 0].item() for m in model]
        second(ranks)
        del model
        gc.collect()
    assert seen == [11, 12]


def test_other_contexts_exchange_nothing(ranks: Ranks) -> None:
    recipe, layer = DelayedScaling(amax_history_len=7), Linear(16, 16)
    with og.autocast(recipe=recipe, amax_reduction_group=GROUP):
        layer(torch.ones(2, 16))
    count = len(ranks.sent)
    assert count == 2
    with og.autocast(enabled=False), og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
        pass
    with og.autocast(recipe=DelayedScaling(reduce_amax=False), amax_reduction_group=GROUP):
        pass
    assert len(ranks.sent) == count
    with og.autocast(recipe=recipe), og.autocast(recipe=recipe, amax_reduction_group=GROUP):
        layer(torch.ones(2, 16))
    assert len(ranks.sent) == count + 1  # at the end; at the opening no group was named


def test_a_rank_may_have_built_more_before(ranks: Ranks) -> None:
    recipe = DelayedScaling(amax_history_len=7)
    for more in (0, 3):  # modules that the second rank alone has made
        for _ in range(more):
            Linear(16, 16)
        gc.collect()
        layers = og.Sequential(Linear(16, 16), Linear(16, 16))
        with og.autocast(recipe=recipe, amax_reduction_group=GROUP):
            layers(torch.ones(2, 16))
        second(ranks)
        del layers
