"""The parameters of a stage: where they are, and whether they are what they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from ..features.dtensor import completed
from ..plan.basic_ops import BasicOps
from ..precision.delayed import Scaling


def shape_of(weight: Tensor | None) -> Any:
    """A parameter's shape; None where it, or its size, is not there."""
    if weight is None or isinstance(weight, UninitializedParameter):
        return None
    return tuple(weight.shape)


class Parameters:
    """Those that a stage reads: it holds their modules and names alone."""

    def __init__(self, run: BasicOps) -> None:
        self.slots = [run.ops[i].home(name) for i, name in run.slots]
        read = {(run.ops[i], name) for i, name in run.slots}
        named = ((op, name) for op in run.ops for name in (*op._parameters, *op._homes))
        others = [(op, name) for op, name in named if name not in op.joined()]
        gone = (op.home(n) for op, n in others if (op, n) not in read and not op.has(n))
        self.absent = list(dict.fromkeys(gone))
        """Where parameters may appear that no op of the run reads, for they were not there."""
        self.shapes = self._shapes()

    def weights(self) -> list[Tensor | None]:
        """The parameters as they are now."""
        return completed(self.slots, [module._parameters.get(name) for module, name in self.slots])

    def _shapes(self) -> list[Any]:
        places = (slot for slot in self.slots if not isinstance(slot[0], Scaling))
        return [shape_of(getattr(*place)) for place in places]

    def outdated(self) -> bool:
        """Whether parameters are there, gone or of other shapes than when the stage was made."""
        return self._shapes() != self.shapes or any(
            getattr(*place, None) is not None for place in self.absent
        )
