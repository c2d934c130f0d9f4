"""One module, what may happen to it, and the check of what it computes after each step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.triton import interpreting
from ...layernorm_mlp import LayerNormMLP
from ...op import Op
from ...precision.autocast import autocast
from ...precision.delayed import Scaling as DelayedState
from ...precision.recomputed import checkpoint_contexts
from .answers import Allowed, Question, answer, draw_from, dys_of
from .backwards import accumulated, delayed, elsewhere
from .changes import Impossible, Pending
from .compare import Answer, Wrong, check, check_rounding
from .layers import Layers

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "training": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Life(Layers):
    """A module, what is done to it, and calls of it; all arguments are plain literals.

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
        compiled: str | None = None,
        first: bool | None = None,
        input_grad: bool = True,
        layout: str = "plain",
        size: float = 1.0,
        thread: bool = False,
        inplace: bool = False,
        autocast: bool = False,
        wide: bool = False,
        quiet: bool = False,
        seed: int = 0,
    ) -> None:
        """Call the module and compare what it gives with the formulas.

        lead: the input's dimensions before the last. size: of its values. backward: "now", "twice",
        "later" (see `finish`), "late" (see `backward_dw`) or "never". recipes: the contexts around
        the call, outermost first. inplace: change the outputs before the backward. wide: extra
        inputs are fp32. quiet: the backward begins at the first output alone. compiled: a backend
        of torch.compile. first: `is_first_microbatch` of LayerNormMLP.
        """
        if checkpointed == "reentrant" and getattr(self.module, "return_bias", False):
            raise Impossible  # not under a reentrant one
        if wide and not all(isinstance(op, Op) for op in self._ops()):
            raise Impossible  # torch.nn's modules take no sum of 32 bits
        self._check_original()
        draw_from(seed + self.seed, self.device)
        x = _laid_out(self._random((*lead, self.width), seed) * size, layout)
        if not self._fits(lead, x):
            return
        shapes = self.shapes[lead]
        inputs = [x, *(self._random(shape, seed + k) for k, shape in enumerate(shapes))]
        inputs[1:] = [value.float() if wide else value for value in inputs[1:]]
        for value in inputs:
            value.requires_grad_(input_grad)
        self._give_main_grads()
        leaves = {f"input {k}": value for k, value in enumerate(inputs)}
        leaves |= dict(self.module.named_parameters(remove_duplicate=False))
        before = {name: (t.detach().clone(), t._version) for name, t in leaves.items()}
        training = mode == "training"
        question = Question(self.module, inputs, seed, training, self._random, quiet)
        exact = answer(question, torch.float64)
        casting = torch.bfloat16 if autocast else self.dtype
        allowed = Allowed(question, exact, casting, bool(recipes))
        self._meet(recipes, first, training, training and backward in ("now", "twice"), allowed)

        def run() -> list[Tensor]:
            with ExitStack() as stack:
                stack.enter_context(MODES[mode]())
                self._enter(stack, recipes, autocast, seed)
                with nullcontext() if training else self._unmoved():
                    return self._run(inputs, checkpointed, compiled, first)

        heard = self.heard
        with self._excused("input dtype" if wide else None):  # a sum may not be for 16 bits
            outputs = elsewhere(thread, run)
        self._check_outputs(outputs, exact, allowed, any_dtype=autocast or wide)
        self._check_marks()
        if self.heard == heard and any(op in self._ops() for op, _ in self.hooks):
            raise Wrong("a hook was not called")
        for name, (value, version) in before.items():
            if leaves[name]._version != version or not torch.equal(leaves[name], value):
                raise Wrong(f"{name} was changed by the call")
        if not training or not any(y.requires_grad for y in outputs):
            held = {t.data_ptr() for t in leaves.values()}  # PyTorch's views require grad as well
            if any(y.requires_grad and y.data_ptr() not in held for y in outputs):
                raise Wrong("an output requires grad outside of training")
            if training and any(g is not None for g in exact.gradients.values()):
                raise Wrong("no output requires grad")
            return
        if quiet and not outputs[0].requires_grad:
            return
        if inplace:
            self._change_outputs(outputs, exact.outputs, leaves)
        waiting = Pending(
            outputs,
            dys_of(question, exact.outputs),
            leaves,
            {name: t._version for name, t in leaves.items()},
            exact,
            allowed,
            checkpointed is not None,
            inplace,
            self.module,
            delayed(self.module),
            accumulated(self.module),
        )
        if backward == "later":
            allowed.keep()
            self.pending.append(waiting)
        elif backward != "never":
            twice, late = backward == "twice", backward == "late"
            elsewhere(thread, lambda: self._backward(waiting, twice, late))

    def aside(
        self,
        width: int,
        *sources: str,
        between: Sequence[tuple[str, tuple[Any, ...]]] = (),
        **options: Any,
    ) -> None:
        """Make another module of a few ops, with this one's dtype and options, and call it.

        between: methods and their arguments, each of which comes before a call like the first.
        """
        name = str(self.dtype).removeprefix("torch.")
        other = type(self)(name, self.seed, self.device, **self.options)
        other.build(width, *sources)
        other.call(**options)
        for method, args in between:
            with suppress(Impossible):
                getattr(other, method)(*args)
            other.call(**options)

    # -- how --

    def _meet(
        self,
        recipes: Sequence[str],
        first: bool | None,
        training: bool,
        moves: bool,
        allowed: Allowed,
    ) -> None:
        """Keep in mind what a call does to scales and kept weights, and what it may read."""
        if recipes[-1:] == ("delayed",):
            if self.behind:
                allowed.anything()
            self.behind = self.behind and not moves
        if first is None:
            return
        if first:
            self.kept = tuple(recipes)
            for name in accumulated(self.module):
                weight = self.module.get_parameter(name)
                if training and weight.requires_grad:
                    weight.__dict__["first"] = True
        elif recipes and self.kept != tuple(recipes):
            allowed.anything()  # weights of another time, or of another recipe

    def _change_outputs(
        self, outputs: Sequence[Tensor], exact: Sequence[Tensor], leaves: dict[str, Tensor]
    ) -> None:
        """As a caller may who adds to a result in place.

        One that is an input as well, or another output, is a view. Dynamo returns one of two such
        outputs as a copy, so that the other has its memory alone and is a view all the same.
        """
        if not self._ops_alone():
            return  # an output may be what went into an op behind a module
        whole = _storages(*outputs, *leaves.values())
        meant = _storages(*exact)
        for k, y in enumerate(outputs):
            if y.requires_grad and whole.count(whole[k]) == meant.count(meant[k]) == 1:
                y += 1

    def _ops_alone(self) -> bool:
        """Whether all that runs are ops in plans."""
        return not self.hooks and all(isinstance(op, Op) for op in self._ops())

    def _enter(self, stack: ExitStack, recipes: Sequence[str], cast: bool, seed: int) -> None:
        draw_from(seed, self.device)
        if cast:
            stack.enter_context(torch.autocast(self.device, torch.bfloat16))
        for name in recipes:
            stack.enter_context(autocast(recipe=self.recipes[name]))

    def _run(
        self,
        inputs: Sequence[Tensor],
        checkpointed: str | None,
        compiled: str | None,
        first: bool | None,
    ) -> list[Tensor]:
        call = self.module
        if compiled is not None:
            if accumulated(self.module) or self.hooks:
                raise Impossible  # what Dynamo cannot follow runs in pieces
            torch.compiler.reset()
            call = torch.compile(call, backend=compiled)
        options: dict[str, Any] = {} if first is None else {"is_first_microbatch": first}
        if checkpointed is None:
            result = call(*inputs, **options)
        else:
            reentrant = checkpointed == "reentrant"
            more: Any = {} if reentrant else {"context_fn": checkpoint_contexts}
            result = checkpoint(partial(call, **options), *inputs, use_reentrant=reentrant, **more)
        if compiled is not None:
            torch.compiler.reset()  # or all calls of the process ask Dynamo
        results = list(result) if isinstance(result, tuple) else [result]
        return [y for y in results if y is not None]  # the bias that a LayerNormMLP returns

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Of what is seen inside no scale may be made."""
        states = [m for m in self.module.modules() if isinstance(m, DelayedState)]
        held = [(m.amax_forward, m.amax_forward.clone()) for m in states]
        yield
        if any(not torch.equal(seen, before) for seen, before in held):
            raise Wrong("a call without grad was recorded")

    def _check_marks(self) -> None:
        """By which other libraries know what to do with a parameter."""
        late = delayed(self.module, options=False)
        for name, parameter in self.module.named_parameters():
            if name in late and not hasattr(parameter, "skip_backward_post_hook"):
                raise Wrong(f"{name} does not say that its gradient is delayed")
            if isinstance(self.module, LayerNormMLP) and self._owned(parameter) == 1:
                split = name in ("fc1_weight", "fc1_bias", "fc2_weight")
                mark = "tensor_model_parallel" if split else "sequence_parallel"
                if not hasattr(parameter, mark):
                    raise Wrong(f"{name} has no {mark}")

    def _check_outputs(
        self, outputs: Sequence[Tensor], exact: Answer, allowed: Allowed, any_dtype: bool
    ) -> None:
        if len(outputs) != len(exact.outputs):
            raise Wrong(f"{len(outputs)} outputs, expected {len(exact.outputs)}")
        held = [*allowed.question.inputs, outputs[0]]
        if any(y is one for y in outputs[1:] for one in held) and self._ops_alone():
            raise Wrong("an output is an input, or another output, and no view of it")
        for k, (y, expected) in enumerate(zip(outputs, exact.outputs, strict=True)):
            if y.dtype != self.dtype and not any_dtype:
                raise Wrong(f"output {k}: got {y.dtype}, expected {self.dtype}")

            def plain(k: int = k) -> Tensor:
                return allowed.keep().outputs[k]

            check(f"output {k}", y.detach(), expected, allowed.dtype, plain)
            if y.dtype in (torch.float16, torch.bfloat16) and len(self._ops()) == 1:
                if not (allowed.low or any_dtype or interpreting()):
                    check_rounding(f"output {k}", y.detach(), expected)


def _storages(*tensors: Tensor) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another memory layout; "level": of one value a row; "padded": of a row of values."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]
    if layout == "sliced":
        return torch.cat((x, torch.full_like(x, float("nan"))), -1)[..., : x.shape[-1]]
    if layout == "padded" and x.dim() > 1:
        return torch.cat((x[:1], torch.zeros_like(x[1:])))
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand_as(x)
    if layout == "level":
        return x[..., :1].expand_as(x).contiguous()
    return x


__all__ = ["Impossible", "Life", "Wrong"]
