"""Checkpoints and PyTorch's own parallelism for modules whose parameters ranks split.

`shard_state_dict` and `gather_state_dict` turn a whole checkpoint into a rank's share and back.
`distributed_state_dict` is for torch.distributed.checkpoint, to save on some ranks and load on
others. `TensorParallel` is a ParallelStyle: `parallelize_module` with it splits a Sequential or a
LayerNormMLP over a device mesh, the parameters becoming DTensors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .base.errors import OpsgraphError
from .guards.validation import flag, mapping, shown
from .guards.validation import module as verify_module
from .kernels.exchange import collectives
from .layernorm_mlp.module import LayerNormMLP
from .op import Op
from .ops import Add, ConstantScale, Dropout, Identity, Linear, Residual, Tee
from .ops.activations import Activation, GatedActivation
from .ops.collectives import Group, group_of, process_group
from .ops.parameters import Partition
from .precision.delayed import before_loading
from .run.sequential import Sequential

ELEMENTWISE = (Activation, GatedActivation, ConstantScale, Dropout, Identity, Tee, Add)
"""What may stand between a column- and a row-parallel Linear: it needs no other rank's columns."""


class _Split(NamedTuple):
    """How a parameter is split, and whether it is a DTensor of the whole already."""

    partition: Partition
    distributed: bool


def _splits(module: nn.Module) -> dict[str, _Split]:
    """By state-dict key, also where one rank is all there is."""
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, partition in getattr(child, "partitions", dict)().items():
            whole = getattr(child, "distributed", False)
            found[dot + name] = _Split(partition, whole)
    return found


def shard_state_dict(whole: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """This rank's share of a whole checkpoint, for `module.load_state_dict`.

    What ranks do not split is passed on as it is. Raises OpsgraphError for a size that the ranks do
    not divide.
    """
    made = dict(mapping("shard_state_dict", "whole", whole))
    verify_module("shard_state_dict", module)
    for name, (partition, _) in _splits(module).items():
        name = name if name in made else _inside(name)
        if name not in made or partition.size == 1:
            continue
        size = made[name].shape[partition.dim]
        if size % (partition.size * partition.stride):
            raise OpsgraphError(
                f"shard_state_dict: got {name} of shape {tuple(made[name].shape)}, expected a "
                f"multiple of {partition.size * partition.stride} in dimension {partition.dim}"
            )
        group = process_group(partition.group)
        made[name] = partition.share(made[name], group.rank() if group else 0)
    return made


def _inside(name: str) -> str:
    """The key under which a te.ops Linear writes a parameter: that of an op inside it."""
    prefix, dot, kind = name.rpartition(".")
    return f"{prefix}{dot}basic_ops.{int(kind == 'bias')}.{kind}"


def gather_state_dict(module: nn.Module) -> dict[str, Any]:
    """The whole checkpoint, on every rank: what the state dict would be in one process.

    A collective: every rank calls it.
    """
    made: dict[str, Any] = {}
    splits = _splits(verify_module("gather_state_dict", module))
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if name in splits:
            partition, distributed = splits[name]
            if distributed:
                whole = whole.flatten(0, 1) if partition.stride > 1 else whole
            else:
                every = collectives.all_gather(whole, partition.group, partition.size)
                whole = partition.join(every.chunk(partition.size))
        made[name] = whole
    return made


def distributed_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict for torch.distributed.checkpoint: parameters that ranks split are DTensors.

    It stands for the same whole on any number of ranks, one among them: what 4 ranks save, 2 load.
    The gate and the value of a gated activation have a dimension of their own, `[2, ffn, hidden]`,
    for then shares are contiguous. Load into such a dict, then hand it to
    `load_distributed_state_dict`. A collective where FSDP has sharded the module.
    """
    made: dict[str, Any] = {}
    splits = _splits(verify_module("distributed_state_dict", module))
    for name, value in module.state_dict().items():
        made[name] = value
        if name not in splits or splits[name].distributed:
            continue
        partition = splits[name].partition
        share = value.full_tensor() if isinstance(value, DTensor) else value
        share, dim = _apart(share, partition)
        if partition.size > 1:
            mesh = DeviceMesh.from_group(process_group(partition.group), share.device.type)  # type: ignore[arg-type]
            share = DTensor.from_local(share, mesh, [Shard(dim)], run_check=False)
        made[name] = share
    return made


def load_distributed_state_dict(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put into the module what was loaded into its `distributed_state_dict`.

    Raises OpsgraphError for what does not fit the module, and then changes none of its parameters.
    """
    who = "load_distributed_state_dict"
    verify_module(who, module)
    mapping(who, "state", state)
    for prefix, child in list(module.named_modules()):
        before_loading(child, state, f"{prefix}." if prefix else "")
    splits, own = _splits(module), module.state_dict()
    loads: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, value in state.items():
            if name not in own:
                raise OpsgraphError(f"{who}: got {name!r}, expected some of {', '.join(own)}")
            target = own[name]
            if isinstance(target, Tensor) and not isinstance(value, Tensor):
                raise OpsgraphError(f"{who}: got {name}={shown(value)}, expected a tensor")
            if name in splits and not splits[name].distributed:
                value = value.to_local() if isinstance(value, DTensor) else value
                value = value.flatten(0, 1) if splits[name].partition.stride > 1 else value
                if isinstance(target, DTensor):
                    place = target.device_mesh, target.placements
                    value = distribute_tensor(value, *place, src_data_rank=None)
            if not isinstance(target, Tensor):
                continue
            if value.shape != target.shape:
                got, expected = tuple(value.shape), tuple(target.shape)
                raise OpsgraphError(f"{who}: got {name} of shape {got}, expected {expected}")
            loads.append((target, value))
        for target, value in loads:
            target.copy_(value)


def _apart(value: Tensor, partition: Partition) -> tuple[Tensor, int]:
    """A view with a dimension for pieces that are split separately, and the dimension to split."""
    if partition.stride == 1:
        return value, partition.dim
    return value.unflatten(partition.dim, (partition.stride, -1)), partition.dim + 1


class TensorParallel(ParallelStyle):
    """Split a Sequential or a LayerNormMLP over a mesh of one dimension, for `parallelize_module`.

    The Linears of a Sequential become column- and row-parallel in turn; between the two may stand
    what works element by element. sequence_parallel: input and output are each rank's rows, along
    dimension 0. Parameters become DTensors that stand for the whole: split, or the same on every
    rank. Gradients are DTensors likewise, complete: sums over the mesh that sequence parallelism
    needs are made. A Linear before a gated activation has its weight as `[2, ffn, hidden]`, its
    bias as `[2, ffn]`, so that each rank's share is contiguous. Dropout draws from each rank's own
    generator: where all ranks have the same rows, the generators have to agree.

    Raises OpsgraphError for sequences that cannot be split so.
    """

    def __init__(self, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.sequence_parallel = flag("TensorParallel", "sequence_parallel", sequence_parallel)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = group_of(device_mesh, "TensorParallel")
        if isinstance(module, LayerNormMLP):
            module.split(group, self.sequence_parallel)
            self._distribute(module, device_mesh)
        elif isinstance(module, Sequential):
            self._alternate(list(_ops(module)), group)
            for op in dict.fromkeys(_ops(module)):  # one may stand at two places
                op.sequence_parallel = self.sequence_parallel
                self._distribute(op, device_mesh)
            module._forget()
        else:
            got = type(module).__name__
            raise OpsgraphError(f"TensorParallel: got {got}, expected a Sequential or LayerNormMLP")
        return module

    def _alternate(self, ops: list[Op], group: Group) -> None:
        """Check the sequence, then split its Linears."""
        modes: list[tuple[Linear, str]] = []
        for op in ops:
            inside = len(modes) % 2 == 1
            if isinstance(op, Linear):
                modes.append((op, "row" if inside else "column"))
            elif inside and not isinstance(op, ELEMENTWISE):
                raise OpsgraphError(
                    f"TensorParallel: got {type(op).__name__} between a column- and a row-parallel "
                    "Linear, expected ops that work element by element"
                )
        if not modes or len(modes) % 2:
            raise OpsgraphError(f"TensorParallel: got {len(modes)} Linears, expected pairs of them")
        if len(dict(modes)) != len(set(modes)):
            raise OpsgraphError(
                "TensorParallel: got one Linear where a column- and where a row-parallel one "
                "stands, expected one of its own at each"
            )
        for op, mode in dict(modes).items():
            op.split(mode, group, self.sequence_parallel)

    def _distribute(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Make the module's own parameters DTensors."""
        split: dict[str, Partition] = getattr(module, "partitions", dict)()
        module.distributed = True  # type: ignore[assignment]
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            whole, place = parameter.detach(), Replicate()
            if name in split:
                whole, dim = _apart(whole, split[name])
                place = Shard(dim)  # type: ignore[assignment]
            rank = getattr(self, "src_data_rank", 0)
            value = distribute_tensor(whole, mesh, [place], src_data_rank=rank)
            made = nn.Parameter(value, parameter.requires_grad)
            setattr(module, name, made)


def _ops(module: nn.Module) -> Iterator[Op]:
    """The ops of a Sequential, those inside Residuals and nested Sequentials among them."""
    for child in module._modules.values():
        if child is None:
            continue
        if isinstance(child, Sequential | Residual | nn.ModuleList):
            yield from _ops(child)
        elif isinstance(child, Op):
            yield child
        else:
            got = type(child).__name__
            raise OpsgraphError(f"TensorParallel: got {got} in the sequence, expected ops only")
