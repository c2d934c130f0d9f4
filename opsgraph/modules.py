"""`LayerNormMLP`: norm, linear, activation, linear, with TransformerEngine's names and order.

The parameters are the module's own, under the names of a TransformerEngine checkpoint; a Sequential
inside, which is no submodule, reads them there.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OpsgraphError
from .op import Op
from .ops import LayerNorm, Linear, RMSNorm, Tee
from .ops.activations import ACTIVATIONS, GATED
from .plan import Plan
from .precision import active, microbatch
from .quantized_parameter import hold
from .scaling import make_for
from .sequential import Sequential

NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}

Init = Callable[[Tensor], Any]


def _normal(weight: Tensor) -> None:
    """normal(0, 0.023), the default initialization of both weights."""
    nn.init.normal_(weight, 0.0, 0.023)


def _known(what: str, got: str, known: Mapping[str, Any]) -> None:
    if got not in known:
        raise OpsgraphError(f"LayerNormMLP: got {what} {got!r}, expected one of {', '.join(known)}")


class LayerNormMLP(nn.Module):
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
    params_dtype: by default torch's default dtype. device: by default CUDA where there is one.
    fuse_wgrad_accumulation: weight gradients go into the weights' `main_grad`, see
    `opsgraph.ops.main_grad`. delay_wgrad_compute: backward leaves the weight gradients to
    `backward_dw()`. checkpoint: only the input is saved; the backward makes the norm, FC1 and the
    activation again. seq_length, micro_batch_size and name are hints and change nothing.

    Raises OpsgraphError for unknown names and sizes that do not fit, NotImplementedError for
    arguments that opsgraph does not support yet.
    """

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
    ) -> None:
        super().__init__()
        _known("normalization", normalization, NORMS)
        _known("activation", activation, ACTIVATIONS)
        overlap = {
            "ub_overlap_ag": ub_overlap_ag,
            "ub_overlap_rs": ub_overlap_rs,
            "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
            "ub_bulk_dgrad": ub_bulk_dgrad,
            "ub_bulk_wgrad": ub_bulk_wgrad,
        }
        _check_parallel(ffn_hidden_size, tp_size, tp_group, sequence_parallel, overlap)
        _not_yet(
            set_parallel_mode=set_parallel_mode,
            symmetric_ar_type=symmetric_ar_type,
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.normalization, self.activation, self.use_bias = normalization, activation, bias
        self.return_bias = return_bias
        self.return_layernorm_output = return_layernorm_output
        self.name = name
        self._init_methods = (init_method or _normal, output_layer_init_method or _normal)
        self._rng = get_rng_state_tracker
        rows = ffn_hidden_size * (2 if activation in GATED else 1)
        self._declare(rows, {"device": device, "dtype": params_dtype})
        norm = NORMS[normalization](
            hidden_size, eps, zero_centered_gamma=zero_centered_gamma, device="meta"
        )
        self.zero_centered_gamma = zero_centered_gamma
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        params = dict(activation_params or {})

        def sequence(overwrite: bool) -> Sequential:
            grads = {
                "accumulate_into_main_grad": fuse_wgrad_accumulation,
                "overwrite_main_grad": overwrite,
            }
            fc2_bias = bias and not return_bias
            return Sequential(
                norm.borrow(self, **{own: f"layer_norm_{own}" for own in norm.names}),
                *([Tee()] if return_layernorm_output else []),
                _linear(self, "fc1", hidden_size, rows, bias, grads),
                ACTIVATIONS[activation](**params),
                _linear(self, "fc2", ffn_hidden_size, hidden_size, fc2_bias, grads),
                delay_wgrad_compute=delay_wgrad_compute,
                checkpoint=checkpoint,
            )

        # In a tuple: they are no submodules, for their ops hold nothing. The second is for a first
        # microbatch, whose weight gradients overwrite main_grad.
        self._sequences = (sequence(False), sequence(True))
        self.reset_parameters()

    def _declare(self, rows: int, place: dict[str, Any]) -> None:
        """Register the parameters, in TransformerEngine's order."""
        hidden, bias = self.hidden_size, self.use_bias
        sizes: dict[str, tuple[int, ...] | None] = {
            "layer_norm_weight": (hidden,),
            "layer_norm_bias": (hidden,) if self.normalization == "LayerNorm" else None,
            "fc1_weight": (rows, hidden),
            "fc1_bias": (rows,) if bias else None,
            "fc2_weight": (hidden, self.ffn_hidden_size),
            "fc2_bias": (hidden,) if bias else None,
        }
        for name, shape in sizes.items():
            made = None if shape is None else nn.Parameter(torch.empty(shape, **place))
            self.register_parameter(name, made)

    def reset_parameters(self) -> None:
        """Initialize all parameters again, e.g. after `to_empty`."""
        for name, parameter in self._parameters.items():
            if parameter is not None and not name.startswith("fc"):
                one = name.endswith("weight") and not self.zero_centered_gamma
                nn.init.constant_(parameter, 1.0 if one else 0.0)
            elif parameter is not None and name.endswith("bias"):
                nn.init.zeros_(parameter)
        fork = self._rng().fork() if self._rng else nullcontext()
        with fork, torch.no_grad():
            self._init_methods[0](self.get_parameter("fc1_weight"))
            self._init_methods[1](self.get_parameter("fc2_weight"))
        hold(self, "fc1_weight", "fc2_weight")

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """inp: `[*, hidden_size]` in the parameters' dtype, or any under autocast.

        is_first_microbatch: with fuse_wgrad_accumulation, True overwrites main_grad; False and
        None accumulate. Under a recipe, True keeps the quantized weights, and False uses those of
        the last call with True; None quantizes them anew and keeps nothing.
        """
        first = self.fuse_wgrad_accumulation and bool(is_first_microbatch)
        if is_first_microbatch is None or active.key is None:
            result = self._sequences[first](inp)
        else:
            with microbatch(is_first_microbatch):
                result = self._sequences[first](inp)
        out, *more = result if isinstance(result, tuple) else (result,)
        if self.return_bias:
            bias = self.fc2_bias
            more.insert(0, None if bias is None else bias.to(out.dtype))
        return (out, *more) if more else out

    def backward_dw(self) -> None:
        """Compute the weight gradients of FC2 and FC1 that the oldest backward delayed."""
        queued = [s for s in self._sequences if s.queued_backward_dw()]
        (queued or self._sequences)[0].backward_dw()

    def need_backward_dw(self) -> bool:
        """Whether weight gradients are delayed until `backward_dw`."""
        return self._sequences[0].need_backward_dw()

    def plan(self, training: bool = True, x: Tensor | None = None) -> Plan:
        """The plan, as `Sequential.plan` gives it."""
        found: Plan = self._sequences[0].plan(training, x)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A TransformerEngine checkpoint's pickled `_extra_state` is dropped, never unpickled."""
        given = {k: v for k, v in state_dict.items() if k != f"{prefix}_extra_state"}
        make_for(self, given, prefix, ("fc1_weight", "fc2_weight"))
        super()._load_from_state_dict(given, prefix, *args)
        unexpected = args[3]
        if f"{prefix}_extra_state" in unexpected:
            unexpected.remove(f"{prefix}_extra_state")

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.ffn_hidden_size}, normalization={self.normalization!r}, "
            f"activation={self.activation!r}, bias={self.use_bias}"
        )


def _linear(
    module: LayerNormMLP, prefix: str, width: int, rows: int, bias: bool, grads: Mapping[str, Any]
) -> Op:
    names = {"weight": f"{prefix}_weight"} | ({"bias": f"{prefix}_bias"} if bias else {})
    return Linear(width, rows, bias, device="meta", **grads).borrow(module, **names)


def _check_parallel(
    ffn: int, tp_size: int, tp_group: Any, sequence_parallel: bool, overlap: Mapping[str, bool]
) -> None:
    if ffn % tp_size:
        raise OpsgraphError(
            f"LayerNormMLP: got ffn_hidden_size {ffn}, expected a multiple of tp_size {tp_size}"
        )
    if tp_size > 1 and tp_group is None:
        raise OpsgraphError(f"LayerNormMLP: got tp_size {tp_size} and no tp_group, expected one")
    given = [name for name, on in overlap.items() if on]
    if given and not (sequence_parallel and tp_size > 1):
        raise OpsgraphError(
            f"LayerNormMLP: got {', '.join(given)} without sequence parallelism, expected "
            "sequence_parallel=True and tp_size > 1"
        )
    if tp_size > 1:
        raise NotImplementedError("LayerNormMLP: tp_size > 1 is not supported yet")


def _not_yet(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise NotImplementedError(f"LayerNormMLP: {name} is not supported yet")
