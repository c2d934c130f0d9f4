"""Backwards of a module's calls, now or later, and the check of which gradients arrive where."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...layernorm_mlp import LayerNormMLP
from ...ops.delayed import TellsOfWeightGradients
from .changes import Impossible, Pending
from .compare import Wrong, check, drop
from .states import States

BEFORE, START = 0.75, 0.25
"""What every main_grad holds before a backward, and every `.grad` that is there."""
Gradients = dict[str, Tensor | None]


class Backwards(States):
    """`States`, and backwards of the calls that were made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.delayed: list[Pending] = []
        """Backwards whose weight gradients are still to come."""
        self.main: dict[str, Any] = {"overwrite_main_grad": False}
        """Attributes of weights with a main_grad."""
        self.added = False
        """Whether a `.grad` is there when a backward begins."""
        self.get = False
        """Whether a function of the weight gives it."""
        self.told: dict[int, list[Any]] = {}
        """By the ids of modules these, and how often hooks were told of their weights."""

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
        counts = {key: count for key, (_, count) in self.told.items()}
        with self._apart(waiting) as gradients:
            waiting.module.backward_dw()
        self._check_told(waiting, counts)
        self._check_gradients(waiting, gradients, waiting.late, 1)

    def listen(self) -> None:
        """Register hooks that are told of delayed gradients, of all layers that have any."""
        for module in self.module.modules():
            if isinstance(module, TellsOfWeightGradients) and id(module) not in self.told:
                self.told[id(module)] = [module, 0]
                module.register_wgrad_accumulation_and_reduce_hooks(
                    partial(self._tell, self.told[id(module)])
                )

    def main_grads(self, dummy: bool = False, overwrite: bool = False, get: bool = False) -> None:
        """How weights with a main_grad are marked.

        dummy: autograd is given zeros. overwrite: the first gradient of a backward overwrites.
        get: a function of the weight gives the buffer.
        """
        if not accumulated(self.module) or self.pending or self.delayed:
            raise Impossible
        self.main, self.get = {"overwrite_main_grad": overwrite}, get
        if dummy:
            self.main |= {"grad_added_to_main_grad": False, "zero_out_wgrad": True}
        for parameter in self.module.parameters():
            parameter.__dict__.pop("main_grad", None)
            parameter.__dict__.pop("get_main_grad", None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad`; if it leaves zeros, backwards find gradients there from now on."""
        self.module.zero_grad(set_to_none)
        self.added = not set_to_none

    # -- how --

    def _give_main_grads(self) -> None:
        """Copies and new parameters have none."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        for name in accumulated(self.module):
            weight: Any = named[name]
            if _main_grad(weight) is None:
                wide = torch.promote_types(weight.dtype, torch.float32)
                main = torch.zeros_like(weight, dtype=wide)
                given = {"get_main_grad": Given(main)} if self.get else {"main_grad": main}
                weight.__dict__ |= {**given, **self.main}

    def _backward(self, waiting: Pending, twice: bool = False, late: bool = False) -> None:
        changed = waiting.touched or any(
            t._version != waiting.versions[n] for n, t in waiting.leaves.items()
        )
        pairs = zip(waiting.outputs, waiting.dys, strict=False)
        moving = [(y, dy.to(y.dtype)) for y, dy in pairs if y.requires_grad]
        ys, dys = zip(*moving, strict=True)
        given = [dy.clone() for dy in dys]
        before = waiting.module.queued_backward_dw()  # also those of a module with the same layers
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
            queued = waiting.module.queued_backward_dw() - before
            if queued != (times if wanted else 0):
                raise Wrong(f"{queued} backwards wait for backward_dw, expected {times}")
        if wanted:
            waiting.allowed.keep()
            self.delayed += times * [waiting]
            while self.delayed and not late:
                self.backward_dw()

    @staticmethod
    def _tell(told: list[Any]) -> None:
        told[1] += 1

    def _check_told(self, waiting: Pending, before: dict[int, int]) -> None:
        """Each layer of which a gradient has arrived tells its hooks once."""
        for path, module in waiting.module.named_modules():
            if (held := self.told.get(id(module))) is None or held[0] is not module:
                continue
            prefix = f"{path}." if path else ""
            own = {f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)}
            due = any(waiting.exact.gradients.get(name) is not None for name in own & waiting.late)
            if held[1] - before[id(module)] != due:
                raise Wrong(f"{path}: hooks heard of delayed gradients {held[1]} times")

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
            leaf.grad = torch.full_like(leaf, START) if self.added and leaf.requires_grad else None
            if name in waiting.accumulated:
                _main_grad(leaf).fill_(BEFORE)
        try:
            yield gradients
        finally:
            for name, leaf in waiting.leaves.items():
                found = leaf.grad
                if found is not None and self.added and bool((found == START).all()):
                    found = None  # nothing arrived
                gradients[name] = found
            for name, leaf in waiting.leaves.items():
                leaf.grad = held[name]

    def _check_gradients(
        self, waiting: Pending, gradients: Gradients, names: frozenset[str], times: int
    ) -> None:
        first = {name for name in names if "first" in waiting.leaves[name].__dict__}
        for name in sorted(names):
            if not waiting.sure(name):
                continue  # a part of it comes by another name, elsewhere or at another time
            leaf: Any = waiting.leaves[name]
            what, found, exact = (
                f"gradient of {name}",
                gradients[name],
                waiting.exact.gradients[name],
            )
            factor, start, dtype = times, START if self.added else 0.0, leaf.dtype
            if not leaf.requires_grad:  # frozen since, which PyTorch's accumulation respects
                exact = None
            if name in waiting.accumulated:
                if found is not None and bool(found.any()):
                    raise Wrong(f"{what}: it went to .grad, expected main_grad")
                found, start = _main_grad(leaf), BEFORE
                dtype = found.dtype
                if exact is None:
                    exact = torch.zeros_like(leaf, dtype=torch.float64)
                elif leaf.overwrite_main_grad or name in first:
                    leaf.__dict__.pop("first", None)  # of a tied one at its other name
                    start = 0.0
                    factor = 1 if leaf.overwrite_main_grad else times
            elif start and found is None and exact is not None:
                found = torch.full_like(leaf, start)  # what arrived may be too little to show
            if found is not None and found.dtype != dtype:
                raise Wrong(f"{what}: got {found.dtype}, expected {dtype}")

            def plain(name: str = name, factor: int = factor, start: float = start) -> Any:
                gradient = waiting.allowed.keep().gradients[name]
                return None if gradient is None else gradient * factor + start

            if exact is not None:
                exact = exact * factor + start
            rows = waiting.outputs[0].shape[:-1].numel() if isinstance(leaf, nn.Parameter) else 1
            check(what, found, exact, waiting.allowed.dtype, plain, rows)


class Given:
    """What gives a weight's main_grad; it can be pickled."""

    def __init__(self, main: Tensor) -> None:
        self.main = main

    def __call__(self) -> Tensor:
        return self.main


def _main_grad(weight: Any) -> Any:
    """A weight's buffer, or None."""
    get = getattr(weight, "get_main_grad", None)
    return getattr(weight, "main_grad", None) if get is None else get()


def accumulated(module: nn.Module) -> frozenset[str]:
    """Names of weights whose gradients go to their main_grad."""
    names = "accumulate_into_main_grad", "fuse_wgrad_accumulation"
    return _weights(module, lambda m: _asked(m, *names))


def delayed(module: Any, options: bool = True) -> frozenset[str]:
    """Names of weights whose gradients wait for `backward_dw`.

    options: also by an option of the Sequential, and not only by arguments of their layers.
    """
    every = options and not isinstance(module, LayerNormMLP) and module.delay_wgrad_compute
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
            drop(error)  # here, for hooks are a thread's
            failed.append(error)

    runner = threading.Thread(target=body)
    runner.start()
    runner.join()
    if failed:
        raise failed[0]
    return found[0]
