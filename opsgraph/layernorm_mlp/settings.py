"""What LayerNormMLP is made with: checks of its arguments, whenever they are given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._device import DeviceContext

from ..base.errors import OpError, OpsgraphError
from ..features.inputs import verify_tensor
from ..guards.validation import epsilon, flag, function, place, size, text, whole
from ..op import Op
from ..ops import LayerNorm, RMSNorm
from ..ops.activation_names import ACTIVATIONS, GATED, keywords
from ..ops.collectives import OVERLAP, SYMMETRIC, Group, group_of

WHO = "LayerNormMLP"
NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
FLAGS = (
    "sequence_parallel",
    "return_bias",
    "bias",
    "fuse_wgrad_accumulation",
    "return_layernorm_output",
    "return_layernorm_output_gathered",
    "set_parallel_mode",
    "zero_centered_gamma",
    "delay_wgrad_compute",
    "checkpoint",
    "double_backward",
    "recompute",
    *OVERLAP,
)
FUNCTIONS = ("get_rng_state_tracker", "init_method", "output_layer_init_method")
FIXED = {
    "hidden_size": "another module",
    "ffn_hidden_size": "another module",
    "size_per_partition": "another module",
    "tp_size": "another module, or opsgraph.parallel.TensorParallel",
    "bias": "fc1_bias and fc2_bias set to parameters, or to None",
    "use_bias": "fc1_bias and fc2_bias set to parameters, or to None",
    "params_dtype": "module.to(dtype)",
    "device": "module.to(device)",
    "overlap": "the ub_* attributes",
    "halves": "another activation",
}
"""What only the constructor takes, and what follows of other settings: what to use instead."""
_NOT_KEPT = ("bias", "tp_group", "device", "params_dtype", "tp_size")


def known(argument: str, got: Any, names: Mapping[str, Any]) -> None:
    """Raises OpsgraphError for a value that is none of the names."""
    if not isinstance(got, str) or got not in names:
        raise OpsgraphError(f"{WHO}: got {argument} {got!r}, expected one of {', '.join(names)}")


def activation_of(name: str, params: Mapping[str, Any]) -> Op:
    """An activation by name, with its arguments."""
    allowed = keywords(name)
    if unknown := [key for key in params if key not in allowed]:
        got = f"activation_params {', '.join(map(repr, unknown))} for {name!r}"
        raise OpsgraphError(f"{WHO}: got {got}, expected some of {', '.join(allowed)}")
    return ACTIVATIONS[name](**params)


def checked(given: Mapping[str, Any], tp: Group) -> dict[str, Any]:
    """All arguments, checked one by one and together; flags as True or False."""
    arguments = dict(given)
    place(WHO, arguments["device"], arguments["params_dtype"])
    known("normalization", arguments["normalization"], NORMS)
    known("activation", arguments["activation"], ACTIVATIONS)
    for name in ("hidden_size", "ffn_hidden_size"):
        arguments[name] = whole(WHO, name, arguments[name])
    if arguments["eps"] is not None or arguments["normalization"] == "LayerNorm":
        arguments["eps"] = epsilon(WHO, "eps", arguments["eps"])
    for name in FLAGS:
        arguments[name] = flag(WHO, name, arguments[name])
    _check_overlap(arguments, tp)
    check_shares(arguments["ffn_hidden_size"], tp)
    if arguments["symmetric_ar_type"] is not None:
        known("symmetric_ar_type", arguments["symmetric_ar_type"], dict.fromkeys(SYMMETRIC))
    for name in ("seq_length", "micro_batch_size"):
        arguments[name] = size(WHO, name, arguments[name])
    text(WHO, "name", arguments["name"])
    for name in FUNCTIONS:
        function(WHO, name, arguments[name])
    if not isinstance(params := arguments["activation_params"], Mapping | None):
        raise OpError(WHO, f"activation_params={params!r}", "a dict of keyword arguments or None")
    arguments["activation_params"] = dict(arguments["activation_params"] or {})
    arguments["sequence_parallel"] = arguments["sequence_parallel"] and tp.size > 1
    return arguments


def attributes(arguments: Mapping[str, Any], tp: Group) -> dict[str, Any]:
    """The attributes of a module: checked arguments, and what follows from them."""
    act = activation_of(arguments["activation"], arguments["activation_params"])
    off = {"ub_bulk_dgrad", "ub_bulk_wgrad"} if arguments["ub_overlap_rs_dgrad"] else set()
    return {name: value for name, value in arguments.items() if name not in _NOT_KEPT} | {
        "use_bias": arguments["bias"],
        "tp_size": tp.size,
        "size_per_partition": arguments["ffn_hidden_size"] // tp.size,
        "overlap": tuple(name for name in OVERLAP if arguments[name] and name not in off),
        "halves": 2 if arguments["activation"] in GATED else 1,
        "_group": tp.name,
        "_fc1_stride": getattr(act, "pieces", 1),
    }


def default_device() -> torch.device | str | None:
    """None, for PyTorch's default device, where one was set; else CUDA where there is one."""
    modes = torch.overrides._get_current_function_mode_stack()
    if any(isinstance(mode, DeviceContext) for mode in modes):
        return None
    return "cuda" if torch.cuda.is_available() else None


def tensor_parallel(tp_size: Any, tp_group: Any) -> Group:
    """The group whose ranks split the layer."""
    tp_size = whole(WHO, "tp_size", tp_size)
    if tp_group is None:
        return Group("", tp_size)
    group = group_of(tp_group, WHO)
    if tp_size != 1:
        same_size(tp_size, group)
    return group


def same_size(tp_size: int, group: Group) -> None:
    """Raises OpsgraphError for a group of another size."""
    if tp_size != group.size:
        raise OpsgraphError(
            f"{WHO}: got tp_size {tp_size} and a tp_group of {group.size} ranks, expected "
            f"tp_size {group.size}"
        )


def check_shares(ffn: int, tp: Group) -> None:
    """Raises OpsgraphError for a width that the ranks do not divide, or ranks without a group."""
    if tp.size < 1 or ffn % tp.size:
        raise OpsgraphError(
            f"{WHO}: got ffn_hidden_size {ffn}, expected a multiple of tp_size {tp.size}"
        )
    if tp.size > 1 and not tp.name:
        raise OpsgraphError(f"{WHO}: got tp_size {tp.size} and no tp_group, expected one")


def _check_overlap(arguments: Mapping[str, Any], tp: Group) -> None:
    on = [name for name in OVERLAP if arguments[name]]
    if on and not (arguments["sequence_parallel"] and tp.size > 1):
        raise OpsgraphError(
            f"{WHO}: got {', '.join(on)} without sequence parallelism, expected "
            "sequence_parallel=True and tp_size > 1"
        )


def first_microbatch(inp: Any, value: Any) -> bool:
    """`is_first_microbatch` as a bool. Raises OpError for what is none, or an input of torch.fx."""
    verify_tensor(inp, "input")  # a torch.fx.Tracer stands in for every argument
    return flag(WHO, "is_first_microbatch", value)
