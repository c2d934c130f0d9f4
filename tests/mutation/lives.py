"""`python -m tests.mutation.lives SEED SECONDS [MOST]`: lives, until one fails, or for that long.

MOST: how many at most.

The exit status is 1 if a life failed.
"""

import sys
import time

import torch

from opsgraph.kernels.triton import interpreting
from opsgraph.testing.fuzz.lives import live
from opsgraph.testing.fuzz.plots import Plot


def main(seed: int, seconds: float, most: int = sys.maxsize) -> int:
    """Live."""
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    for life in range(seed, seed + most):
        if time.monotonic() > end:
            return 0
        plot = Plot(life, device="interpreter" if interpreting() else "cpu")
        lived = live(plot.start, plot.steps)
        if lived.error is not None:
            said = " ".join(str(lived.error).split())
            print(f"FAILED life {life}, step {lived.steps}: {type(lived.error).__name__}: {said}")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:])))
