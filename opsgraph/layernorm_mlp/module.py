"""`LayerNormMLP`: norm, linear, activation, linear, with TransformerEngine's names and order.

The parameters are the module's own, under the names of a TransformerEngine checkpoint; a Sequential
inside, which is no submodule, reads them there.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..base import config
from ..base.errors import OpsgraphError
from ..features.dtensor import own_part
from ..guards.torch_private import constant_under_compile, opaque
from ..guards.watched import Watched
from ..op import Op
from ..ops import AllGather, Linear, Tee
from ..ops.collectives import Group, group_of, process_group
from ..ops.delayed import Queue, TellsOfWeightGradients, in_use, mark_delayed
from ..ops.main_grad import expect_overwrite
from ..ops.parameters import MarksParameters, Partition
from ..plan import Plan
from ..precision.autocast import active, meet, microbatch
from ..precision.delayed import before_loading
from ..precision.weights import hold
from ..run.sequential import Sequential
from .settings import (
    FIXED,
    NORMS,
    WHO,
    activation_of,
    attributes,
    checked,
    default_device,
    first_microbatch,
    same_size,
    tensor_parallel,
)

Init = Callable[[Tensor], Any]


def _normal(weight: Tensor) -> None:
    """normal(0, 0.023), the default initialization of both weights."""
    nn.init.normal_(weight, 0.0, 0.023)


class LayerNormMLP(MarksParameters, TellsOfWeightGradients, Watched):
    """Norm -> FC1 -> activation -> FC2. Input and output `[*, hidden_size]`.

    Parameters: layer_norm_weight, layer_norm_bias `[hidden]` (no bias with RMSNorm); fc1_weight
    `[ffn, hidden]`, twice the rows where the activation is gated, fc1_bias; fc2_weight
    `[hidden, ffn]`, fc2_bias. Returns out; with return_layernorm_output `(out, ln_out)`; with
    return_bias `(out, fc2_bias)`, the bias not added (None with bias=False); with both
    `(out, fc2_bias, ln_out)`.

    normalization: "LayerNorm" or "RMSNorm". activation: a name of `opsgraph.ops.activations`;
    activation_params: its keyword arguments. zero_centered_gamma: the norm's factor is `1 +
    weight`. init_method, output_layer_init_method: initialize fc1_weight and fc2_weight in place,
    by default normal(0, 0.023), inside `get_rng_state_tracker().fork()` where that is given.
    params_dtype: by default torch's default dtype. device: by default PyTorch's, where one was set
    (`torch.set_default_device`, `with torch.device(...)`), else CUDA where there is one.
    fuse_wgrad_accumulation: weight gradients go into the weights' `main_grad`, see
    `opsgraph.ops.main_grad`. delay_wgrad_compute: backward leaves the weight gradients to
    `backward_dw()`. checkpoint, double_backward, recompute: as of Sequential. seq_length,
    micro_batch_size and name are hints and change nothing.

    Tensor parallelism: each of the tp_size ranks of tp_group holds a share of FC1's rows (of the
    gate and of the value, where there are two) and of FC2's columns, `ffn / tp_size` wide; these
    parameters carry tensor_model_parallel, partition_dim and partition_stride. With
    set_parallel_mode the module exchanges what is needed: the sum over ranks after FC2, to which
    its bias is added once. Without it the caller does that. sequence_parallel: input and output are
    this rank's rows, along dimension 0; the norm's output is gathered before FC1 and FC2's is
    scattered. Gradients of the norm's parameters and of fc2_bias, which carry sequence_parallel,
    are then of this rank's rows, and the caller adds them over tp_group. The norm output that is
    returned is this rank's too, or all ranks' with return_layernorm_output_gathered. The ub_*
    arguments and symmetric_ar_type admit fusers that overlap an exchange with a matrix product;
    they change no result.

    All of these are attributes that may be set later, but for sizes, bias, params_dtype and device;
    to set those is an error that says what to do instead. A bias may be set to a parameter or None.

    Raises OpsgraphError for unknown names and sizes that do not fit.
    """

    distributed = False
    """Whether the parameters are DTensors of the whole layer."""
    scaled_weights = ("fc1_weight", "fc2_weight")
    hidden_size: int
    ffn_hidden_size: int
    eps: float | None
    sequence_parallel: bool
    return_bias: bool
    get_rng_state_tracker: Callable[[], Any] | None
    tp_size: int
    init_method: Init | None
    use_bias: bool
    normalization: str
    activation: str
    activation_params: Mapping[str, Any]
    output_layer_init_method: Init | None
    fuse_wgrad_accumulation: bool
    return_layernorm_output: bool
    return_layernorm_output_gathered: bool
    set_parallel_mode: bool
    zero_centered_gamma: bool
    size_per_partition: int
    overlap: tuple[str, ...]
    halves: int
    delay_wgrad_compute: bool
    symmetric_ar_type: str | None
    checkpoint: bool
    double_backward: bool
    recompute: bool
    _group: str
    _fc1_stride: int
    _given: dict[str, Any]

    @opaque
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Init | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        activation_params: Mapping[str, Any] | None = None,
        output_layer_init_method: Init | None = None,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        name: str | None = None,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        checkpoint: bool = False,
        *,
        double_backward: bool = False,
        recompute: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        super().__init__()
        self._queue = Queue()
        self._sequences: tuple[()] | tuple[Sequential] = ()
        self._take(given, tensor_parallel(tp_size, tp_group))
        place = default_device() if device is None else device
        self._declare({"device": place, "dtype": params_dtype})
        self._sequences = self._build()
        self.reset_parameters()

    def _take(self, given: Mapping[str, Any], tp: Group) -> None:
        """Check the constructor's arguments; keep them and what follows from them."""
        arguments = checked(given, tp)
        kept = {**arguments, "tp_group": tp.name or None}  # a group itself cannot be pickled
        self.__dict__.update(attributes(arguments, tp), _given=kept)

    def __setattr__(self, name: str, value: Any) -> None:
        arguments = self.__dict__.get("_given")
        if arguments is None or not (name in arguments or name in FIXED):
            super().__setattr__(name, value)
            return
        if name in FIXED:
            if name in self.__dict__ and self.__dict__[name] == value:
                return
            raise OpsgraphError(f"{WHO}: got {name} after construction, expected {FIXED[name]}")
        self._change(name, value)

    @opaque
    def _change(self, name: str, value: Any) -> None:
        """Take another value for an argument of the constructor, or raise and change nothing."""
        before = self.__dict__.copy()
        tp = Group(self._group, self.tp_size)
        try:
            if name == "tp_group":
                tp = group_of(value, WHO)
                same_size(self.tp_size, tp)
            self._take({**self._given, name: value}, tp)
            self._sequences = self._build()
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self._mark_again(before["delay_wgrad_compute"])

    def _build(self) -> tuple[Sequential]:
        """The sequence that runs. In a tuple: it is no submodule, for its ops hold nothing."""
        if self.normalization == "RMSNorm" and self.layer_norm_bias is not None:
            expected = "layer_norm_bias = None, for it has none"
            raise OpsgraphError(f"{WHO}: got normalization 'RMSNorm', expected {expected}")
        norm = NORMS[self.normalization](
            self.hidden_size, self.eps, device="meta", zero_centered_gamma=self.zero_centered_gamma
        )
        fc1, fc2, between = self._exchange(self.return_layernorm_output_gathered)
        options: dict[str, Any] = {"accumulate_into_main_grad": self.fuse_wgrad_accumulation}
        norm.borrow(self, **{own: f"layer_norm_{own}" for own in norm.names})
        norm._homes["bias"] = self, "layer_norm_bias"  # to be noticed, should there be one
        sequence = Sequential(
            norm,
            *between,
            _linear(self, "fc1", True, options | fc1),
            activation_of(self.activation, self.activation_params),
            _linear(self, "fc2", not self.return_bias, options | fc2),
            delay_wgrad_compute=self.delay_wgrad_compute,
            checkpoint=self.checkpoint,
            double_backward=self.double_backward,
            recompute=self.recompute,
            queue=self._queue,
        )
        return (sequence,)

    @constant_under_compile
    def _built(self) -> tuple[Sequential]:
        """The sequence, of a copy that has none yet."""
        with config.lock:
            if not self._sequences:
                self.__dict__["_sequences"] = self._build()
        return self._sequences  # type: ignore[return-value]

    def _declare(self, place: dict[str, Any]) -> None:
        """Register the parameters, in TransformerEngine's order."""
        hidden, bias = self.hidden_size, self.use_bias
        rows = self.size_per_partition * self.halves
        sizes: dict[str, tuple[int, ...] | None] = {
            "layer_norm_weight": (hidden,),
            "layer_norm_bias": (hidden,) if self.normalization == "LayerNorm" else None,
            "fc1_weight": (rows, hidden),
            "fc1_bias": (rows,) if bias else None,
            "fc2_weight": (hidden, self.size_per_partition),
            "fc2_bias": (hidden,) if bias else None,
        }
        self._marks = tuple(sizes)
        for name, shape in sizes.items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, **place))
            self.register_parameter(name, parameter)

    def _exchange(self, gathered: bool) -> tuple[dict[str, Any], dict[str, Any], list[Op]]:
        """How FC1 and FC2 are split, and the ops between the norm and FC1."""
        tee: list[Op] = [Tee()] if self.return_layernorm_output else []
        if not self.set_parallel_mode or self.tp_size == 1:
            return {}, {}, tee
        overlap = {"overlap": self.overlap}
        group = overlap | {
            "tensor_parallel_group": self._group,
            "sequence_parallel": self.sequence_parallel,
        }
        fc1 = group | {"tensor_parallel_mode": "column"}
        fc2 = group | {"tensor_parallel_mode": "row", "symmetric_ar_type": self.symmetric_ar_type}
        if tee and gathered and self.sequence_parallel:
            return overlap, fc2, [AllGather(self._group), *tee]
        return fc1, fc2, tee

    @property
    def tp_group(self) -> Any:
        """The process group whose ranks split the layer, or None. Kept as its name."""
        return process_group(self._group)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """Exchange tensors over another group of as many ranks."""
        self._change("tp_group", tp_group)

    def split(self, group: Group, sequence_parallel: bool) -> None:
        """Become one rank's part of a layer; the parameters are the caller's to replace."""
        changed = {"set_parallel_mode": True, "sequence_parallel": sequence_parallel}
        self._take({**self._given, **changed}, group)
        self._sequences = self._build()

    def partitions(self) -> dict[str, Partition]:
        """How ranks split the parameters that they do split."""
        rows = Partition(self._group, self.tp_size, 0, self._fc1_stride)
        columns = Partition(self._group, self.tp_size, 1)
        bias = {"fc1_bias": rows} if self.own_parameter("fc1_bias") is not None else {}
        return {"fc1_weight": rows, "fc2_weight": columns} | bias

    def _mark_parameters(self) -> None:
        split = self.partitions()
        for name in self._marks:
            parameter = self.own_parameter(name)
            if parameter is None:
                continue
            if name in ("fc1_weight", "fc2_weight"):
                mark_delayed(parameter, self.delay_wgrad_compute)
            if self.distributed:  # what DTensors are, they tell themselves
                continue
            if name in split:
                split[name].mark(parameter)
            else:
                parameter.sequence_parallel = self.sequence_parallel

    def reset_parameters(self) -> None:
        """Initialize all parameters again, e.g. after `to_empty`."""
        self.mark()
        for name, parameter in self._parameters.items():
            if parameter is not None and not name.startswith("fc"):
                one = name.endswith("weight") and not self.zero_centered_gamma
                nn.init.constant_(parameter, 1.0 if one else 0.0)
            elif parameter is not None and name.endswith("bias"):
                nn.init.zeros_(parameter)
        tracker = self.get_rng_state_tracker
        with tracker().fork() if tracker else nullcontext(), torch.no_grad():
            (self.init_method or _normal)(self.get_parameter("fc1_weight"))
            (self.output_layer_init_method or _normal)(self.get_parameter("fc2_weight"))
        hold(self, "fc1_weight", "fc2_weight")

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """inp: `[*, hidden_size]` in the parameters' dtype, or any under autocast.

        is_first_microbatch: with fuse_wgrad_accumulation, after True the next gradient that arrives
        at a weight overwrites its main_grad, whichever call it comes from: there is nothing of this
        step yet. All others are added. Under a recipe, True keeps the quantized weights, and False
        uses those of the last call with True; None quantizes them anew and keeps nothing.
        """
        if not (is_first_microbatch is None or isinstance(is_first_microbatch, bool)):
            is_first_microbatch = first_microbatch(inp, is_first_microbatch)
        if is_first_microbatch and self.fuse_wgrad_accumulation:
            for name in ("fc1_weight", "fc2_weight"):
                expect_overwrite(getattr(self, name))
        if is_first_microbatch is None or active.key is None:
            result = (self._sequences or self._built())[0].forward(inp)
        else:
            with microbatch(is_first_microbatch):
                result = (self._sequences or self._built())[0].forward(inp)
        out, *more = result if isinstance(result, tuple) else (result,)
        if self.return_bias:
            bias = None if self.fc2_bias is None else own_part(self, "fc2_bias", self.fc2_bias)
            more = [None if bias is None else bias.to(out.dtype), *more]
        return (out, *more) if more else out

    @property
    def wgrad_queue(self) -> Queue | None:
        return in_use(self._queue, self.delay_wgrad_compute)

    @opaque
    def plan(self, training: bool = True, x: Tensor | None = None) -> Plan:
        """The plan, as `Sequential.plan` gives it."""
        return self._built()[0].plan(training, x)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's sequence reads the copy's parameters: it makes its own.
        state: dict[str, Any] = super().__getstate__()
        return state | {"_sequences": (), "_queue": Queue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with suppress(OpsgraphError):  # a process group that is not here, as the first call says
            self._built()  # now, for that call may be under a compiler or a transform

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__ |= {"_sequences": ()}
        return replica

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A TransformerEngine checkpoint's pickled `_extra_state` is dropped, never unpickled."""
        own_keys = {k: v for k, v in state_dict.items() if k != f"{prefix}_extra_state"}
        before_loading(self, own_keys, prefix)
        super()._load_from_state_dict(own_keys, prefix, *args)
        unexpected = args[3]
        if f"{prefix}_extra_state" in unexpected:
            unexpected.remove(f"{prefix}_extra_state")

    def _save_to_state_dict(self, *args: Any) -> None:
        meet(self, *self.scaled_weights)
        super()._save_to_state_dict(*args)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.ffn_hidden_size}, normalization={self.normalization!r}, "
            f"activation={self.activation!r}, bias={self.use_bias}, tp_size={self.tp_size}"
        )


_ARGUMENTS = tuple(signature(LayerNormMLP.__init__).parameters)[1:]


def _linear(module: LayerNormMLP, prefix: str, bias: bool, options: Mapping[str, Any]) -> Op:
    names = {"weight": f"{prefix}_weight"} | ({"bias": f"{prefix}_bias"} if bias else {})
    ffn = module.ffn_hidden_size // (1 if "tensor_parallel_mode" in options else module.tp_size)
    sizes = (module.hidden_size, ffn * module.halves), (ffn, module.hidden_size)
    return Linear(*sizes[prefix == "fc2"], False, device="meta", **options).borrow(module, **names)
