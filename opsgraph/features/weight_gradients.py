"""Weight gradients that do not come back from the backward: delayed ones, and those in main_grad.

With `delay_wgrad_compute` the backward returns a call in a gradient's place, or a tensor where a
step has no other way, and `backward_dw` makes use of it. With `accumulate_into_main_grad` the
product adds to a buffer that an optimizer owns. Both count for weights that are factors of a
product and want a gradient; the op asks for them, or its Sequential for all.

The hook is `Request.elsewhere`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ..plan.basic_ops import BasicOps
from ..plan.program import WeightGradients


def weight_gradients(
    run: BasicOps, wanted: Collection[str], options: Mapping[str, Any]
) -> WeightGradients:
    """Which weights' gradients go another way. wanted: the weights that need gradients."""

    def asked(flag: str) -> dict[int, str]:
        everywhere, names = bool(options.get(flag)), (run.name(name, i) for i, name in run.slots)
        return {
            k: variable
            for k, ((i, name), variable) in enumerate(zip(run.slots, names, strict=True))
            if variable in wanted
            and (everywhere or getattr(run.ops[i], flag, False))
            and run.kinds[i].gemm
            and (run.kinds[i].wgrad or name == "weight")
        }

    late, accumulated = asked("delay_wgrad_compute"), asked("accumulate_into_main_grad")
    waits, added = (
        frozenset(f"d{name}" for name in found.values()) for found in (late, accumulated)
    )
    return WeightGradients(late, accumulated, waits, added)
