"""Tools that count operations and parameters, beside what they say of torch.nn's modules."""

import contextlib
import io
from typing import Any

import pytest
import torch
from tool_blocks import INNER, ROWS, WIDTH, block, plain, sequence
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = ROWS * (WIDTH * 2 * INNER + INNER * WIDTH)
"""Multiply-adds of both linear layers."""
PARAMETERS = sum(p.numel() for p in plain().parameters())


def test_flop_counter_mode(module: nn.Module, x: Tensor) -> None:
    found = []
    for one in (module, plain()):
        with FlopCounterMode(display=False) as counter:
            one(x.clone().requires_grad_()).sum().backward()
        found.append(counter.get_total_flops())
    assert found == [6 * PRODUCTS, 6 * PRODUCTS]


def test_fvcore(module: nn.Module, x: Tensor) -> None:
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    found = [count(one, x).unsupported_ops_warnings(False).total() for one in (module, plain())]
    assert found == [PRODUCTS, PRODUCTS]


def test_torchinfo(x: Tensor) -> None:
    summary = pytest.importorskip("torchinfo").summary
    found = [summary(one, input_size=x.shape, verbose=0) for one in (sequence(), plain())]
    for info in found:
        assert info.total_params == PARAMETERS
    assert found[0].total_mult_adds == found[1].total_mult_adds == ROWS * PARAMETERS
    names = [[layer.var_name for layer in info.summary_list][1:] for info in found]
    assert names[0] == names[1] == ["0", "1", "2", "3"]


def test_torchinfo_takes_a_module_without_children_for_a_convolution(x: Tensor) -> None:
    info = pytest.importorskip("torchinfo").summary(block(), input_size=x.shape, verbose=0)
    assert info.total_params == PARAMETERS
    assert info.total_mult_adds == ROWS * WIDTH * PARAMETERS


def test_thop_knows_the_classes_of_torch_nn_alone(x: Tensor) -> None:
    count = pytest.importorskip("thop").profile
    assert count(sequence(), (x,), verbose=False) == (0, 0)
    assert count(sequence().to_torch(), (x,), verbose=False)[0] == PRODUCTS
    assert count(plain(), (x,), verbose=False)[0] == PRODUCTS


@pytest.mark.parametrize("backend", ["aten", "pytorch"])
def test_ptflops(module: nn.Module, backend: str) -> None:
    count: Any = pytest.importorskip("ptflops").get_model_complexity_info

    def counted(one: nn.Module) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return count(
                one, (WIDTH,), as_strings=False, print_per_layer_stat=False, backend=backend
            )

    if backend == "aten":
        assert counted(module) == counted(plain())
    else:  # it counts calls of torch.nn.functional, and of classes of torch.nn
        assert counted(module) == (0, PARAMETERS)
        assert counted(sequence().to_torch())[0] > PRODUCTS // ROWS


def test_the_profiler_has_a_row_for_each_pass(module: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        module(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        module(x).sum().backward()
        with torch.no_grad():
            module(x)
    rows = {row.key: row.count for row in found.key_averages()}
    assert rows["opsgraph forward"] == 2
    assert rows["opsgraph backward"] == 1
    assert rows["PlanFunction"] == 1
