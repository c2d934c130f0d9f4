"""Weight gradients that do not come back from the backward: delayed ones, and those in main_grad.

With `delay_wgrad_compute` the backward returns a call in a gradient's place, or a tensor where a
step has no other way, and `backward_dw` makes use of it. With `accumulate_into_main_grad` the
product adds to a buffer that an optimizer owns. Both count for weights that are factors of a
product and want a gradient; the op asks for them, or its Sequential for all.

The hooks are `Request.late` and `Request.accumulated`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ..plan.basic_ops import BasicOps


def weight_gradients(
    flag: str, run: BasicOps, wanted: Collection[str], options: Mapping[str, Any]
) -> frozenset[str]:
    """The names of gradients that go the way which a flag asks for.

    wanted: what needs gradients, weights among it.
    """
    asked = [
        run.name(name, i)
        for i, name in run.slots
        if (options.get(flag) or getattr(run.ops[i], flag, False))
        and run.kinds[i].gemm
        and (run.kinds[i].wgrad or name == "weight")
    ]
    return frozenset(f"d{name}" for name in asked if name in wanted)
