"""Linear layers: BasicLinear (the GEMM), and Linear, which lowers to it and a Bias."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..guards.validation import (
    Checked,
    Fixed,
    choice,
    features,
    flag,
    function,
    place,
    whole,
)
from ..op import Lowered, Op, Spec, arguments
from ..precision import products as scaled
from ..precision.autocast import meet
from ..precision.delayed import before_loading
from ..precision.quantizers import Quantized
from ..precision.weights import hold
from .bias import Bias
from .collectives import (
    AllGather,
    AllReduce,
    AllReduceGrad,
    Group,
    ReduceScatter,
    group_of,
    overlaps,
    reduction,
)
from .delayed import Queue, TellsOfWeightGradients, in_use, mark_delayed, queue_of
from .main_grad import weight_gradient
from .parameters import MarksParameters, Partition, empty_parameter, keys_of_basic_ops, shards

if TYPE_CHECKING:
    from .collectives import GroupLike


PARALLEL = "another layer, or opsgraph.parallel.TensorParallel"
"""What splits a layer among ranks, which no attribute does later."""


_serials = itertools.count()
"""Linear layers, as they are made: the same on all ranks that make the same modules."""

Operand = Any
"""A tensor, or `Quantized` under a recipe."""


FUNCTIONS = ("fwd", "bwd", "dgrad", "wgrad", "again", "reject", "out", "saved", "identity") + (
    "saves", "constants", "extra_inputs", "random",
)  # fmt: skip
"""What a subclass of Linear overrides if its product is not BasicLinear's."""


class BasicLinear(MarksParameters, TellsOfWeightGradients, Op):
    """`y = x @ weight.T`. x: `[*, in_features]`; weight: `[out_features, in_features]`.

    Either size may be left out where a neighbour or the first input tells it. The weight is
    initialized as nn.Linear's (uniform within `1/sqrt(in_features)`), or by `init_method(weight)`.
    accumulate_into_main_grad: the weight's gradient goes into `weight.main_grad`, see `main_grad`.
    delay_wgrad_compute: the backward leaves the weight's gradient to `backward_dw()`.
    userbuffers_options is a hint and changes nothing.

    Tensor parallelism, over the ranks of tensor_parallel_group (a ProcessGroup, a DeviceMesh of one
    dimension or a group's name; by default all ranks): with tensor_parallel_mode="column" a rank
    holds a share of the weight's rows, takes all of x and makes a share of y's columns; with "row"
    it holds a share of the weight's columns and takes a share of x's, and y is the sum over ranks.
    With sequence_parallel a column-parallel layer gathers the ranks' rows of x and a row-parallel
    one leaves each rank its rows of y. in_features and out_features are those of the whole layer;
    the weight is this rank's share, initialized inside `rng_state_tracker_function().fork()` where
    that is given, and carries tensor_model_parallel, partition_dim and partition_stride.
    partition_stride: in how many pieces the rows are before each is split, by default 2 where a
    gated activation follows in a sequence, else 1. overlap, symmetric_ar_type: read by fusers that
    hide an exchange behind a matrix product. Raises OpError for sizes that the ranks do not
    divide.
    """

    gemm = quantizable = lowers_subclasses = True
    required = ("weight",)
    distributed = False
    """Whether the parameters are DTensors of the whole layer."""
    scaled_weights = ("weight",)
    in_features = Checked(features)
    out_features = Checked(features)
    tensor_parallel_mode = Fixed(PARALLEL)
    group = Fixed(PARALLEL)
    group_size = Fixed(PARALLEL)
    shards = Fixed(PARALLEL)
    sequence_parallel = Checked(flag)
    accumulate_into_main_grad = Checked(flag)
    overwrite_main_grad = Checked(flag)
    delay_wgrad_compute = Checked(flag)
    init_method = Checked(function)
    rng_state_tracker_function = Checked(function)
    overlap = Checked(overlaps)
    partition_stride = Checked(whole)
    symmetric_ar_type = Checked(reduction)

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        tensor_parallel_mode: str | None = None,
        tensor_parallel_group: "GroupLike | None" = None,
        sequence_parallel: bool = False,
        rng_state_tracker_function: Callable[[], Any] | None = None,
        partition_stride: int | None = None,
        overlap: Iterable[str] = (),
        symmetric_ar_type: str | None = None,
        accumulate_into_main_grad: bool = False,
        overwrite_main_grad: bool = False,
        delay_wgrad_compute: bool = False,
        userbuffers_options: Mapping[str, Any] | None = None,
    ) -> None:
        who = type(self).__name__
        choice(who, "tensor_parallel_mode", tensor_parallel_mode, (None, "column", "row"))
        group = Group("", 1)
        if tensor_parallel_mode is not None:
            group = group_of(tensor_parallel_group, who)
        place(who, device, dtype)
        if not isinstance(userbuffers_options, Mapping | None):
            raise OpError(who, f"userbuffers_options={userbuffers_options!r}", "a dict or None")
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shards = shards(tensor_parallel_mode, group.size)
        """Among how many ranks the weight's rows and columns are split."""
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.overwrite_main_grad = overwrite_main_grad
        self.delay_wgrad_compute = delay_wgrad_compute
        self.init_method = init_method
        self.group, self.group_size = group
        self.tensor_parallel_mode = tensor_parallel_mode
        split = flag(who, "sequence_parallel", sequence_parallel)
        self.sequence_parallel = split and group.size > 1
        self.partition_stride = 1 if partition_stride is None else partition_stride
        self._stride_given = partition_stride is not None
        self.overlap, self.symmetric_ar_type = overlap, symmetric_ar_type
        self.rng_state_tracker_function = rng_state_tracker_function
        self.serial = next(_serials)
        self.weight = empty_parameter(self._stored("weight"), device, dtype)
        if not isinstance(self, Linear):
            self.reset_parameters()

    @property
    def wgrad_queue(self) -> Queue | None:
        return in_use(queue_of(self), self.delay_wgrad_compute)

    def reset_parameters(self) -> None:
        """Initialize the parameters, where their sizes are known."""
        self.mark()
        tracker = self.rng_state_tracker_function
        with tracker().fork() if tracker else nullcontext():
            self._reset_weight()
            if self.tensor_parallel_mode != "row":
                self._reset_bias()
        if self.tensor_parallel_mode == "row":  # the same on every rank
            self._reset_bias()

    def _reset_weight(self) -> None:
        if isinstance(self.weight, UninitializedParameter):
            return
        if self.init_method is None and self.shards[1] == 1:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        elif self.init_method is None:  # by the whole layer's width
            bound = 1 / math.sqrt(self.in_features or 1)
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            with torch.no_grad():
                self.init_method(self.weight)
        hold(self, "weight")

    def _reset_bias(self) -> None:
        bias = self.own_parameter("bias")
        if bias is None or isinstance(bias, UninitializedParameter):
            return
        if self.init_method is not None or not self.in_features:
            nn.init.zeros_(bias)
        else:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(bias, -bound, bound)

    @property
    def local_in_features(self) -> int | None:
        """The input width on this rank: a share where the weight is split by columns."""
        return self._share(self.in_features, "in_features", self.shards[1])

    @property
    def local_out_features(self) -> int | None:
        """The output width on this rank: a share where the weight is split by rows."""
        return self._share(self.out_features, "out_features", self.shards[0])

    def _share(self, whole: int | None, name: str, ranks: int) -> int | None:
        if whole is not None and whole % ranks:
            expected = f"a multiple of {ranks}, for the ranks of the group"
            raise OpError(type(self).__name__, f"{name} {whole}", expected)
        return None if whole is None else whole // ranks

    @property
    def in_width(self) -> int | None:
        return self.local_in_features

    def width_before(self, out_width: int) -> int | None:
        return self.local_in_features

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        if self.in_features is None and in_width is not None:
            self.in_features = in_width * self.shards[1]
        if self.out_features is None and out_width is not None:
            self.out_features = out_width * self.shards[0]
        rows, columns = self.local_out_features, self.local_in_features
        if rows is None or columns is None:
            return
        lazy = [n for n, p in self._parameters.items() if isinstance(p, UninitializedParameter)]
        for name in lazy:
            self._parameters[name].materialize(self._stored(name))  # type: ignore[union-attr]
        if lazy:
            self.reset_parameters()

    def _own_keys(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        return super()._own_keys(keys_of_basic_ops(state_dict, prefix), prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict = self._own_keys(state_dict, prefix)
        before_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        meet(self, *self.scaled_weights)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.out_features = shape[0] * self.shards[0]
        if name == "weight":
            self.in_features = shape[1] * self.shards[1]

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        rows, columns = self.local_out_features, self.local_in_features
        return {"weight": (rows, columns), "bias": (rows,)}.get(name)

    def _stored(self, name: str) -> tuple[int | None, ...]:
        """The shape of a parameter as the layer has it."""
        return self.shape_of(name) or ()

    def out(self, x: Spec) -> Spec:
        return x.like(self.local_out_features)

    def fwd(self, x: Operand, weight: Operand) -> tuple[Tensor, tuple[()]]:
        return (scaled.forward(x, weight) if isinstance(x, Quantized) else F.linear(x, weight)), ()

    def dgrad(self, dy: Operand, weight: Operand) -> Tensor:
        return scaled.dgrad(dy, weight) if isinstance(weight, Quantized) else dy @ weight

    def wgrad(self, dy: Operand, x: Operand, weight_stored: Tensor) -> Any:
        """`dy.T @ x`, or into the weight's main_grad; fusers with a linear inside call it too."""
        product = scaled.wgrad if isinstance(x, Quantized) else _wgrad
        return weight_gradient(self, product, dy, x, weight_stored)

    def wgrad_by(
        self, product: Callable[..., Tensor], dy: Operand, x: Operand, weight_stored: Tensor
    ) -> Any:
        """`wgrad` for fusers with a product of their own, see `main_grad.weight_gradient`."""
        return self.weigh(weight_gradient, self, product, dy, x, weight_stored)

    def precede(self, op: nn.Module | None) -> None:
        """Take note of the op after this one: it may have pieces that are split separately."""
        stride = getattr(op, "pieces", 1)
        if not self._stride_given and stride != self.partition_stride:
            self.__dict__["partition_stride"] = stride  # no plan depends on it
            self.mark()

    def split(self, mode: str | None, group: Group, sequence_parallel: bool) -> None:
        """Become one rank's part of a layer; the parameters are the caller's to replace.

        Raises OpError for sizes that the ranks do not divide.
        """
        rows, columns = shards(mode, group.size)
        pieces = self.partition_stride if mode == "column" else 1
        self._share(self.out_features, "out_features", rows * pieces)
        self._share(self.in_features, "in_features", columns)
        self.__dict__ |= {"tensor_parallel_mode": mode, "shards": (rows, columns)}
        self.__dict__ |= {"group": group.name, "group_size": group.size}
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.touch()

    def partitions(self) -> dict[str, Partition]:
        """How ranks split the parameters that they do split, one rank among them."""
        if self.tensor_parallel_mode == "row":
            return {"weight": Partition(self.group, self.group_size, 1)}
        if self.tensor_parallel_mode is None and self.partition_stride == 1:
            return {}
        split = Partition(self.group, self.group_size, 0, self.partition_stride)
        return {"weight": split} | ({"bias": split} if self.has("bias") else {})

    def _mark_parameters(self) -> None:
        mark_delayed(self.own_parameter("weight"), self.delay_wgrad_compute)
        if self.tensor_parallel_mode is None or self.distributed:
            return
        for name, partition in self.partitions().items():
            partition.mark(self.own_parameter(name))
        bias = self.own_parameter("bias")
        if bias is not None and self.tensor_parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel and self.group_size > 1

    def _product_kind(self) -> type[Op]:
        """The op that multiplies."""
        return type(self)

    def lower(self) -> Sequence[Lowered]:
        kind = self._product_kind()
        parts: list[type[Op]] = [kind]
        added = self.has("bias") and "bias" not in arguments(kind.fwd)
        if self.group_size > 1 and self.tensor_parallel_mode == "column":
            parts.insert(0, AllGather if self.sequence_parallel else AllReduceGrad)
        elif self.group_size > 1:
            parts.append(ReduceScatter if self.sequence_parallel else AllReduce)
            if self.has("bias") and not added:
                got = "a row-parallel layer whose fwd adds the bias, on every rank"
                raise OpError(type(self).__name__, got, "a fwd without it")
        if added:
            parts.append(Bias)
        return [Lowered(part, self) for part in parts]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(out_features=24),)


def _wgrad(dy: Tensor, x: Tensor) -> Tensor:
    return dy.t() @ x


class Linear(BasicLinear):
    """`y = x @ weight.T + bias`: a drop-in for nn.Linear, with its keys and its initialization.

    x: `[*, in_features]`; weight: `[out_features, in_features]`; bias: `[out_features]` or None.
    init_method initializes the weight alone; the bias is 0 then.

    Tensor parallelism, and all other arguments: as BasicLinear's. A column-parallel layer holds a
    share of the bias; a row-parallel one adds it once, after the sum. The gradient of a
    row-parallel bias is with sequence_parallel of this rank's rows and not reduced over the group;
    that bias carries sequence_parallel.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype, **options)
        self.register_parameter("bias", None)
        if flag(type(self).__name__, "bias", bias):
            self.bias = empty_parameter((self.local_out_features,), device, dtype)
        self.reset_parameters()

    def lower(self) -> Sequence[Lowered]:
        if not hasattr(*self.home("bias")):
            raise OpError(type(self).__name__, "no attribute 'bias'", "a parameter or None")
        return super().lower()

    def _product_kind(self) -> type[Op]:
        kind = type(self)
        names = FUNCTIONS if kind is not Linear else ()
        overridden = any(getattr(kind, name) is not getattr(BasicLinear, name) for name in names)
        return kind if overridden else BasicLinear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.has('bias')}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(out_features=24), cls(out_features=24, bias=False)
