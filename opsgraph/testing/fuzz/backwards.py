"""Backwards of a module's calls, now or later, and the check of which gradients arrive where."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...layernorm_mlp import LayerNormMLP
from .changes import Impossible, Pending
from .compare import Wrong, check
from .states import States

BEFORE = 0.75
"""What every main_grad holds before a backward."""
Gradients = dict[str, Tensor | None]


class Backwards(States):
    """`States`, and backwards of the calls that were made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.delayed: list[Pending] = []
        """Backwards whose weight gradients are still to come."""
        self.main: dict[str, Any] = {"overwrite_main_grad": False}
        """Attributes of weights with a main_grad."""

    def finish(self, index: int, thread: bool = False) -> None:
        """Run the backward of a call whose backward was to come later."""
        if not 0 <= index < len(self.pending):
            raise Impossible
        waiting = self.pending.pop(index)
        elsewhere(thread, lambda: self._backward(waiting))

    def backward_dw(self) -> None:
        """Call `backward_dw` for the oldest backward that has left weight gradients."""
        if not self.delayed:
            raise Impossible
        waiting = self.delayed.pop(0)
        with self._apart(waiting) as gradients:
            waiting.module.backward_dw()
        self._check_gradients(waiting, gradients, waiting.late, 1)

    def main_grads(self, dummy: bool = False, overwrite: bool = False) -> None:
        """How weights with a main_grad are marked.

        dummy: autograd is given zeros. overwrite: the first gradient of a backward overwrites.
        """
        if not accumulated(self.module) or self.pending or self.delayed:
            raise Impossible
        self.main = {"overwrite_main_grad": overwrite}
        if dummy:
            self.main |= {"grad_added_to_main_grad": False, "zero_out_wgrad": True}
        for parameter in self.module.parameters():
            parameter.__dict__.pop("main_grad", None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad`."""
        self.module.zero_grad(set_to_none)

    # -- how --

    def _give_main_grads(self) -> None:
        """Copies and new parameters have none."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        for name in accumulated(self.module):
            weight: Any = named[name]
            if not hasattr(weight, "main_grad"):
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight.__dict__ |= {"main_grad": torch.zeros_like(weight, dtype=wide), **self.main}

    def _backward(self, waiting: Pending, twice: bool = False, late: bool = False) -> None:
        changed = waiting.touched or any(
            t._version != waiting.versions[n] for n, t in waiting.leaves.items()
        )
        pairs = zip(waiting.outputs, waiting.dys, strict=True)
        moving = [(y, dy.to(y.dtype)) for y, dy in pairs if y.requires_grad]
        ys, dys = zip(*moving, strict=True)
        given = [dy.clone() for dy in dys]
        times = 2 if twice else 1
        with self._apart(waiting) as gradients:
            try:
                for left in range(times - 1, -1, -1):
                    torch.autograd.backward(ys, dys, retain_graph=bool(left))
            except RuntimeError as error:
                if changed and "modified by an inplace operation" in str(error):
                    self._forget_delayed(waiting.module)
                    return  # as PyTorch's own modules refuse
                raise
        if any(not torch.equal(dy, before) for dy, before in zip(dys, given, strict=True)):
            raise Wrong("a gradient that came in was changed")
        now = frozenset(waiting.leaves) - waiting.late
        self._check_gradients(waiting, gradients, now, times)
        wanted = [n for n in waiting.late if waiting.exact.gradients[n] is not None]
        if waiting.late:
            if any(gradients[n] is not None for n in waiting.late if waiting.sure(n)):
                raise Wrong("a delayed gradient arrived before backward_dw")
            before = [other for other in self.delayed if other.module is waiting.module]
            queued = waiting.module.queued_backward_dw() - len(before)
            if queued != (times if wanted else 0):
                raise Wrong(f"{queued} backwards wait for backward_dw, expected {times}")
        if wanted:
            waiting.allowed.keep()
            self.delayed += times * [waiting]
            while self.delayed and not late:
                self.backward_dw()

    def _forget_delayed(self, module: nn.Module) -> None:
        self.delayed = [other for other in self.delayed if other.module is not module]
        for child in module.modules():
            if (queue := getattr(child, "wgrad_queue", None)) is not None:
                queue.clear()

    @contextmanager
    def _apart(self, waiting: Pending) -> Iterator[Gradients]:
        """Gradients by name as they arrive inside; what was there before comes back after it."""
        held = {name: leaf.grad for name, leaf in waiting.leaves.items()}
        gradients: Gradients = {}
        for name, leaf in waiting.leaves.items():
            leaf.grad = None
            if name in waiting.accumulated:
                leaf.main_grad.fill_(BEFORE)  # type: ignore[attr-defined]
        try:
            yield gradients
        finally:
            for name, leaf in waiting.leaves.items():
                gradients[name] = leaf.grad
            for name, leaf in waiting.leaves.items():
                leaf.grad = held[name]

    def _check_gradients(
        self, waiting: Pending, gradients: Gradients, names: frozenset[str], times: int
    ) -> None:
        for name in sorted(names):
            if not waiting.sure(name):
                continue  # a part of it comes by another name, elsewhere or at another time
            leaf: Any = waiting.leaves[name]
            what, found, exact = (
                f"gradient of {name}",
                gradients[name],
                waiting.exact.gradients[name],
            )
            factor, start, dtype = times, 0.0, leaf.dtype
            if not leaf.requires_grad:  # frozen since, which PyTorch's accumulation respects
                exact = None
            if name in waiting.accumulated:
                if found is not None and bool(found.any()):
                    raise Wrong(f"{what}: it went to .grad, expected main_grad")
                found, dtype, start = leaf.main_grad, leaf.main_grad.dtype, BEFORE
                if exact is None:
                    exact = torch.zeros_like(leaf, dtype=torch.float64)
                elif leaf.overwrite_main_grad or leaf.__dict__.pop("first", False):
                    start = 0.0
                    factor = 1 if leaf.overwrite_main_grad else times
            if found is not None and found.dtype != dtype:
                raise Wrong(f"{what}: got {found.dtype}, expected {dtype}")

            def plain(name: str = name, factor: int = factor, start: float = start) -> Any:
                gradient = waiting.allowed.keep().gradients[name]
                return None if gradient is None else gradient * factor + start

            if exact is not None:
                exact = exact * factor + start
            rows = waiting.outputs[0].shape[:-1].numel() if isinstance(leaf, nn.Parameter) else 1
            check(what, found, exact, waiting.allowed.dtype, plain, rows)


def accumulated(module: nn.Module) -> frozenset[str]:
    """Names of weights whose gradients go to their main_grad."""
    names = "accumulate_into_main_grad", "fuse_wgrad_accumulation"
    return _weights(module, lambda m: _asked(m, *names))


def delayed(module: Any) -> frozenset[str]:
    """Names of weights whose gradients wait for `backward_dw`."""
    every = not isinstance(module, LayerNormMLP) and module.delay_wgrad_compute
    return _weights(module, lambda m: _asked(m, "delay_wgrad_compute") or (every and _linear(m)))


def _linear(module: nn.Module) -> bool:
    return isinstance(module, ops.BasicLinear)


def _asked(module: nn.Module, *names: str) -> bool:
    return any(getattr(module, name, False) for name in names)


def _weights(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> frozenset[str]:
    found = set()
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if _linear(child) and wanted(child):
            found.add(f"{prefix}weight")
        if isinstance(child, LayerNormMLP) and wanted(child):
            found.update({f"{prefix}fc1_weight", f"{prefix}fc2_weight"})
    return frozenset(found)


def elsewhere(thread: bool, function: Callable[[], Any]) -> Any:
    """Call it, in a thread of its own if asked to; an error comes here."""
    if not thread:
        return function()
    found: list[Any] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            found.append(function())
        except BaseException as error:  # raised again where it was called
            failed.append(error)

    runner = threading.Thread(target=body)
    runner.start()
    runner.join()
    if failed:
        raise failed[0]
    return found[0]
