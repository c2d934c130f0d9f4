"""One test for all fusers: each against the reference plan, in training and in inference."""

import os

import pytest
import torch

from opsgraph.backend import backends
from opsgraph.fuser import Fuser, registered
from opsgraph.testing import check_fuser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = [f for f in registered() if backends()[f.backend].why_not_on(torch.device(DEVICE)) is None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fuser", HERE, ids=lambda fuser: fuser.name)
def test_fuser_equals_reference(fuser: Fuser, dtype: torch.dtype) -> None:
    assert check_fuser(fuser, dtype, DEVICE) > 0, "it was never taken"


@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("fuser", HERE, ids=lambda fuser: fuser.name)
def test_fuser_takes_every_shape(fuser: Fuser, shape: tuple[int, ...]) -> None:
    assert check_fuser(fuser, torch.float32, DEVICE, shape) > 0, "it was never taken"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Dynamo traces no interpreter"
)
@pytest.mark.parametrize("fuser", HERE, ids=lambda fuser: fuser.name)
def test_fuser_under_compile(fuser: Fuser) -> None:
    assert check_fuser(fuser, torch.float32, DEVICE, compiled=True) > 0, "it was never taken"
