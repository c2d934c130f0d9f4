"""One module, what may happen to it, and the check of what it computes after each step."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...base.errors import OpError, PlanError
from ...precision.autocast import autocast
from ...precision.recomputed import checkpoint_contexts
from .answers import Question, answer, by_formulas, dys_of, plain_answer
from .changes import Changes, Impossible, Pending
from .compare import Answer, Wrong, anything, check

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "training": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Life(Changes):
    """A Sequential, what is done to it, and calls of it; all arguments are plain literals.

    dtype: of parameters and inputs, by name. seed: of every random number. options: the rest are
    those of `Sequential`. A method raises Wrong if a result is, Impossible if it does not apply.
    """

    def call(
        self,
        lead: tuple[int, ...] = (4,),
        mode: str = "training",
        backward: str = "now",
        recipes: Sequence[str] = (),
        checkpointed: str | None = None,
        input_grad: bool = True,
        layout: str = "plain",
        thread: bool = False,
        autocast: bool = False,
        seed: int = 0,
    ) -> None:
        """Call the module and compare what it gives with the formulas.

        lead: the input's dimensions before the last. backward: "now", "twice", "later" (see
        `finish`) or "never". recipes: the contexts around the call, outermost first.
        """
        torch.manual_seed(seed + self.seed)
        x = _laid_out(self._random((*lead, self.width), seed), layout)
        shapes: list[torch.Size] = []
        if not self._fits(x, shapes):
            return
        inputs = [x, *(self._random(shape, seed + k) for k, shape in enumerate(shapes))]
        for value in inputs:
            value.requires_grad_(input_grad)
        leaves = {f"input {k}": value for k, value in enumerate(inputs)}
        leaves |= dict(self.module.named_parameters(remove_duplicate=False))
        before = {name: (t.detach().clone(), t._version) for name, t in leaves.items()}
        training = mode == "training"
        question = Question(self.module, inputs, seed, training, self._random)
        exact = answer(question, torch.float64)
        dys = dys_of(question, exact.outputs)
        casting = torch.bfloat16 if autocast else self.dtype
        plain = plain_answer(question, exact, casting, bool(recipes))
        if recipes[-1:] == ("delayed",):
            if self.behind:
                plain = anything(plain)
            self.behind = self.behind and not (training and backward in ("now", "twice"))
        try:
            outputs = _elsewhere(
                thread, lambda: self._run(inputs, mode, recipes, checkpointed, autocast, seed)
            )
        except OpError as error:
            if self.edited and "width" in str(error):
                return  # formulas without a size of their own take any width
            raise
        self._check_outputs(outputs, exact, plain, any_dtype=autocast)
        for name, (value, version) in before.items():
            if leaves[name]._version != version or not torch.equal(leaves[name], value):
                raise Wrong(f"{name} was changed by the call")
        if not training or not any(y.requires_grad for y in outputs):
            held = {t.data_ptr() for t in inputs}  # a view of one requires grad in PyTorch as well
            if any(y.requires_grad and y.data_ptr() not in held for y in outputs):
                raise Wrong("an output requires grad outside of training")
            if training and any(g is not None for g in exact.gradients.values()):
                raise Wrong("no output requires grad")
            return
        versions = {name: t._version for name, t in leaves.items()}
        waiting = Pending(outputs, dys, leaves, versions, exact, plain, checkpointed is not None)
        if backward == "later":
            self.pending.append(waiting)
        elif backward != "never":
            _elsewhere(thread, lambda: self._backward(waiting, backward == "twice"))

    def finish(self, index: int, thread: bool = False) -> None:
        """Run the backward of a call whose backward was to come later."""
        if not 0 <= index < len(self.pending):
            raise Impossible
        waiting = self.pending.pop(index)
        _elsewhere(thread, lambda: self._backward(waiting, False))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad`."""
        self.module.zero_grad(set_to_none)

    # -- how --

    def _run(
        self,
        inputs: Sequence[Tensor],
        mode: str,
        recipes: Sequence[str],
        checkpointed: str | None,
        cast: bool,
        seed: int,
    ) -> list[Tensor]:
        torch.manual_seed(seed)
        with ExitStack() as stack:
            stack.enter_context(MODES[mode]())
            if cast:
                stack.enter_context(torch.autocast(self.device, torch.bfloat16))
            for name in recipes:
                stack.enter_context(autocast(recipe=self.recipes[name]))
            if checkpointed is None:
                result = self.module(*inputs)
            else:
                reentrant = checkpointed == "reentrant"
                more: Any = {} if reentrant else {"context_fn": checkpoint_contexts}
                result = checkpoint(self.module, *inputs, use_reentrant=reentrant, **more)
        return list(result) if isinstance(result, tuple) else [result]

    def _fits(self, x: Tensor, shapes: list[torch.Size]) -> bool:
        """Whether the ops fit each other, after edits; if not, a call has to say so."""
        try:
            by_formulas(self.module, torch.float64, [x.detach()], shapes.append)
        except (RuntimeError, AssertionError):
            pass
        else:
            return True
        try:
            self.module(x, *(self._random(s, 0) for s in shapes))
        except (OpError, PlanError, TypeError):
            return False
        raise Wrong("a sequence whose widths do not fit was run")

    def _backward(self, waiting: Pending, twice: bool) -> None:
        held = {name: leaf.grad for name, leaf in waiting.leaves.items()}
        changed = any(t._version != waiting.versions[n] for n, t in waiting.leaves.items())
        for leaf in waiting.leaves.values():
            leaf.grad = None
        pairs = zip(waiting.outputs, waiting.dys, strict=True)
        moving = [(y, dy.to(y.dtype)) for y, dy in pairs if y.requires_grad]
        ys, dys = zip(*moving, strict=True)
        try:
            for left in (1, 0) if twice else (0,):
                torch.autograd.backward(ys, dys, retain_graph=bool(left))
        except RuntimeError as error:
            if changed and "modified by an inplace operation" in str(error):
                return  # as PyTorch's own modules refuse
            raise
        finally:
            gradients = {name: leaf.grad for name, leaf in waiting.leaves.items()}
            for name, leaf in waiting.leaves.items():
                leaf.grad = held[name]
        times = 2 if twice else 1
        for name, leaf in waiting.leaves.items():
            found = gradients[name]
            exact, plain = (a.gradients[name] for a in (waiting.exact, waiting.plain))
            what = f"gradient of {name}"
            if found is not None and found.dtype != leaf.dtype:
                raise Wrong(f"{what}: got {found.dtype}, expected {leaf.dtype}")
            if not leaf.requires_grad:  # frozen since, which PyTorch's accumulation respects
                exact = plain = None
            elif exact is not None and plain is not None:
                exact, plain = exact * times, plain * times
            check(what, found, exact, plain)

    def _check_outputs(
        self, outputs: Sequence[Tensor], exact: Answer, plain: Answer, any_dtype: bool
    ) -> None:
        if len(outputs) != len(exact.outputs):
            raise Wrong(f"{len(outputs)} outputs, expected {len(exact.outputs)}")
        for k, (y, expected, other) in enumerate(
            zip(outputs, exact.outputs, plain.outputs, strict=True)
        ):
            if y.dtype != self.dtype and not any_dtype:
                raise Wrong(f"output {k}: got {y.dtype}, expected {self.dtype}")
            check(f"output {k}", y.detach(), expected, other)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another memory layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand_as(x)
    return x


def _elsewhere(thread: bool, function: Callable[[], Any]) -> Any:
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
