"""A module and another way to run it, or a copy that goes another way, which have to agree."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import CheckpointError, checkpoint

from ... import ops
from ...base.errors import OpsgraphError
from ...kernels.triton import interpreting
from ...op import Op
from ...precision.autocast import autocast
from ...precision.delayed import Scaling as DelayedState
from ...precision.recomputed import checkpoint_contexts
from .answers import Allowed, Question, answer, by_formulas, draw_from, dys_of
from .backwards import accumulated, delayed
from .changes import Impossible
from .compare import Wrong, check, drop
from .edges import Edges
from .own import Noise

Named = dict[str, Tensor]


class Twins(Edges):
    """`Edges`, and comparisons of two ways to compute the same."""

    def transform(self, way: str, lead: tuple[int, ...] = (4,), seed: int = 0) -> None:
        """Run the module under a transform of PyTorch, and compare that with the formulas.

        way: "vjp", "jvp", "dual", "functional", "vmap" or "trace".
        """
        if accumulated(self.module) or delayed(self.module) or self.hooks:
            raise Impossible  # an error says so
        if way in ("vmap", "trace") and self._draws():
            raise Impossible  # a mask of its own in each
        returns_bias = getattr(self.module, "return_bias", False)
        if returns_bias and (way == "vmap" or (way == "trace" and self.module.fc2_bias is None)):
            raise Impossible  # one bias for each sample; a trace returns no None
        every_place = [*self.module.named_modules(remove_duplicate=False)]
        if way == "functional" and len(every_place) > len([*self.module.modules()]):
            raise Impossible  # functional_call leaves a module changed that stands in two places
        if way == "trace" and any(self._owned(p) > 1 for p in self.module.parameters()):
            raise Impossible  # PyTorch traces no module that shares them
        every = (3, *lead) if way == "vmap" else lead
        if not self._fits(every, self._random((*every, self.width), seed)):
            return
        inputs = self._inputs(every, seed)
        for value in inputs:
            value.requires_grad_(way in ("vjp", "functional"))
        question = Question(self.module, inputs, seed, way in ("vjp", "functional"), self._random)
        exact = answer(question, torch.float64)
        allowed = Allowed(question, exact, self.dtype, False)
        dys = dys_of(question, exact.outputs)
        draw_from(seed, self.device)
        with self._excused():
            outputs, gradients = self._transformed(way, inputs, dys, seed, allowed)
        for k, (y, right) in enumerate(zip(outputs, exact.outputs, strict=True)):
            output = partial(lambda k: allowed.keep().outputs[k], k)
            check(f"output {k}", y.detach(), right, self.dtype, output)
        terms = 4 * prod(lead)  # derivatives are PyTorch's: they may round where ours are 0
        for name, found in gradients.items():
            if (expected := exact.gradients[name]) is not None:
                gradient = partial(lambda name: allowed.keep().gradients[name], name)
                check(f"gradient of {name}", found, expected, self.dtype, gradient, terms)

    def twin(self, way: str, recipe: str | None = None, seed: int = 0) -> None:
        """A copy that goes another way has to give the same bits.

        way: "at once", where weight gradients wait in the module; "saved" or "reentrant", a
        checkpoint; "bare", one without `checkpoint_contexts`. A checkpoint that is not told of the
        recipe may raise an error that names them.
        """
        lead = (16,)
        waits = delayed(self.module)
        if accumulated(self.module) or self.hooks or (way == "at once") != bool(waits):
            raise Impossible
        if self.handles and way == "reentrant":
            raise Impossible  # a user's fuser for calls without grad has formulas of its own
        if not self._fits(lead, self._random((*lead, self.width), seed)):
            return
        if way == "reentrant" and getattr(self.module, "return_bias", False):
            raise Impossible
        one, two = copy.deepcopy(self.module), copy.deepcopy(self.module)
        if way == "at once":
            for module in (two, *two.modules()):
                if getattr(module, "delay_wgrad_compute", False):
                    module.delay_wgrad_compute = False
        told = recipe is None or way not in ("bare", "reentrant")
        with self._excused():
            right = self._bits(one, None, recipe, seed)
        try:
            found = self._bits(two, None if way == "at once" else way, recipe, seed)
        except OpsgraphError as error:
            drop(error)
            if "checkpoint_contexts" in str(error) and not told:
                return
            raise
        except CheckpointError as error:
            drop(error)
            if not told and not all(isinstance(op, Op) for op in self._ops()):
                return  # what forgot was another's
            raise
        for name, value in right.items():
            if not _same(value, found[name]):
                raise Wrong(f"{name}: other bits than those of another way")

    def overlap(self, seed: int = 0) -> None:
        """A backward after another call gives the bits that it gives at once, of large values.

        Memory of a megabyte and more is used again.
        """
        if accumulated(self.module) or self.hooks or not self.width or interpreting():
            raise Impossible  # Triton's interpreter takes minutes
        if len(self._ops()) > 300:
            raise Impossible  # so do chains of thousands of ops
        lead = (2**20 // (self.dtype.itemsize * self.width),)
        if not self._fits(lead, self._random((1, self.width), seed).expand(*lead, self.width)):
            return
        module = copy.deepcopy(self.module)
        with self._excused():
            right = self._bits(module, None, None, seed, lead)
            module.zero_grad()
            found = self._bits(module, None, None, seed, lead, again=True)
        for name, value in right.items():
            if not _same(value, found[name]):
                raise Wrong(f"{name}: other bits after another call")

    def restart(self) -> None:
        """Go on with a module that never ran, as torch.distributed.checkpoint loads it."""
        self._copied()
        mine = self.module.state_dict()
        other = copy.deepcopy(self.module)
        found = False
        for owner in list(other.modules()):
            for name, child in list(owner._modules.items()):
                if isinstance(child, DelayedState):
                    del owner._modules[name]
                    found = True
        if not found:
            raise Impossible
        with torch.no_grad(), autocast(recipe=self.recipes["delayed"]):
            asked = other.state_dict()
        if missing := set(mine) - set(asked):
            raise Wrong(f"a module that never ran does not ask for {', '.join(sorted(missing))}")
        with torch.no_grad():
            for name, value in mine.items():
                asked[name].copy_(value)
        other.load_state_dict(asked)
        for name, value in other.state_dict().items():
            if name in mine and not torch.equal(value, mine[name]):
                raise Wrong(f"{name} was not loaded")
        self.module = other

    # -- how --

    def _inputs(self, lead: tuple[int, ...], seed: int) -> list[Tensor]:
        shapes = self.shapes[lead]
        x = self._random((*lead, self.width), seed)
        return [x, *(self._random(shape, seed + k) for k, shape in enumerate(shapes))]

    def _draws(self) -> bool:
        return any(
            isinstance(m, Noise) or (isinstance(m, ops.Dropout) and m.training)
            for m in self.module.modules()
        )

    def _outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _listed(self.module(*inputs))

    def _transformed(
        self, way: str, inputs: Sequence[Tensor], dys: Sequence[Tensor], seed: int, allowed: Allowed
    ) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """Outputs and gradients."""
        if way == "vjp":
            outputs, back = vjp(self._outputs, *inputs)[:2]
            found = back(tuple(dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)))
            return outputs, {f"input {k}": gradient for k, gradient in enumerate(found)}
        if way == "functional":
            return self._functional(inputs, dys)
        if way == "vmap":
            return vmap(self._outputs)(*inputs), {}
        if way == "trace":
            return self._traced(inputs, seed), {}
        return self._tangents(way, inputs, seed, allowed), {}

    def _functional(
        self, inputs: Sequence[Tensor], dys: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Named]:
        """Outputs, and gradients of the parameters, by torch.func."""

        def total(parameters: Named) -> tuple[Tensor, tuple[Tensor, ...]]:
            ys = _listed(functional_call(self.module, parameters, tuple(inputs)))
            pairs = zip(ys, dys, strict=True)
            return torch.stack([(y * dy.to(y.dtype)).sum() for y, dy in pairs]).sum(), ys

        given = {name: p.detach() for name, p in self.module.named_parameters()}
        gradients, ys = grad(total, has_aux=True)(given)
        outputs: Sequence[Tensor] = ys
        return outputs, gradients

    def _traced(self, inputs: Sequence[Tensor], seed: int) -> Any:
        """Outputs of what torch.jit.trace records of other inputs."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes, which are the same here
            others = tuple(self._inputs(inputs[0].shape[:-1], seed + 1))
            traced = torch.jit.trace(self.module, others, check_trace=False)
            return _listed(traced(*inputs))

    def _tangents(self, way: str, inputs: Sequence[Tensor], seed: int, allowed: Allowed) -> Any:
        """Outputs in forward-mode AD, whose tangents are compared here."""
        moving = [self._random(x.shape, seed + 50 + k) for k, x in enumerate(inputs)]
        if way == "jvp":
            outputs, found = jvp(self._outputs, tuple(inputs), tuple(moving))[:2]
        else:
            outputs, found = _duals(self._outputs, inputs, moving)

        def by(dtype: torch.dtype) -> Any:
            draw_from(seed, self.device)
            wide = [[t.detach().to(dtype) for t in values] for values in (inputs, moving)]
            found = _duals(lambda *x: by_formulas(self.module, dtype, x)[0], *wide)[1]
            return [None if t is None else t.detach() for t in found]

        for k, (tangent, right) in enumerate(zip(found, by(torch.float64), strict=True)):
            if right is None:
                right = torch.zeros_like(allowed.exact.outputs[k])
            tangent = torch.zeros_like(outputs[k]) if tangent is None else tangent
            plain = partial(lambda k: by(self.dtype)[k], k)
            check(f"tangent of output {k}", tangent.detach(), right, self.dtype, plain)
        return [y.detach() for y in outputs]

    def _bits(
        self,
        module: Any,
        way: str | None,
        recipe: str | None,
        seed: int,
        lead: tuple[int, ...] = (16,),
        again: bool = False,
    ) -> dict[str, Any]:
        """Outputs and gradients of a call of a copy. again: with another before the backward."""
        inputs = self._inputs(lead, seed)
        for value in inputs:
            value.requires_grad_()
        draw_from(seed, self.device)
        around = nullcontext() if recipe is None else autocast(recipe=self.recipes[recipe])
        with around:
            if way is None:
                result = module(*inputs)
            else:
                more: Any = {"context_fn": checkpoint_contexts} if way == "saved" else {}
                result = checkpoint(module, *inputs, use_reentrant=way == "reentrant", **more)
        ys = _listed(result)
        if again:
            module(*(x.detach() + 1 for x in inputs))
        pairs = [(y, self._random(y.shape, seed + k).to(y.dtype)) for k, y in enumerate(ys)]
        moving = [pair for pair in pairs if pair[0].requires_grad]
        if moving:
            torch.autograd.backward(*zip(*moving, strict=True))  # type: ignore[arg-type]
        while module.queued_backward_dw():
            module.backward_dw()
        found: dict[str, Any] = {f"output {k}": y.detach() for k, y in enumerate(ys)}
        found |= {f"gradient of input {k}": x.grad for k, x in enumerate(inputs)}
        return found | {f"gradient of {n}": p.grad for n, p in module.named_parameters()}


def _listed(result: Any) -> tuple[Tensor, ...]:
    """All outputs of a call, but for a bias that is not there."""
    results = result if isinstance(result, tuple) else (result,)
    return tuple(y for y in results if y is not None)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are there with the same bits, or none."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def _duals(function: Callable[..., Any], inputs: Any, tangents: Any) -> Any:
    """Outputs and their tangents, None for one that does not move."""
    with forward_ad.dual_level():
        made = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(y) for y in function(*made)]
    return [pair.primal for pair in pairs], [pair.tangent for pair in pairs]
