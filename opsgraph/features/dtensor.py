"""Parameters that are DTensors: the part that a plan computes with, and its gradient.

The hook is `completed`, where a stage reads its parameters. Plans take plain tensors. Of a DTensor
they take this rank's share, as `Linear` and its like split it, or the whole where every rank has
it. Nothing of torch.distributed.tensor is imported here: that takes longer than all of opsgraph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpsgraphError
from ..kernels.exchange import collectives

PLAIN = (Tensor, nn.Parameter)
"""Types of weights that are plain tensors."""


class _SumGradient(torch.autograd.Function):
    """The identity; the gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, group_size: int) -> Tensor:
        ctx.group = group, group_size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return collectives.all_reduce(dy, *ctx.group), None, None


def own_part(module: nn.Module, name: str, weight: Any) -> Tensor:
    """What a rank computes with in the place of a parameter of some subclass of Tensor.

    A whole parameter of a sequence-parallel module sees only this rank's rows: its gradient is
    summed over the mesh, as that of a replicated DTensor has to be. Raises OpsgraphError for a
    DTensor that is split otherwise than the module computes.
    """
    if not hasattr(weight, "placements"):  # not to_local: Dynamo does not see that one
        return weight  # type: ignore[no-any-return]
    partitions: Any = getattr(module, "partitions", dict)
    partition = partitions().get(name)
    if all(placement.is_replicate() for placement in weight.placements):
        own: Tensor = weight.to_local()
        if not getattr(module, "sequence_parallel", False):
            return own
        mesh = weight.device_mesh
        summed: Tensor = _SumGradient.apply(own, mesh.get_group().group_name, mesh.size())  # type: ignore[no-untyped-call]
        return summed
    if partition is None or weight.device_mesh.ndim != 1:
        raise OpsgraphError(
            f"{type(module).__name__}: got {name} as a DTensor placed {weight.placements}, "
            "expected one that every rank has whole, or that opsgraph.parallel.TensorParallel has "
            "split (FSDP gathers parameters when the module that it wraps is called)"
        )
    share: Tensor = weight.to_local()
    return share.flatten(0, 1) if partition.stride > 1 else share


def completed(slots: Sequence[tuple[nn.Module, str]], found: list[Any]) -> list[Tensor | None]:
    """The parameters of a stage, where some were found: a parametrized one is an attribute only."""
    for k, (module, name) in enumerate(slots):
        weight = found[k]
        if type(weight) is not nn.Parameter:
            if weight is None:
                weight = getattr(module, name)
            if type(weight) not in PLAIN and weight is not None:
                weight = own_part(module, name, weight)
            found[k] = weight
    return found
