"""Ops between the ranks of a process group: AllGather, ReduceScatter, AllReduce, AllReduceGrad.

They work on torch.distributed (NCCL, Gloo). Rows are gathered and scattered along dimension 0, in
the order of ranks; `[seq, batch, width]` is as good as `[rows, width]`. Each has its dual in the
backward, and none writes to what it is given. A group is known by its name, which plans,
copies and pickles can hold; a module that was unpickled works where that group exists.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..base.errors import OpError, OpsgraphError
from ..guards.torch_private import resolve_group
from ..guards.validation import choice, flag, names
from ..kernels.exchange import collectives
from ..op import BACKWARD, FORWARD, Op, Spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    GroupLike = dist.ProcessGroup | DeviceMesh | str

OVERLAP = (
    "ub_overlap_ag",
    "ub_overlap_rs",
    "ub_overlap_rs_dgrad",
    "ub_bulk_dgrad",
    "ub_bulk_wgrad",
)
"""What a layer may ask to have exchanges hidden by."""
SYMMETRIC = ("multimem_all_reduce", "two_shot", "one_shot")
"""All-reduces over symmetric memory that a row-parallel layer may ask for."""


def reduction(who: str, name: str, value: Any) -> Any:
    """One of `SYMMETRIC`, or None."""
    return choice(who, name, value, (None, *SYMMETRIC))


def overlaps(who: str, name: str, value: Any) -> Any:
    """Some of `OVERLAP`, sorted."""
    return tuple(choice(who, name, item, OVERLAP) for item in names(who, name, value))


class Group(NamedTuple):
    """A process group as plans know it. The name is "" where there is no other process."""

    name: str
    size: int


def group_of(group: "GroupLike | None", who: str) -> Group:
    """The name and size of a group; None is all ranks, or this process alone without any.

    Takes a ProcessGroup, a DeviceMesh of one dimension or a group's name. Raises OpsgraphError,
    which begins with `who`, for anything else and for a group that this rank is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise OpsgraphError(
                f"{who}: got a process group, but torch.distributed is not initialized; expected "
                "torch.distributed.init_process_group() before"
            )
        return Group("", 1)
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, str):
        group = _by_name(group, who)
    if not isinstance(group, dist.ProcessGroup):
        group = _of_mesh(group, who)
    return Group(group.group_name, group.size())


def _by_name(name: str, who: str) -> dist.ProcessGroup:
    try:
        group: dist.ProcessGroup = resolve_group(name)
    except (RuntimeError, ValueError) as error:
        raise OpsgraphError(f"{who}: got process group {name!r}, which is not here") from error
    return group


def _of_mesh(mesh: Any, who: str) -> dist.ProcessGroup:
    if not hasattr(mesh, "get_group"):
        expected = "a ProcessGroup that this rank is in, a DeviceMesh or a group's name"
        raise OpsgraphError(f"{who}: got process group {mesh!r}, expected {expected}")
    if mesh.ndim != 1:
        raise OpsgraphError(f"{who}: got a mesh of {mesh.ndim} dimensions, expected 1")
    group: dist.ProcessGroup = mesh.get_group()
    return group


def process_group(name: str) -> dist.ProcessGroup | None:
    """The group of that name; None for "", this process alone."""
    return _by_name(name, "process_group") if name else None


class Collective(Op):
    """What they share. process_group: as `group_of` takes it, by default all ranks."""

    keeps_width = True
    collective = True
    constants = ("group", "group_size")

    def __init__(self, process_group: "GroupLike | None" = None) -> None:
        super().__init__()
        self.group, self.group_size = group_of(process_group, type(self).__name__)

    def identity(self, direction: str, training: bool) -> bool:
        return self.group_size == 1

    def reject(self, x: Spec) -> str | None:
        return None

    def out(self, x: Spec) -> Spec:
        return x

    def extra_repr(self) -> str:
        return f"group={self.group!r}, group_size={self.group_size}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)


def _scatter(x: Tensor, group: str, group_size: int) -> Tensor:
    if x.shape[0] % group_size:
        raise OpError("ReduceScatter", f"{x.shape[0]} rows", f"a multiple of {group_size} ranks")
    return collectives.reduce_scatter(x, group, group_size)


class AllGather(Collective):
    """`y = [x of rank 0; x of rank 1; ...]`; dx is the reduce-scatter of dy."""

    def row_factor(self) -> Fraction:
        return Fraction(self.group_size)

    def fwd(self, x: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return collectives.all_gather(x, group, group_size), ()

    def bwd(self, dy: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return _scatter(dy, group, group_size), ()


class ReduceScatter(Collective):
    """y is this rank's share of the rows of the sum of x over ranks; dx gathers dy.

    The number of rows must be a multiple of the group's size.
    """

    def row_factor(self) -> Fraction:
        return Fraction(1, self.group_size)

    def fwd(self, x: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return _scatter(x, group, group_size), ()

    def bwd(self, dy: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return collectives.all_gather(dy, group, group_size), ()


class AllReduce(Collective):
    """y is the sum of x over ranks; dx is dy, which every rank has in full.

    reduce_in_backward is in TransformerEngine's signature. Neither library reads it.
    """

    def __init__(
        self, process_group: "GroupLike | None" = None, reduce_in_backward: bool = True
    ) -> None:
        super().__init__(process_group)
        flag("AllReduce", "reduce_in_backward", reduce_in_backward)

    def identity(self, direction: str, training: bool) -> bool:
        return self.group_size == 1 or direction == BACKWARD

    def fwd(self, x: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return collectives.all_reduce(x, group, group_size), ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return dy, ()


class AllReduceGrad(Collective):
    """y is x, which every rank has in full; dx is the sum of dy over ranks."""

    def identity(self, direction: str, training: bool) -> bool:
        return self.group_size == 1 or direction == FORWARD

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x, ()

    def bwd(self, dy: Tensor, group: str, group_size: int) -> tuple[Tensor, tuple[()]]:
        return collectives.all_reduce(dy, group, group_size), ()
