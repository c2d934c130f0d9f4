"""What opsgraph uses of PyTorch that is not public: each name once, with what stands in for it.

A name that a version lacks is replaced by a public way where there is one, slower or less exact;
the test of this file names the versions that were seen to have them all.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad as forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from .watching import watching

F = TypeVar("F", bound=Callable[..., Any])


def _find(path: str, otherwise: Any) -> Any:
    """What `torch.<path>` is, or the other thing where there is no such name."""
    owner: Any = torch
    for name in path.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return otherwise
    return owner


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` past the look, in Python, for arguments left over by a transform."""
    apply: Callable[..., Any] = getattr(
        super(torch.autograd.Function, function), "apply", None
    ) or (function.apply)
    return apply


finished: Callable[[Tensor], Tensor] = _find("_C._functorch.unwrap_if_dead", lambda tensor: tensor)
"""The tensor itself, or what it stands for if it was left over by a functorch transform."""

transforms: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: False)
"""Whether a transform of torch.func runs: grad, vjp, jvp, vmap, functionalize."""

top_transform: Callable[[], Any] = _find("_C._functorch.peek_interpreter_stack", lambda: None)
"""The innermost of them, or None. Unlike `transforms` it also sees those that Dynamo plays."""


def _no(tensor: Tensor) -> bool:
    return False


_wrapped: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", _no)
_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_batchedtensor", _no)
_unwrapped: Callable[[Tensor], Tensor] = _find("_C._functorch.get_unwrapped", None)


def unreadable(tensor: Tensor) -> bool:
    """Whether it has a dimension that torch.func.vmap hides, so no value of it can be asked for."""
    while _wrapped(tensor):
        if _batched(tensor):
            return True
        tensor = _unwrapped(tensor)
    return False


dispatch_stack: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 0)
"""How many dispatch modes are active."""


def dispatch_modes() -> int:
    """How many dispatch modes are active but for our recorders; fake tensors have one."""
    count = dispatch_stack()
    return count - watching.modes if count else 0  # Dynamo sees no thread's own values


tracing: Callable[[], bool] = _find("_C._is_tracing", getattr(torch.jit, "is_tracing", None))
"""Whether torch.jit.trace, or the ONNX exporter that is built on it, records."""

_tracer: Callable[[], Any] = _find("_C._get_tracing_state", lambda: None)


def recorded() -> bool:
    """Whether torch.jit.trace or torch.export records what runs, for other values too."""
    # Not `tracing`, into which torch.export does not follow.
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined,no-untyped-call]


_set_tracer: Callable[[Any], None] = _find("_C._set_tracing_state", lambda state: None)


@contextmanager
def untraced() -> Iterator[None]:
    """A context in which torch.jit.trace records nothing."""
    state = _tracer()
    if state is None:
        yield
        return
    _set_tracer(None)
    try:
        yield
    finally:
        _set_tracer(state)


has_memory: Callable[[Tensor], bool] = _find("_C._has_storage", lambda tensor: True)
"""Whether a tensor has a storage: wrappers, as the batched ones of vmap are, have none."""

begins: int | None = _find("_C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr", None)
"""Where the C function begins that tells where a tensor begins, as compiled wrappers call it; it
raises C++'s exceptions for what has no memory."""


def _holds() -> int | None:
    words, x = range(0, Tensor.__basicsize__, 8), torch.empty(0, device="cpu")
    found = [at for at in words if ctypes.c_int64.from_address(id(x) + at).value == x._cdata]
    return found[0] if found else None


held: int | None = _holds() if hasattr(Tensor, "_cdata") else None
"""How many bytes from where its object begins a tensor's C++ part does, which C functions take."""

storage_uses: Callable[[int], int] | None = _find("_C._storage_Use_Count", None)
"""How many tensors share a storage, of which it takes the address."""

graph_task: Callable[[], int] = _find("_C._current_graph_task_id", lambda: -1)
"""The number of the backward that PyTorch's engine runs on this thread; -1 for none."""

saved_hooks: Callable[[], Any] = partial(
    _find("_C._autograd._top_saved_tensors_default_hooks", lambda unless_tracing: True), True
)
"""The hooks of saved tensors that are active, as a checkpoint has them that is not reentrant."""

stream_of: Callable[[int], int] = _find(
    "_C._cuda_getCurrentRawStream", lambda number: torch.cuda.current_stream(number).cuda_stream
)
"""The address of the current stream of the CUDA device of that number."""

current_device: Callable[[], int] = _find("_C._cuda_getDevice", torch.cuda.current_device)
"""The number of the current device of CUDA."""

capturing_here: Callable[[], bool] = _find(
    "_C._cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Whether a CUDA graph takes down what runs on the current device. It takes microseconds."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes down what runs, to run it again on what is there then."""
    return device.type == "cuda" and capturing_here()


def empty_strided(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """What allocates tensors of sizes, strides and a dtype there; on the current device of CUDA."""
    fast = _find(f"_C._dynamo.guards._empty_strided_{device.type}", None)
    if fast is not None:
        return fast  # type: ignore[no-any-return]
    return lambda sizes, strides, dtype: torch.empty_strided(
        sizes, strides, dtype=dtype, device=device
    )


reinterpreted: Callable[[Tensor, Any, Any, int], Tensor] = _find(
    "_C._dynamo.guards._reinterpret_tensor",
    lambda x, sizes, strides, at: x.as_strided(sizes, strides, x.storage_offset() + at),
)
"""A tensor over another one's memory, of sizes, strides and at an offset in elements, that autograd
and versions know nothing of. In inference mode it is one that autograd cannot save."""


def same_layouts(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A check in C++ of whether tensors are as these: class, dtype, device, sizes, strides.

    False too under transforms and autocast, and some dispatch modes, that were not there when it
    was made.
    None in a PyTorch without it.
    """
    return _check(tensors, [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors])


def same_kinds(tensors: Sequence[Tensor], free: Sequence[int]) -> Callable[..., bool] | None:
    """The same of whatever strides. free: how many of the first sizes of each may be others."""
    pairs = zip(tensors, free, strict=True)
    return _check(
        tensors,
        [[*[None] * max(0, count), *t.shape[max(0, count) :]] for t, count in pairs],
        [[None] * t.dim() for t in tensors],
    )


def _check(tensors: Sequence[Tensor], sizes: Any, strides: Any) -> Callable[..., bool] | None:
    guards = _find("_C._dynamo.guards.TensorGuards", None)
    if guards is None:
        return None
    check: Callable[..., bool] = guards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return check


def gradient_hooks(leaf: Tensor) -> tuple[list[Callable[..., Any]], list[Callable[..., Any]]]:
    """A leaf's hooks of its gradient, and those after the gradient was added; none if unknown."""
    names = "_backward_hooks", "_post_accumulate_grad_hooks"
    before, after = (list((getattr(leaf, name, None) or {}).values()) for name in names)
    return before, after


def averaged_parameters() -> set[int] | None:
    """The ids of those whose gradients the DistributedDataParallel averages that runs a forward.

    None where none does, or it cannot be known.
    """
    ddp = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return None if ddp is None else {id(p) for p in getattr(ddp, "_module_parameters", ())}


def _no_group(name: str) -> Any:
    raise RuntimeError(f"this PyTorch finds no process group by its name, {name}")


resolve_group: Callable[[str], Any] = _find(
    "_C._distributed_c10d._resolve_process_group", _no_group
)
"""The process group of that name; RuntimeError or ValueError if there is none."""


def exchange_options(kind: str, later: bool) -> Any:
    """Options of a process group's "all_gather", "reduce_scatter" or "all_reduce", a sum.

    later: whether work goes on beside it; else a group that can runs it on the current stream.
    """
    name = {"all_gather": "Allgather", "reduce_scatter": "ReduceScatter"}.get(kind, "Allreduce")
    options = _find(f"_C._distributed_c10d.{name}Options", None)()
    if not later and hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has units for bf16; without it fp32 is as fast, and sums are exact."""
    if not _find("ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    units = "cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported"
    return any(_find(name, lambda: False)() for name in units)


executes: Callable[[Any], bool] = _find("_C._will_engine_execute_node", lambda node: True)
"""Whether that backward runs a node: `backward(inputs=...)` runs some alone. RuntimeError for a
parameter's under torch.autograd.grad, which adds to no `.grad`."""

forward_gradients: Callable[[], bool] = _find("_C._is_fwd_grad_enabled", lambda: True)
"""Whether forward-mode AD is allowed; it is not in an autograd.Function's forward."""


if not hasattr(forward_ad, "_current_level"):
    forward_ad._current_level = -1  # as where forward-mode AD is off


_MODE_FLAGS = (
    "_is_in_torch_dispatch_mode", "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)  # fmt: skip


def mode_flags() -> dict[str, bool]:
    """What Dynamo asks whether a dispatch mode is active, of all threads.

    Each mode sets them back to what they were. Modes of two threads that overlap leave them set,
    and torch.compile compiles nothing any more.
    """
    return {name: getattr(_python_dispatch, name, False) for name in _MODE_FLAGS}


def set_mode_flags(flags: dict[str, bool]) -> None:
    """Set them back to what `mode_flags` found."""
    vars(_python_dispatch).update(flags)
    tell = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
    if tell is not None:  # C++ has a copy
        tell(flags[_MODE_FLAGS[-1]])


class PassThrough(TorchDispatchMode):
    """A dispatch mode that changes nothing; inside it kernels leave the work to PyTorch's ops."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        return func(*args, **(kwargs or {}))


def constant_under_compile(function: F) -> F:
    """`torch.compiler.assume_constant_result`, without the seconds that importing Dynamo takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque(function: F, reason: str | None = None) -> F:
    """`torch.compiler.disable`, without the seconds that importing Dynamo takes.

    Dynamo breaks its graph at a call and looks into nothing of it. Where one graph is asked for, an
    error gives the reason.
    """
    marked: Any = function
    marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, reason
    return apart(function)


def apart(function: F) -> F:
    """Have Dynamo compile neither a function nor what it calls where it runs on its own.

    That is behind a break in a graph. Inside a graph Dynamo follows it as any other.
    """
    frames, called = _find("_C._dynamo.eval_frame", None), cast(Any, function)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(called.__code__, frames._FrameExecStrategy(skip, skip))
    return function


_UNCHANGED = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context with autocast off, for x's device; free where it is off already."""
    kind = "cpu" if x.is_cpu else x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _UNCHANGED


def ops_alone() -> bool:
    """Whether no transform follows PyTorch's ops, and no dispatch mode but our recorders'."""
    return not (  # `followed`, in one frame
        transforms()
        or forward_ad._current_level >= 0
        or tracing()
        or (dispatch_stack() and dispatch_modes())
    )


def followed() -> bool:
    """Whether a transform follows the calls that sees PyTorch's ops alone, not our Functions."""
    return transforms() or forward_ad._current_level >= 0 or tracing()
