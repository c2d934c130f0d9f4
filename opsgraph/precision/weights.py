"""Parameters held in low precision, as `quantized_model_init` makes them.

`QuantizedTensor` has a plain tensor's shape and dtype and holds quantized copies alone. Every
operation reads the values that these stand for, and one that writes into it, or into a part of it,
quantizes the result: so any optimizer of torch.optim can update it, each in-place step with a
rounding of its own. Saved, it is the plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..base.errors import OpError, OpsgraphError
from ..guards.validation import flag
from .autocast import active
from .quantizers import Copy, Quantized, Quantizer, transposed
from .recipe import DelayedScaling, Recipe, recipe_of

_aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """A matrix `[rows, cols]`, quantized; both copies where they are not each other's transpose."""

    value: Quantized

    @staticmethod
    def __new__(cls, value: Quantized, shape: torch.Size) -> QuantizedTensor:
        assert value.row is not None
        tensor: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=value.dtype, device=value.row.data.device
        )
        tensor.value = value
        return tensor

    def __init__(self, value: Quantized, shape: torch.Size) -> None:
        super().__init__()

    @classmethod
    def of(cls, x: Tensor, quantizer: Quantizer) -> QuantizedTensor:
        """x, fp32, bf16 or fp16, quantized."""
        with torch.no_grad():
            return cls(_copies_of(x.detach(), quantizer), x.shape)

    @property
    def quantizer(self) -> Quantizer:
        """What made the copies."""
        assert self.value.row is not None
        return self.value.row.quantizer

    def copies(self, quantizer: Quantizer, wanted: tuple[str, ...]) -> Quantized | None:
        """The value as a GEMM takes it; None if that quantizer would store it in another way."""
        row, col = self.value.row, self.value.col
        if row is None or row.quantizer.storage != quantizer.storage:
            return None
        if "col" in wanted and col is None:
            col = transposed(row)
        return Quantized(row, col, self.dtype)

    def dequantize(self) -> Tensor:
        """The values that it stands for, a plain tensor of its dtype."""
        assert self.value.row is not None
        return self.value.row.dequantize(self.dtype)[:, : self.shape[1]].contiguous()

    @property
    def data(self) -> Any:
        """As a Tensor's. What is set is quantized, as what is written is. Raises OpError."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, x: Tensor) -> None:
        if isinstance(x, QuantizedTensor):
            self.value = x.value
            torch.Tensor.data.__set__(self, x)  # type: ignore[attr-defined]
        elif x.shape == self.shape:
            self.write(x.detach())
        else:
            got = f"data of shape {tuple(x.shape)}"
            raise OpError("a quantized weight", got, str(tuple(self.shape)))

    def share_memory_(self) -> QuantizedTensor:
        """As a Tensor's, of what it holds."""
        for part in _parts(self.value):
            part.share_memory_()
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self.dequantize().__dlpack__(**options)

    def write(self, x: Tensor) -> None:
        """Quantize x into it."""
        new = _copies_of(x, self.quantizer)
        for old, part in zip(_parts(self.value), _parts(new), strict=True):
            old.copy_(part)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.quantizer.storage.name}, {tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _REMADE:
            # Outside of inference mode, whose tensors have no version, as detach() asks for.
            with torch.inference_mode(False), torch.no_grad():
                return _REMADE[func](*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})

    def _mapped(self, change: Any, dtype: torch.dtype | None = None) -> QuantizedTensor:
        def copy(old: Copy | None) -> Copy | None:
            return None if old is None else old.quantizer.made(*map(change, old.parts))

        row, col = copy(self.value.row), copy(self.value.col)
        return type(self)(Quantized(row, col, dtype or self.dtype), self.shape)

    def _moved(
        self, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        """`.to()`: another device, or another dtype to stand for."""
        return self._mapped(lambda p: p.to(device or p.device, non_blocking=non_blocking), dtype)


class QuantizedView(torch.Tensor):
    """A view of a QuantizedTensor, as `weight[0]`: it reads the weight, and writes into it.

    steps: what makes it of the weight's values.
    """

    base: QuantizedTensor
    steps: tuple[Callable[[Tensor], Tensor], ...]

    @staticmethod
    def of(base: QuantizedTensor, *steps: Callable[[Tensor], Tensor]) -> QuantizedView:
        """The view that steps make of a weight, whose values they do not need for that."""
        like = reduce(_taken, steps, torch.empty(base.shape, dtype=base.dtype, device="meta"))
        view: Any = torch.Tensor._make_wrapper_subclass(
            QuantizedView, like.shape, strides=like.stride(),
            storage_offset=like.storage_offset(), dtype=base.dtype, device=base.device,
        )  # fmt: skip
        view.base, view.steps = base, steps
        return view  # type: ignore[no-any-return]

    def plain(self) -> Tensor:
        """Its values, a plain tensor."""
        return reduce(_taken, self.steps, self.base.dequantize())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """As a Tensor's; what is written into it is not written into the weight."""
        return self.plain().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        return self.plain().__dlpack__(**options)

    def tolist(self) -> Any:
        """As a Tensor's."""
        return self.plain().tolist()

    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


_TURNED = {_aten.t.default, _aten.transpose.int, _aten.permute.default}
"""Views that are given as plain tensors, for kernels take them: what is written there is lost."""


_HELD = QuantizedTensor, QuantizedView


def _origin(
    held: QuantizedTensor | QuantizedView,
) -> tuple[QuantizedTensor, tuple[Callable[[Tensor], Tensor], ...]]:
    """The weight, and the steps that make the view of its values; none for the weight itself."""
    return (held.base, held.steps) if isinstance(held, QuantizedView) else (held, ())


def _taken(x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    return step(x)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on weights that are quantized, or views of some, by their values."""
    own = args[0] if args else None
    if _is_view(func) and isinstance(own, _HELD):
        base, steps = _origin(own)

        def step(x: Tensor, k: int | None = None) -> Tensor:
            made: Any = func(x, *args[1:], **kwargs)
            return made if k is None else made[k]  # type: ignore[no-any-return]

        if func._schema.returns[0].type.kind() == "TensorType":
            return QuantizedView.of(base, *steps, step)
        count = len(func(torch.empty_like(own, device="meta"), *args[1:], **kwargs))
        return [QuantizedView.of(base, *steps, partial(step, k=k)) for k in range(count)]
    plain: dict[int, Tensor] = {}

    def read(value: Any) -> Any:
        if not isinstance(value, _HELD):
            return value
        base, steps = _origin(value)
        if id(base) not in plain:
            plain[id(base)] = base.dequantize()
        return reduce(_taken, steps, plain[id(base)])

    result = func(*tree_map(read, args), **tree_map(read, kwargs))
    written = list(_written(func, args, kwargs))
    for tensor in written:
        base, _ = _origin(tensor)
        base.write(plain[id(base)])
    return written[0] if len(written) == 1 and isinstance(result, Tensor) else result


def _is_view(func: Any) -> bool:
    """Whether an operation gives views of its first argument, and writes nothing."""
    given, taken = func._schema.returns, func._schema.arguments
    if not given or not taken or given[0].alias_info is None or func in _TURNED:
        return False
    first = taken[0].alias_info
    return first is not None and not first.is_write


_REMADE: dict[Any, Callable[..., Tensor]] = {
    _aten.detach.default: lambda held: type(held)(held.value, held.shape),
    _aten.alias.default: lambda held: type(held)(held.value, held.shape),
    _aten.clone.default: lambda held, **_: held._mapped(lambda part: part.clone()),
    _aten._to_copy.default: lambda held, **options: held._moved(**options),
}
"""What gives another QuantizedTensor, and not plain values."""


def _copies_of(x: Tensor, quantizer: Quantizer) -> Quantized:
    return quantizer(x, ("row",) if quantizer.shared else ("row", "col"))


def _parts(value: Quantized) -> Iterator[Tensor]:
    for copy in value[:2]:
        if copy is not None:
            yield from copy.parts


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[QuantizedTensor | QuantizedView]:
    """The arguments that an operation writes to."""
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[k] if k < len(args) else kwargs.get(argument.name)
        yield from (t for t in tree_flatten(value)[0] if isinstance(t, _HELD))


@contextmanager
def quantized_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Inside, weights of Linear, BasicLinear and LayerNormMLP are held in the recipe's format.

    recipe: by default `DelayedScaling()`; its weights have scales of their own here, made when they
    are written. preserve_high_precision_init_val: each weight keeps its first values on the CPU:
    `weight.get_high_precision_init_val()`, and `weight.clear_high_precision_init_val()` drops them.
    Their sizes must be given, and be multiples of what the format asks for.
    """
    if recipe is not None and not isinstance(recipe, Recipe):
        got = f"quantized_model_init: got recipe {recipe!r}"
        raise OpsgraphError(f"{got}, expected one of opsgraph.recipe")
    enabled = flag("quantized_model_init", "enabled", enabled)
    preserve = preserve_high_precision_init_val
    preserve = flag("quantized_model_init", "preserve_high_precision_init_val", preserve)
    before = active.init
    recipe = recipe or DelayedScaling()  # alive as long as its number is used
    key = recipe.key
    active.init = (key, preserve) if enabled else None
    try:
        yield
    finally:
        active.init = before


def hold(module: nn.Module, *names: str) -> None:
    """Quantize parameters that were just initialized, inside `quantized_model_init`."""
    if active.init is None:
        return
    key, preserve = active.init
    for name in names:
        weight = module._parameters[name]
        if weight is None or weight.is_meta or isinstance(weight, QuantizedTensor):
            continue
        held: Any = nn.Parameter(QuantizedTensor.of(weight, recipe_of(key).undelayed("weight")))
        held.requires_grad_(weight.requires_grad)
        if preserve:
            first = weight.detach().cpu()
            held.get_high_precision_init_val = lambda first=first: first
            held.clear_high_precision_init_val = lambda held=held: _clear(held)
        setattr(module, name, held)  # not past the hooks that mark parameters


def _clear(weight: Any) -> None:
    weight.get_high_precision_init_val = lambda: None
