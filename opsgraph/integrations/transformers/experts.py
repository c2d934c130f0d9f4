"""Experts of a mixture: modules that hold the weights of all experts, stacked.

Such a module takes `(x, index, weights)`: rows `[tokens, width]`, for each row the numbers of its
experts `[tokens, k]`, and how much each counts. Its weights are `[E, out, in]` or `[E, in, out]`.
Which, and what it computes between them, is found by trying: each candidate is compared with the
module on probe values that reach beyond 10. What agrees is proven as plans are, values and
gradients in each dtype, and takes the place of the module's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...features.convert import is_untouched
from ...op import Op
from ...ops.activations import (
    GEGLU,
    QGEGLU,
    ClampedSwiGLU,
    ReGLU,
    SiTUGLU,
    SReGLU,
    SwiGLU,
)
from ...ops.grouped import GroupedLinear
from ...ops.transposed import TransposedGroupedLinear
from ...run.sequential import Sequential
from .deferred import Book, computed
from .leaves import ACTIVATIONS
from .prove import EXACT, HALF, WORSE, Errors, Kept
from .replacing import Replacing, Settings, original, present

WIDTH, INNER, TOKENS, TOP = 48, 32, 40, 2
"""Of probe values."""
SPREAD = 5.0
"""The deviation of what the activation gets: some values are beyond 10."""


@dataclass
class Form:
    """What a module of experts computes.

    up, down: the names of its weights, biases: of theirs, or None. make: the activation.
    """

    up: str
    down: str
    biases: tuple[str, str] | None
    transposed: bool
    gated: bool
    make: Callable[[], Op]

    def sequence(self, home: nn.Module, count: int, width: int, inner: int) -> Sequential:
        """The plan's ops, reading a module's parameters."""
        kind = TransposedGroupedLinear if self.transposed else GroupedLinear
        sizes = (width, inner * (2 if self.gated else 1)), (inner, width)
        layers: list[Op] = []
        for k, (name, (first, second)) in enumerate(zip((self.up, self.down), sizes, strict=True)):
            op = kind(
                count, first, second, self.biases is not None, device="meta",
                single_grouped_weight=True, single_grouped_bias=True,
            )  # fmt: skip
            bias = {} if self.biases is None else {"bias": self.biases[k]}
            layers.append(op.borrow(home, weight=name, **bias))
        return Sequential(layers[0], self.make(), layers[1])

    def sizes(self, module: nn.Module) -> tuple[int, int, int]:
        """How many experts there are, their width, and that between the products."""
        count, *down = module._parameters[self.down].shape  # type: ignore[union-attr]
        inner, width = down if self.transposed else down[::-1]
        return count, width, inner


def sizes_of(index: Tensor, count: int) -> Tensor | None:
    """How many rows each expert gets; None where a number is none of an expert's."""
    try:
        sizes = torch.bincount(index.reshape(-1), minlength=count)
    except RuntimeError:  # of numbers below 0
        return None
    return sizes if len(sizes) == count else None


def mixed(
    run: Callable[..., Any], x: Tensor, index: Tensor, weights: Tensor, sizes: Tensor
) -> Tensor:
    """The sums of what each row's experts make of it. run: takes rows and each expert's number."""
    tokens, top = index.shape
    order = index.reshape(-1).argsort(stable=True)
    y = run(x.index_select(0, order // top), sizes, sizes)
    y = y * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y.index_select(0, back).view(tokens, top, y.shape[-1]).sum(1).to(x.dtype)  # type: ignore[no-any-return]


class Experts(Replacing):
    """In the place of the forward of a module of experts.

    dtypes: of calls that were proven. trains: whether training makes no difference to them.
    """

    def __init__(self, name: str, module: nn.Module, form: Form, book: Book) -> None:
        self.name, self.module, self.form, self.book = name, module, form, book
        self.count, width, inner = form.sizes(module)
        self.run = form.sequence(module, self.count, width, inner)
        self.dtypes: set[torch.dtype] = set()
        self.trains = False
        self.inside = [*module.modules()]
        self.settings: list[Settings] = []
        """What they compute by, once the model is patched."""
        self.names = present(module)
        self.arguments = [*signature(type(module).forward).parameters][1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, by the plan where the call is one that was proven."""
        if torch.compiler.is_compiling():
            return original(self.module, *args, **kwargs)
        args, kwargs = computed(args), computed(kwargs)
        given = (*args, *(kwargs[name] for name in self.arguments if name in kwargs))
        if not self._follows(given) or len(given) != len(args) + len(kwargs):
            return original(self.module, *args, **kwargs)
        x, index, weights = given
        sizes = sizes_of(index, self.count)
        if sizes is None:
            return original(self.module, *args, **kwargs)
        return mixed(self.run, x, index, weights, sizes)

    def _follows(self, given: Sequence[Any]) -> bool:
        if len(given) != 3 or any(type(t) is not Tensor or t.is_meta for t in given):
            return False
        x, index, weights = given
        own: Any = self.module._parameters
        return (
            x.dtype in self.dtypes
            and x.dim() == 2
            and index.dim() == 2
            and index.shape == weights.shape
            and len(index) == len(x)
            and not torch.is_autocast_enabled(x.device.type)
            and torch._C._get_tracing_state() is None
            and not getattr(self.module, "_is_expert_parallel", False)
            and all(type(own[n]) is nn.Parameter and own[n].dtype is x.dtype for n in self.names)
            and all(settings.hold() for settings in self.settings)
            and (self.trains or not any(part.training for part in self.inside))
            and all(is_untouched(part) for part in self.inside[1:])
        )


def experts_of(module: nn.Module) -> Form | str | None:
    """What a module of experts computes; the reason why it stays; None for one that is none."""
    own = {n: p for n, p in module._parameters.items() if p is not None}
    stacks = [name for name, p in own.items() if p.dim() == 3]
    rest = [name for name, p in own.items() if p.dim() == 2]
    if len(own) not in (2, 4) or len(stacks) + len(rest) != len(own):
        return None
    if len({p.shape[0] for p in own.values()}) != 1 or module._buffers:
        return None
    if any(True for child in module.children() for _ in child.parameters()):
        return "an expert has modules with parameters inside"
    if any(not p.is_floating_point() or type(p) is not nn.Parameter for p in own.values()):
        return "its weights are quantized, or of a class of their own"
    if not is_untouched(module):
        return "it has hooks or a forward of its own"
    with torch.no_grad():
        found = next(_agreeing(module, stacks, rest), None)
    return found or "it computes what no candidate does, on probe values"


def _agreeing(module: nn.Module, stacks: list[str], rest: list[str]) -> Iterator[Form]:
    up, down = stacks
    first, second = (module._parameters[name].shape[1:] for name in stacks)  # type: ignore[union-attr]
    for transposed, gated in product((False, True), (True, False)):
        inner = (second[0] if transposed else second[1]) * (2 if gated else 1)
        width = second[1] if transposed else second[0]
        if tuple(first) != ((width, inner) if transposed else (inner, width)):
            continue
        biases = (rest[0], rest[1]) if rest else None
        forms = [Form(up, down, biases, transposed, gated, make) for make in _makes(module, gated)]
        yield from (form for form in forms if _same(module, form))


def _makes(module: nn.Module, gated: bool) -> list[Callable[[], Op]]:
    """Candidates for the activation, those that models have most often first."""
    if not gated:
        return [partial(kind, *given) for kind, given in ACTIVATIONS]
    numbers = [v for v in module.__dict__.values() if type(v) is float]
    limits = [v for v in (*numbers, 7.0, 10.0) if v > 0]
    alphas = [*dict.fromkeys((*numbers, 1.702, 1.0))]
    clamped = [
        (ClampedSwiGLU, (limit, alpha, offset), {"clamp_after": after})
        for limit, alpha, offset, after in product(
            dict.fromkeys(limits), alphas, (1.0, 0.0), (False, True)
        )
    ]  # fmt: skip
    kinds: list[Any] = [(SwiGLU, (), {}), (GEGLU, ("none",), {}), (GEGLU, (), {}), (ReGLU, (), {})]
    kinds += [(SReGLU, (), {}), (QGEGLU, (), {}), (SiTUGLU, (), {}), *clamped]
    orders: tuple[dict[str, Any], ...] = {}, {"glu_interleave_size": 1}, {"gate_second": True}
    return [
        partial(kind, *given, **options, **order)
        for order, (kind, given, options) in product(orders, kinds)
    ]


def _probe(module: nn.Module, form: Form, draw: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters of the module's kind in small, and what it is called with, in fp64."""
    generator = torch.Generator().manual_seed(draw)
    count = form.sizes(module)[0]
    columns = INNER * (2 if form.gated else 1)

    def normal(*shape: int, size: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * size

    up, down = (columns, WIDTH), (WIDTH, INNER)
    if form.transposed:
        up, down = up[::-1], down[::-1]
    values = {form.up: normal(count, *up, size=SPREAD / WIDTH**0.5)}
    values[form.down] = normal(count, *down, size=INNER**-0.5)
    if form.biases is not None:
        values |= {form.biases[0]: normal(count, columns, size=1.0)}
        values |= {form.biases[1]: normal(count, WIDTH, size=1.0)}
    scores = torch.rand(TOKENS, count, generator=generator)
    index = scores.topk(min(TOP, count), dim=1).indices
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float64)
    device = next(module.parameters()).device
    given = [normal(TOKENS, WIDTH, size=1.0), index, weights]
    return {n: v.to(device) for n, v in values.items()}, [t.to(device) for t in given]


def _theirs(module: nn.Module, values: Mapping[str, Tensor], given: Sequence[Tensor]) -> Any:
    return torch.func.functional_call(module, dict(values), tuple(given))


def _ours(module: nn.Module, form: Form, values: Mapping[str, Tensor], given: Any) -> Tensor:
    home, count = nn.Module(), form.sizes(module)[0]
    for name, value in values.items():
        setattr(home, name, value)
    x, index, weights = given
    sizes = torch.bincount(index.reshape(-1), minlength=count)
    return mixed(form.sequence(home, count, WIDTH, INNER), x, index, weights, sizes)


def _same(module: nn.Module, form: Form) -> bool:
    """Whether a form computes what the module does, in fp32."""
    values, (x, index, weights) = _probe(module, form)
    values = {name: value.float() for name, value in values.items()}
    given = x.float(), index, weights.float()
    try:
        y = _theirs(module, values, given)
    except Exception:  # whatever it raises, it does not take such operands
        return False
    z = _ours(module, form, values, given)
    return type(y) is Tensor and y.shape == z.shape and torch.allclose(y, z, 1e-4, 1e-5)


def prove(module: nn.Module, form: Form, dtype: torch.dtype) -> tuple[float, str | None]:
    """The difference in fp32, or the quotient of errors in 16 bits; and a reason against it."""
    half = dtype in HALF
    errors: list[Errors] = []
    names = ["the result", "the input's gradient", "the gradient of the experts' shares"]
    names += [f"the gradient of {n}" for n in (form.up, form.down, *(form.biases or ()))]
    for draw in range(8 if half else 1):
        values, (x, index, weights) = _probe(module, form, draw)

        def results(f: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
            held = {n: v.to(dtype).requires_grad_() for n, v in values.items()}  # noqa: B023
            moving = [t.to(dtype).requires_grad_() for t in (x, weights)]  # noqa: B023
            with torch.enable_grad():
                y = f(held, (moving[0], index, moving[1]))  # noqa: B023
                dy = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype)
                loss = (y * dy.view(y.shape)).sum()
                return [y.detach(), *torch.autograd.grad(loss, [*moving, *held.values()])]

        values = {n: v.to(dtype).double() for n, v in values.items()}
        x, weights = x.to(dtype).double(), weights.to(dtype).double()
        own = results(lambda v, g: _theirs(module, v, g), dtype)
        mine = results(lambda v, g: _ours(module, form, v, g), dtype)
        right = own
        if half:  # the formula, which agrees with the module in fp32
            right = results(lambda v, g: _ours(module, form, v, g), torch.float64)
        errors = errors or [Errors(dtype) for _ in mine]
        for name, error, *found in zip(names, errors, mine, own, right, strict=True):
            if (reason := error.add(*found)) is not None:
                return 0.0, f"{name} {reason}"
    worst = max(e.worse if half else e.difference for e in errors)
    if worst > (WORSE if half else EXACT):
        what = f"{worst:.2f} of the module's error" if half else f"a difference of {worst:.1e}"
        return worst, f"{str(dtype).removeprefix('torch.')}: {what}"
    return worst, None


@dataclass(frozen=True)
class Proven:
    """What was measured of experts. dtypes: of calls that their plan takes."""

    form: Form
    dtypes: frozenset[torch.dtype]
    fp32: float
    half: float
    trains: bool
    """Whether the module computes the same while it trains."""
    saved_before: int
    """Bytes that the module keeps for each row and expert."""


def found_in(
    model: nn.Module, book: Book, dtypes: Sequence[torch.dtype], left: list[Any]
) -> list[tuple[Experts, Proven]]:
    """The experts of a model whose forwards plans take; left: takes those that stay, and why."""
    found: list[tuple[Experts, Proven]] = []
    known: dict[Any, Proven | str | None] = {}
    for name, module in model.named_modules():
        if sum(p.dim() == 3 for p in module._parameters.values() if p is not None) != 2:
            continue
        key = _kind_of(module)
        if key not in known:
            known[key] = _decided(module, dtypes)
        made = known[key]
        if isinstance(made, str):
            left.append((name, type(module).__name__, made))
        elif made is not None:
            experts = Experts(name, module, made.form, book)
            experts.dtypes |= made.dtypes
            experts.trains = made.trains
            found.append((experts, made))
    return found


def _kind_of(module: nn.Module) -> Any:
    """Equal for modules that compute the same, but for the values of their parameters."""
    own = [(n, p.shape, p.dtype) for n, p in module._parameters.items() if p is not None]
    inside = [
        (n, part.training, is_untouched(part), s.kind, s.names, s.values, [id(v) for _, v in rest])
        for n, part in module.named_modules()
        for s in [Settings.of(part)]
        for rest in [[(k, v) for k, v in s.others if k not in part._modules]]
    ]
    return repr((own, inside))


def _decided(module: nn.Module, dtypes: Sequence[torch.dtype]) -> Proven | str | None:
    form = experts_of(module)
    if not isinstance(form, Form):
        return form
    measured = dict.fromkeys((True, False), 0.0)
    for dtype in dtypes:
        try:
            worst, reason = prove(module, form, dtype)
        except Exception as error:  # whatever either raises, the plan is not taken
            worst, reason = 0.0, f"{dtype}: {type(error).__name__}: {error}"
        if reason is not None:
            return reason
        measured[dtype in HALF] = max(measured[dtype in HALF], worst)
    trains, kept = _trains_alike(module, form), _kept(module, form)
    return Proven(form, frozenset(dtypes), measured[False], measured[True], trains, kept)


def _trains_alike(module: nn.Module, form: Form) -> bool:
    """Whether a module computes the same while it trains, as it does without dropout."""
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            return _same(module.train(), form)
    finally:
        for part, mode in modes.items():
            part.training = mode


def _kept(module: nn.Module, form: Form) -> int:
    """Bytes that a module keeps for each row and expert."""
    count, width, _ = form.sizes(module)
    weight = module._parameters[form.up]
    assert weight is not None
    x = torch.ones(TOKENS, width, dtype=weight.dtype, device=weight.device, requires_grad=True)
    index = torch.arange(TOKENS * min(TOP, count), device=weight.device).view(TOKENS, -1) % count
    kept = Kept(list(module.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved):
        module(x, index, torch.ones(index.shape, dtype=x.dtype, device=x.device))
    return kept.bytes // index.numel()
