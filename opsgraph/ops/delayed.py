"""Weight gradients that a backward leaves for later, until `backward_dw`.

The way of one, from the backward on:

1. A backward runs the steps that it would run anyway, but on `deferring(op)` in place of the op.
   That is the only hook: a step computes a weight gradient by `fc.wgrad` or `fc.weigh` and by
   nothing else, and both now return the call to make, with its operands. So nothing else is held,
   and the result is the same bits.
2. The call comes out where the gradient would. It is taken from there into a `Queue` as a `Late`,
   with the number of the `backward()` that it belongs to; autograd is given nothing.
3. `backward_dw` of any module around takes what the oldest backward has left in all queues inside.
   It verifies that every gradient can arrive, then makes the calls and does for each weight what
   autograd would have done: hooks, `.grad`, hooks. A call whose gradient goes into `main_grad`
   (`main_grad`) has put it there itself.
4. Hooks of `register_wgrad_accumulation_and_reduce_hooks` are called, of each module once.

Weights that stand for several parameters (`joined`) hand each its piece.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import OpError, OpsgraphError
from ..guards.torch_private import averaged_parameters, executes, gradient_hooks
from ..op import Op
from ..precision.quantizers import Quantized
from .joined import parameters, parts_of
from .main_grad import arriving, dummy

_serial = itertools.count()


def wait(function: Callable[..., Any], *operands: Any) -> Any:
    """A call of the function that computes a weight gradient, to make later, with its operands."""
    return partial(function, *map(_operand, operands))


def _operand(value: Any) -> Any:
    """What the call reads of an operand.

    The graph that made it, or what it is a view of, would stay with it, and through autograd's
    nodes this queue: for ever.
    """
    if isinstance(value, Quantized) and value.col:
        return value._replace(row=None)
    if isinstance(value, Tensor) and (value.grad_fn is not None or value._is_view()):
        found = value.detach()
        found.__dict__.update(value.__dict__)  # where main_grad is, of weights that are joined
        return found
    return value


def deferring(op: Any) -> Any:
    """The op as a delaying backward sees it: its `wgrad` and `weigh` return calls to make later."""
    twin = object.__new__(op.__class__)  # op may be a weak proxy
    later = {"wgrad": partial(wait, op.wgrad)} if op.wgrad is not None else {}
    twin.__dict__ = {**op.__dict__, "deferred": True, "weigh": wait, **later}
    return twin


def mark_delayed(weight: Tensor | None, delayed: bool) -> None:
    """Tell wrappers by an attribute that a weight's gradient does not come in the backward."""
    for parameter in parameters(weight) if delayed and weight is not None else ():
        parameter.skip_backward_post_hook = True  # type: ignore[attr-defined]


def unasked(node: Any, weight: Tensor) -> set[int]:
    """The ids of a weight's parameters to which the running backward gives no gradient.

    node: the autograd node to which the weight's gradient goes.
    """
    nodes = [edge for edge, _ in node.next_functions] if parts_of(weight) and node else [node]
    pairs = zip(parameters(weight), nodes, strict=True)
    return {id(part) for part, edge in pairs if not (_runs(node) and _runs(edge))}


def _runs(node: Any) -> bool:
    try:
        return node is not None and executes(node)
    except RuntimeError:  # a parameter's, under torch.autograd.grad, which adds nothing to .grad
        return False


class Late(NamedTuple):
    """A weight gradient to come: of which parameter, and the call that gives it.

    gradient: a call, or a tensor where the step computed it at once. unwanted: ids of weights that
    get none. versions: the tensors that the call reads, each with its version.
    """

    module: nn.Module
    name: str
    weight: Tensor
    gradient: Any
    into_main_grad: bool
    unwanted: frozenset[int]
    versions: tuple[tuple[Tensor, int], ...]

    @classmethod
    def of(
        cls, home: tuple[nn.Module, str], weight: Tensor, gradient: Any, into_main_grad: bool,
        unwanted: frozenset[int],
    ) -> "Late":  # fmt: skip
        """A gradient as a step has given it."""
        read = tensors([gradient]) if isinstance(gradient, partial) else ()
        # A checkpoint hands out another tensor of the same memory for the weight.
        own = weight.data_ptr()
        checked = [t for t in read if t.data_ptr() != own and not t.is_inference()]
        versions = tuple((t, t._version) for t in checked)
        return cls(*home, weight, gradient, into_main_grad, unwanted, versions)

    def verify(self) -> None:
        """Raises an error if the gradient cannot be computed, or could not arrive."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise OpsgraphError(
                f"backward_dw: got a tensor that was modified in place after the backward, which "
                f"the gradient of {self.name} needs; expected it as it was"
            )
        for name in parts_of(self.weight) or (self.name,):
            parameter = self.module._parameters.get(name)
            if hasattr(parameter, "placements"):
                kind = type(parameter).__name__
                got = f"{name} as a {kind}, whose gradient was due in the backward"
                raise OpError("backward_dw", got, "a plain parameter: FSDP2 does not wait")

    def arrive(self) -> None:
        """Compute the gradient and do what autograd would: add it, and call the hooks."""
        gradient = self.gradient() if callable(self.gradient) else self.gradient
        if gradient is None or self.into_main_grad:
            return
        pieces = gradient.unbind() if parts_of(self.weight) else [gradient]
        for parameter, piece in zip(parameters(self.weight), pieces, strict=True):
            if parameter.requires_grad and id(parameter) not in self.unwanted:
                _add(parameter, piece)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among values, in tuples and lists of such, and bound to partial calls."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(value)
        elif isinstance(value, partial):
            yield from tensors((*value.args, *value.keywords.values()))


def _add(parameter: Tensor, gradient: Tensor) -> None:
    """What autograd does with a leaf's gradient."""
    gradient = gradient.to(parameter.dtype)
    before, after = gradient_hooks(parameter)
    for hook in before:
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
    for hook in after:
        hook(parameter)


class Entry(NamedTuple):
    """What one backward has left. backward: the `backward()` that it came by."""

    serial: int
    backward: int
    gradient: Late


class Queue(list[Entry]):
    """Entries of a module, the oldest first. A copy of the module has nothing to wait for."""

    def leave(self, backward: int, gradient: Late) -> None:
        """Append an entry."""
        self.append(Entry(next(_serial), backward, gradient))

    def __deepcopy__(self, _: Any) -> "Queue":
        return Queue()

    def __reduce__(self) -> Any:
        return Queue, ()


# On the modules themselves, for what waits and hooks refer to them: a table would keep all alive.
_QUEUE, _HOOKS = "_wgrad_queue", "_wgrad_hooks"


def queue_of(op: nn.Module) -> Queue:
    """The queue of an op with `delay_wgrad_compute` of its own."""
    queue: Queue = op.__dict__.setdefault(_QUEUE, Queue())
    return queue


def in_use(queue: Queue, delays: bool) -> Queue | None:
    """The queue of a module that delays, or that did and has gradients waiting there."""
    return queue if delays or queue else None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered for the module's delayed gradients."""
    return bool(module.__dict__.get(_HOOKS))


def _all_queues(module: nn.Module) -> list[Queue]:
    queues = [getattr(m, "wgrad_queue", None) for m in module.modules()]
    return [queue for queue in queues if queue is not None]


class DelaysWeightGradients(nn.Module):
    """A module whose weight gradients, or those of modules inside, may wait for `backward_dw`."""

    @property
    def wgrad_queue(self) -> Queue | None:
        """Where the module's own delayed gradients wait; None if it delays none."""
        return None

    def backward_dw(self) -> None:
        """Compute the weight gradients that the oldest backward delayed, and add them to `.grad`.

        All of one `backward()`: of every call of the module and of the modules inside it. Hooks of
        the parameters run, then those of `register_wgrad_accumulation_and_reduce_hooks`. Raises
        RuntimeError if nothing is queued, an error of opsgraph if a gradient could not arrive; the
        queue is then as it was.
        """
        queues = [queue for queue in _all_queues(self) if queue]
        if not queues:
            raise RuntimeError("backward_dw: no weight gradient is queued; run a backward first")
        oldest = min(queue[0] for queue in queues).backward
        due = sorted(entry for queue in queues for entry in queue if entry.backward == oldest)
        gradients = [entry.gradient for entry in due]
        for late in gradients:
            late.verify()
        for queue in queues:
            queue[:] = [entry for entry in queue if entry.backward != oldest]
        with torch.no_grad():
            for late in gradients:
                with arriving(oldest, late.unwanted):
                    late.arrive()
        _tell(gradients)

    def queued_backward_dw(self) -> int:
        """How many backwards wait for their `backward_dw`."""
        return len({entry.backward for queue in _all_queues(self) for entry in queue})

    def need_backward_dw(self) -> bool:
        """Whether weight gradients are delayed until `backward_dw`."""
        return bool(_all_queues(self))


class TellsOfWeightGradients(DelaysWeightGradients):
    """A module with weights of its own, whose wrappers may ask to hear of delayed gradients."""

    reads_transposed = False
    """Whether plans read the weight by a transposed view, see `transposed`."""

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], Any]) -> None:
        """Have `hook()` called whenever `backward_dw` has put gradients of the module's weights.

        The weights carry `skip_backward_post_hook=True` for wrappers that would otherwise wait for
        their gradients in the backward.
        """
        self.__dict__.setdefault(_HOOKS, []).append(hook)


def _tell(gradients: Iterable[Late]) -> None:
    """Call the hooks of modules whose gradients have arrived."""
    heard = {id(late.module): late.module for late in gradients}
    for late in gradients:
        if has_hooks(late.module):
            for weight in parameters(late.weight):
                if weight.grad is None:  # Megatron-LM's hook asks for one, if it is but a dummy
                    weight.grad = dummy(weight)
    for module in heard.values():
        for hook in module.__dict__.get(_HOOKS, ()):
            hook()


def verify_arrival(module: nn.Module, name: str, weight: Tensor, label: str, delayed: bool) -> None:
    """Raises OpError where a weight's gradient, which autograd does not see, would be lost."""
    by_name = parts_of(weight) or {name: weight}
    option = "delay_wgrad_compute" if delayed else "accumulate_into_main_grad"
    if getattr(module, "reads_transposed", False):
        raise OpError(label, option, "a layer whose weight is [out_features, in_features]")
    for each, parameter in by_name.items():
        if delayed and not parameter.is_leaf:
            got = f"{option} and a {each} that is computed (a parametrization, FSDP1 or a DTensor)"
            raise OpError(label, got, "a parameter that is a leaf")
    averaged = averaged_parameters()
    if averaged is None or (delayed and has_hooks(module)):
        return
    if missed := [each for each, parameter in by_name.items() if id(parameter) in averaged]:
        got = f"{option} inside DistributedDataParallel, which would not average {missed[0]}"
        hooks = "register_wgrad_accumulation_and_reduce_hooks, with a hook that does, or " * delayed
        raise OpError(label, got, f"{hooks}a weight that it was told to ignore")


def delays(op: Op, options: Any) -> bool:
    """Whether an op's weight gradients are left for later."""
    return bool(options.get("delay_wgrad_compute") or getattr(op, "delay_wgrad_compute", False))
