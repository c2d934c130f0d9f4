"""The tests' own guards hold."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    x = torch.ones(4, dtype=dtype)
    for fresh in (torch.empty(4, dtype=dtype), torch.empty_like(x), x.new_empty(4)):
        assert fresh.float().isnan().all()


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1
