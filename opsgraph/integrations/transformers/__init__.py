"""`patch(model)`: the norms and MLPs of a model as plans, found by what they compute, and proven.

The model is run on a small example, with stand-ins in the place of its linear layers, norms and
activations (`deferred`, `learn`). What they do one after the other is rebuilt as ops that read the
same parameters (`build`), and compared with the model's own modules, values and gradients
(`prove`). From then on these modules, called in a proven order, hand on values that are not
computed yet, until one plan computes all; called in another order they compute as they always did.
Modules of stacked experts are found and proven by themselves (`experts`).
"""

from .patch import patch, unpatch
from .report import Report, Row

__all__ = ["Report", "Row", "patch", "unpatch"]
