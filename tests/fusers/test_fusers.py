"""One test for all fusers: each against the reference plan, in training and in inference.

Those that exchange tensors with other ranks have theirs in `distributed/test_overlap.py`.
"""

import os

import pytest
import torch

from opsgraph.base.backend import backends
from opsgraph.fuser import Fuser, registered
from opsgraph.testing import check_fuser, exchanges, samples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSERS = [fuser for fuser in registered() if not exchanges(fuser)]
every_fuser = pytest.mark.parametrize("fuser", FUSERS, ids=lambda fuser: fuser.name)


def check(
    fuser: Fuser, device: str, dtype: torch.dtype, shape=(5, 16), compiled=False, few=False
) -> None:
    reason = backends()[fuser.backend].why_not_on(torch.device(device))
    if reason is not None:
        pytest.skip(f"{fuser.backend}: {reason}")
    taken = check_fuser(fuser, dtype, device, shape, compiled, few)
    may_decline = {
        "cpu": dtype == torch.float16,
        "aten": device == "cuda",
        # The kernels want widths of 64 and are not interpreted; test_triton_paired has them.
        "triton": "Paired" in fuser.name,
        # GEMMs of groups in FP8 write bfloat16 alone, and are an H100's, which nothing emulates.
        "cublaslt": dtype != torch.bfloat16
        or (device, fuser.name) == ("cpu", "ScaledGroupedLinear"),
    }
    if not taken and may_decline.get(fuser.backend):
        pytest.skip(f"{fuser.name} declines {dtype} on {device}")
    assert taken, "never taken"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_fuser
def test_fuser_equals_reference(fuser: Fuser, dtype: torch.dtype, device: str) -> None:
    """Every day with all samples in fp32; under the interpreter with a few in bf16."""
    few = dtype != torch.float32 and not (INTERPRETED and dtype == torch.float16)
    check(fuser, device, dtype, few=few and device == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@every_fuser
def test_fuser_equals_reference_in_every_sample(
    fuser: Fuser, dtype: torch.dtype, device: str
) -> None:
    check(fuser, device, dtype)


@pytest.mark.sampled(65)
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (2, 3, 16)], ids=str)
@every_fuser
def test_fuser_takes_every_shape(fuser: Fuser, shape: tuple[int, ...], device: str) -> None:
    check(fuser, device, torch.float32, shape)


def test_few_samples_leave_out_no_kind_of_op() -> None:
    """Those of all fusers together, which is what is compiled on a CPU."""
    of_cpu = [fuser for fuser in FUSERS if fuser.backend == "cpu"]
    every, few = (
        {type(op) for fuser in of_cpu for ops in samples(fuser, few) for op in ops}
        for few in (False, True)
    )
    assert few == every


@pytest.mark.skipif(INTERPRETED, reason="Dynamo does not trace Triton's interpreter")
@every_fuser
def test_fuser_under_compile(fuser: Fuser, device: str) -> None:
    check(fuser, device, torch.float32, compiled=True)
