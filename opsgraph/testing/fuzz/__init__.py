"""A random life of a random module: each step is checked against fp64 formulas.

`python -m opsgraph.testing.fuzz --minutes N --seed S` lives many. A life that fails is shrunk to a
short script, which runs by itself:

    from opsgraph.testing.fuzz import Life

    life = Life("bfloat16", seed=3)
    life.build("RMSNorm(8)", "Linear(8, 8)")
    life.call((4,))
"""

from .changes import Impossible
from .compare import Wrong
from .life import Life

__all__ = ["Impossible", "Life", "Wrong"]
