"""One linear layer from call to call under a recipe, each compared with what the recipe says."""

import copy
import io
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...layernorm_mlp import LayerNormMLP
from ...op import Op
from ...precision.autocast import autocast
from ...precision.recipe import Float8CurrentScaling
from ...precision.recomputed import checkpoint_contexts
from ...run.sequential import Sequential
from .. import formulas
from .backwards import elsewhere
from .changes import Impossible, evaluated
from .compare import Wrong, check
from .scaled import CLOSE, KINDS, Products
from .twins import Twins

OTHER = Float8CurrentScaling(amax_epsilon=1e-3)
"""A recipe that no layer here is called under."""


class Layers(Twins):
    """`Twins`, and layers whose results under a recipe are known to the last bits."""

    def layer(self, kind: str, sizes: tuple[int, int, int], *calls: str, seed: int = 0) -> None:
        """Make a linear layer, and call it.

        kind: of `KINDS`. sizes: rows, in and out features. calls: "plain"; "again", on larger
        values; "no grad"; "copied", "loaded" and "pickled", by what the layer has become; "saved",
        in a checkpoint, under another planner, whose backward comes after another call; "bare", in
        one without `checkpoint_contexts` that enters the recipe inside; "nested", after another
        recipe's context has ended inside of this one's; "thread", in another thread, where no
        recipe is.
        """
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise Impossible
        rows, width, out = sizes
        layer: Any = self._linear(width, out)
        with torch.no_grad():
            layer[0].weight.copy_(self._random((out, width), seed))
        expected = Products(KINDS[kind])
        for number, how in enumerate(calls):
            if how in ("copied", "loaded", "pickled"):
                layer = self._moved(layer, how)
            more = 3.0 if how == "again" else 1.0
            x = _spread(self._random((rows, width), seed + number) * more, 2.0)
            dy = _spread(self._random((rows, out), seed + number + 50) / more, 4.0)
            self._compared(how, layer, expected, x.requires_grad_(), dy)
            scales = [v for n, v in layer.state_dict().items() if n.endswith("scaling.scale")]
            right = torch.tensor(expected.scales, device=self.device)
            if scales and not torch.allclose(scales[0], right, rtol=1e-5, atol=0):
                raise Wrong(f"{how}: got scales {scales[0].tolist()}, expected {right.tolist()}")

    def groups(self, source: str, sizes: Sequence[int], *calls: str, seed: int = 0) -> None:
        """Make a linear layer of groups, and call it; its results are the formula's.

        sizes: rows of each group. calls: "plain"; "no grad"; "frozen", its weights without
        gradients; "copied", "loaded" and "pickled", by what the layer has become; "saved", in a
        checkpoint.
        """
        layer: Any = self._of(evaluated(source))
        with torch.no_grad():
            for k, parameter in enumerate(layer.parameters()):
                parameter.copy_(self._values(parameter.shape, seed + k))
        for number, how in enumerate(calls):
            if how in ("copied", "loaded", "pickled"):
                layer = self._moved(layer, how, evaluated(source))
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(how != "frozen" or "bias" in name)
            self._grouped(layer, sizes, how, seed + number)

    def microbatch(self, recipe: str, seed: int = 0) -> None:
        """A later microbatch reads the weights that the first one has quantized.

        It is told so; that they were changed in between makes no difference.
        """
        if not isinstance(self.module, LayerNormMLP) or self.hooks or recipe == "delayed":
            raise Impossible
        x, found = self._random((16, self.width), seed), []
        if not self._fits((16,), x):
            return
        module: Any = copy.deepcopy(self.module)
        for first in (True, False):
            with torch.no_grad(), autocast(recipe=self.recipes[recipe]):
                result = module(x, is_first_microbatch=first)
                found.append(result[0] if isinstance(result, tuple) else result)
                for weight in (module.fc1_weight, module.fc2_weight):
                    weight.copy_(self._values(weight.shape, seed))
        if not torch.equal(*found):
            raise Wrong("a later microbatch has quantized its weights anew")

    # -- how --

    def _linear(self, width: int, out: int) -> Sequential:
        return self._of(ops.Linear(width, out, bias=False))

    def _of(self, op: Op) -> Sequential:
        backends = self.options.get("backends")
        return Sequential(op, device=self.device, dtype=self.dtype, backends=backends)

    def _grouped(self, layer: Any, sizes: Sequence[int], how: str, seed: int) -> None:
        """One call of a layer of groups, and its backward."""
        x = self._random((sum(sizes), layer[0].in_features), seed).requires_grad_()
        given = torch.tensor(sizes, device=self.device)
        with nullcontext() if how != "no grad" else torch.no_grad():
            y = (
                checkpoint(layer, x, given, use_reentrant=False)
                if how == "saved"
                else layer(x, given)
            )
        dy = self._random(y.shape, seed + 50)

        def answer(dtype: torch.dtype) -> dict[str, Tensor]:
            leaves = {"input": x, **dict(layer[0].named_parameters())}
            wide = {
                n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in leaves.items()
            }
            right = formulas.grouped_linear(layer[0], wide["input"], wide.get, sizes)
            return _with_gradients(right, wide, dy.to(dtype))

        found = {"output": y.detach()}
        if how != "no grad":
            named = {"input": x, **dict(layer[0].named_parameters())}
            found = _with_gradients(y, named, dy)
        exact, plain = answer(torch.float64), answer(self.dtype)
        for name, value in found.items():
            terms = 1 if name in ("output", "input") else max(1, max(sizes))
            check(f"{how}: {name}", value, exact[name], self.dtype, partial(plain.get, name), terms)

    def _moved(self, layer: Any, how: str, op: Op | None = None) -> Any:
        """A copy, which goes on with the same scales; op: what the state is loaded into."""
        if how == "copied":
            return copy.deepcopy(layer)
        buffer = io.BytesIO()
        torch.save(layer if how == "pickled" else layer.state_dict(), buffer)
        buffer.seek(0)
        if how == "pickled":
            return torch.load(buffer, weights_only=False)
        size = layer[0].in_features, layer[0].out_features
        other = self._linear(*size) if op is None else self._of(op)
        other.load_state_dict(torch.load(buffer))
        return other

    def _compared(self, how: str, layer: Any, expected: Products, x: Tensor, dy: Tensor) -> None:
        """One call, and its backward."""
        weight = layer[0].weight.detach()
        recipe = expected.kind.recipe
        expected.open()
        if how == "thread":
            with autocast(recipe=recipe):
                y = elsewhere(True, lambda: layer(x))
            _close(how, "output", y, x.double() @ weight.double().T)
            return
        scales, right = list(expected.scales), expected.forward(x, weight)
        y = self._called(how, layer, recipe, x)
        _close(how, "output", y, right)
        if how == "no grad":
            return
        expected.close(x, weight)
        if how == "saved":
            self._compared("plain", layer, expected, (x * 2).detach().requires_grad_(), dy / 2)
        elif how == "bare":  # which enters the context again
            expected.open()
            scales[2] = expected.scales[2]
        layer[0].weight.grad = None
        torch.autograd.backward(y, dy)
        dx, dw = expected.backward(x, weight, dy, scales)
        expected.saw(dy)
        _close(how, "gradient of the input", x.grad, dx)
        _close(how, "gradient of the weight", layer[0].weight.grad, dw)

    def _called(self, how: str, layer: Any, recipe: Any, x: Tensor) -> Any:
        """The output of a call under a recipe."""

        def inside(x: Tensor) -> Any:
            with autocast(recipe=recipe):
                return layer(x)

        if how == "bare":
            return checkpoint(inside, x, use_reentrant=False)
        if how == "no grad":
            with torch.no_grad():
                return inside(x)
        with autocast(recipe=recipe):
            if how == "nested":
                with autocast(recipe=OTHER):
                    pass
            if how == "saved":
                layer.planner = "optimal" if layer.planner == "greedy" else "greedy"
                return checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
            return layer(x)


def _with_gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of those leaves that require one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"output": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def _spread(x: Tensor, base: float) -> Tensor:
    """Rows of different sizes, down to where FP8 has fewer digits."""
    rows = torch.arange(x.size(0), device=x.device) % 16
    return x * (base ** -rows.to(x.dtype))[:, None]


def _close(how: str, what: str, found: Any, exact: Tensor) -> None:
    """Each row by itself."""
    error, size = (found.detach().double() - exact).norm(dim=1), exact.norm(dim=1)
    if not bool((error <= CLOSE * size).all()):
        worst = float((error / size).nan_to_num(torch.inf).max())
        raise Wrong(f"{how}: {what}: a row is off by {worst:.3g} of it, allowed {CLOSE}")
