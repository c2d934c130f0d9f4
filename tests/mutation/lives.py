"""`python -m tests.mutation.lives SEED SECONDS`: lives of the fuzzer, until one fails or for long.

The exit status is 1 if a life failed.
"""

import sys
import time
from itertools import count

import torch

from opsgraph.kernels.triton import interpreting
from opsgraph.testing.fuzz.lives import live
from opsgraph.testing.fuzz.plots import Plot


def main(seed: int, seconds: float) -> int:
    """Live."""
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    for life in count(seed):
        if time.monotonic() > end:
            return 0
        plot = Plot(life, device="interpreter" if interpreting() else "cpu")
        lived = live(plot.start, plot.steps)
        if lived.error is not None:
            said = " ".join(str(lived.error).split())
            print(f"FAILED life {life}, step {lived.steps}: {type(lived.error).__name__}: {said}")
            return 1
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), float(sys.argv[2])))
