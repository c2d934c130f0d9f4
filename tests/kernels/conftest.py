"""Where the folder `interpreted` runs: under Triton's interpreter, or on a CUDA device.

`TRITON_INTERPRET=1 pytest tests/kernels/interpreted` runs it on the CPU (the variable is read when
Triton is imported, so it needs a process of its own; `test_interpreted.py` starts one), and
`pytest -m gpu` on a GPU.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("triton") is None:
    collect_ignore = ["interpreted", "test_interpreted.py", "test_aot.py"]
elif interpreting:
    collect_ignore = ["test_aot.py"]
elif not torch.cuda.is_available():
    collect_ignore = ["interpreted"]


@pytest.fixture
def seeded() -> Iterator[None]:
    """One seed for each test, which may set the number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
