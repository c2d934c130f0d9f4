"""Modules that stand at two places, in opsgraph.parallel; tests/distributed has the ranks."""

import pytest
import torch

import opsgraph as og
from opsgraph import ops
from opsgraph.ops.collectives import Group
from opsgraph.parallel import TensorParallel, _ops, distributed_state_dict


def test_an_op_at_two_places_is_seen_at_both() -> None:
    norm, fc = ops.RMSNorm(4), ops.Linear(4, 4)
    module = og.Sequential(norm, fc, norm, ops.Linear(4, 4))
    with pytest.raises(og.OpsgraphError, match="got RMSNorm between a column- and a row-parallel"):
        TensorParallel()._alternate(list(_ops(module)), Group("", 2))
    twice = og.Sequential(fc, ops.GELU(), fc, ops.GELU())
    with pytest.raises(og.OpsgraphError, match="got one Linear where a column- and where a row-"):
        TensorParallel()._alternate(list(_ops(twice)), Group("", 2))


def test_a_state_dict_has_a_split_layer_under_both_its_names() -> None:
    block = og.Sequential(ops.Linear(4, 8), ops.SwiGLU(), ops.Linear(4, 4))
    module = og.Sequential(block, block)
    state = distributed_state_dict(module)
    assert state["0.0.weight"].shape == state["1.0.weight"].shape == (2, 4, 4)
    assert torch.equal(state["0.0.weight"].flatten(0, 1), block[0].weight)
