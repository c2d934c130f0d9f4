"""Fixtures of the tests of tools."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tool_blocks import ROWS, WIDTH, block, sequence
from torch import Tensor, nn


@pytest.fixture(params=[sequence, block], ids=["sequence", "block"])
def module(request: Any) -> nn.Module:
    """Of opsgraph's, each."""
    make: Callable[[], nn.Module] = request.param
    return make()


@pytest.fixture
def x() -> Tensor:
    """An input."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
