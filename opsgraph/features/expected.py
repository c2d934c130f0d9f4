"""What a step should give, and how far a right one may be off: for `OPSGRAPH_CHECK=1`.

Two right implementations differ by rounding. How much, the size of a result does not tell: of a
sum whose terms cancel, little may be left but rounding. So each reference function runs also in
fp64, and some times more with every input moved by the rounding of its own dtype, up or down by
chance. A right step is no farther from the fp64 result than these, and than the reference itself,
times a factor for what is summed and rounded on the way.

Where something is quantized nothing runs in fp64. There what the step has computed before is moved
by a whole unit of its dtype, so that values are quantized the other way, by an eighth of their size
or a quarter: of a sum one such term may be nearly all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import Any

import torch
from torch import Tensor

from ..base.errors import OpsgraphError
from ..guards.torch_private import unreadable
from ..op import STORED, arguments

_MANY = 64
"""Elements from which on the mean error counts too: what is a little off everywhere shows there."""
MOVES = 3
"""How often all inputs are moved: by chance the terms of one sum may move against each other."""
_FACTORS = {torch.float64: 32.0, torch.float32: 32.0, torch.float16: 4.0, torch.bfloat16: 4.0}
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of the largest magnitude, where operands are quantized and nothing runs in fp64.

A tensor core adds FP8 products in about 14 bits, whatever dtype the sum is stored in: each 32 of
them may take 2^-13 off the largest sum on the way.
"""
_EITHER_WAY = 2.0
"""Times what shows where values are quantized the other way: by chance others are."""


@dataclass(frozen=True, eq=False)
class Expected:
    """A result of reference ops: as they compute it, in fp64, and in fp64 of moved inputs."""

    value: Any
    """A tensor, or a quantized one."""
    exact: Any
    moved: tuple[Any, ...]
    of: "Expected | None" = None
    """The rounded value whose amax it is, which may be off by as much as an element of that."""
    quantized: bool = False
    """Whether quantized operands had a part in it."""
    wide: bool = True
    """Whether `exact` and `moved` ran in fp64."""

    def to(self, dtype: torch.dtype) -> "Expected":
        """As a gradient is cast behind a sum of two dtypes."""
        return replace(self, value=self.value.to(dtype))


def run_reference(function: Callable[..., Any], *given: Any, **want: Any) -> Any:
    """What a reference function returns, with `Expected` in the place of tensors.

    Without `Expected` where operands are quantized, or fp64 is beyond the function. None of a
    function that adds into main_grad: it would add again.
    """
    if any(getattr(a, "accumulate_into_main_grad", False) for a in given):
        if any(name.endswith(STORED) for name in arguments(function)):
            return None
    values = [a.value if isinstance(a, Expected) else a for a in given]
    value = function(*values, **want)
    if any(map(_is_quantized, (*values, *_flat(value)))):
        return _of_quantized(function, value, given, want)
    try:
        exact = function(*map(_exact, given), **want)
        moved = [
            function(*(_moved(a, k, MOVES * place + k) for place, a in enumerate(given)), **want)
            for k in range(MOVES)
        ]
    except (RuntimeError, TypeError, NotImplementedError, OpsgraphError):
        return value
    after = any(isinstance(a, Expected) and a.quantized for a in given)
    return _joined(value, exact, moved, after)


def _of_quantized(
    function: Callable[..., Any], value: Any, given: Sequence[Any], want: dict[str, Any]
) -> Any:
    """What was returned, as `Expected` if it is of something that was computed before."""
    before = next((a for a in given if isinstance(a, Expected)), None)
    if before is None:
        return value
    moved = [
        function(*(_next(a, k, MOVES * place + k) for place, a in enumerate(given)), **want)
        for k in range(MOVES)
    ]
    match value:
        case (copies, (Tensor() as amax,)) if _is_quantized(copies):
            first = Expected(copies, copies, tuple(other[0] for other in moved), None, True, False)
            return first, (Expected(amax, amax.double(), (), before),)
    return _joined(value, value, moved, True, wide=False)


def _next(given: Any, k: int, seed: int) -> Any:
    """An argument whose elements, if it was computed before, are each next to what they were."""
    if not isinstance(given, Expected):
        return given
    if _is_quantized(given.value) or not _is_float(given.value):
        return given.moved[k] if given.moved else given.value
    unit = torch.finfo(given.value.dtype).eps  # of the value's first bit: one or two of its last
    wide = given.value.double() * (1 + unit * _ways(given.value, seed))
    return wide.to(given.value.dtype)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list) and not _is_quantized(value):
        return [part for item in value for part in _flat(item)]
    return [value]


def _is_quantized(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "row")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _exact(given: Any) -> Any:
    if isinstance(given, Expected):
        return given.exact
    return given.double() if _is_float(given) else given


def _moved(given: Any, k: int, seed: int) -> Any:
    """An argument in fp64, each element up or down by half a unit of its dtype, or one of fp64."""
    if not isinstance(given, Expected) and not _is_float(given):
        return given
    value = given.value if isinstance(given, Expected) else given
    wide = given.moved[k] if isinstance(given, Expected) else given.double()
    least = torch.finfo(torch.float64).eps  # half of it would move nothing
    return wide * (1 + _ways(wide, seed) * max(torch.finfo(value.dtype).eps / 2, least))


def _ways(x: Tensor, seed: int) -> Tensor:
    """1 or -1 for each element, by chance."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randint(2, x.shape, generator=generator, device=x.device).double() * 2 - 1


def _joined(value: Any, exact: Any, moved: list[Any], quantized: bool, wide: bool = True) -> Any:
    if _is_quantized(value):
        return Expected(value, exact, tuple(moved), None, quantized, wide)
    if isinstance(value, tuple | list):
        rest = zip(*moved, strict=True)
        parts = zip(value, exact, rest, strict=True)
        return tuple(_joined(v, e, list(m), quantized, wide) for v, e, m in parts)
    if not _is_float(value):
        return value
    others = tuple(m.double() for m in moved)
    return Expected(value, exact.double(), others, None, quantized, wide)


def compare(step: str, name: str, found: Any, expected: Any) -> None:
    """Raises OpsgraphError if a step's result is not what the reference ops give.

    Infinities and nans pass where the reference has them too, and an infinity where that has a nan:
    the mean of a row with an infinity may be either. Quantized values may differ where one fell on
    the other side of a rounding: 5% of the norm. Under torch.func.vmap nothing is compared: no
    value can be read there.
    """
    if isinstance(found, Tensor) and unreadable(found):
        return
    value = expected.value if isinstance(expected, Expected) else expected
    if _is_quantized(value):
        for one, other in zip(found[:2], value[:2], strict=True):
            if one is not None and other is not None:
                _compare_copies(step, name, one.dequantize(), other.dequantize())
        return
    if value is None:
        return
    if not isinstance(found, Tensor):
        _fail(step, name, f"is {found!r}, where the reference ops give {_spec(value)}")
    if (found.shape, found.dtype, found.device) != (value.shape, value.dtype, value.device):
        _fail(step, name, f"is {_spec(found)}, where the reference ops give {_spec(value)}")
    if not value.numel():
        return
    error, size = _error(found, expected, value), _largest(_finite(value.double()))
    measures = [_largest]
    if isinstance(expected, Expected) and value.numel() >= _MANY and not expected.quantized:
        measures.append(_mean)
    for measure in measures:
        if measure(error) > (allowed := _allowed(expected, value, measure)):
            text = f"differs from the reference ops by {_largest(error):.3g}"
            _fail(
                step, name, f"{text}, its largest magnitude being {size:.3g}; rounding explains "
                f"{allowed:.2g}{' on average' * (measure is _mean)}",
            )  # fmt: skip


def _error(found: Tensor, expected: Any, value: Tensor) -> Tensor:
    """Distances from the fp64 result or the reference; inf where only one is a nan."""
    wide, reference = found.double(), value.double()
    exact = expected.exact if isinstance(expected, Expected) else reference
    error = torch.fmin((wide - exact).abs(), (wide - reference).abs())
    same = (wide == reference) | (reference.isnan() & ~wide.isfinite())
    if value.is_floating_point():
        # One may overflow where the other is just below: both are the largest number or more.
        most = torch.finfo(value.dtype).max
        beyond = (wide.abs() >= most) & (exact.abs() >= most * (1 - torch.finfo(value.dtype).eps))
        same |= beyond & (wide.sign() == exact.sign())
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0)


def _allowed(expected: Any, value: Tensor, measure: Callable[[Tensor], float]) -> float:
    """How far a right result may be off: at most, or on average, as `measure` has it."""
    reference = value.double()
    low = _TOLERANCES.get(value.dtype, 0.0) * max(measure(_finite(reference)), 1e-3)
    if not isinstance(expected, Expected):
        return low
    if expected.of is not None:
        return _allowed(expected.of, expected.of.value, _largest)
    kind, exact = torch.finfo(value.dtype), expected.exact
    noise = max(measure(_finite(m - exact)) for m in expected.moved)
    rounding = measure(_finite(exact)) * kind.eps / 2 + kind.tiny
    parts = noise, measure(_finite(reference - exact)), rounding
    if measure is _mean:
        return _FACTORS[value.dtype] / 3 * hypot(*parts)
    if not expected.wide:
        return low + _EITHER_WAY * noise
    return _FACTORS[value.dtype] * sum(parts) + low * expected.quantized


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(x: Tensor) -> float:
    """The largest magnitude."""
    return float(x.abs().max()) if x.numel() else 0.0


def _mean(x: Tensor) -> float:
    """The quadratic mean."""
    return float(x.norm() / x.numel() ** 0.5)


def _compare_copies(step: str, name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        _fail(step, f"{name}, quantized,", f"is {_spec(found)}, not {_spec(expected)}")
    same = (found == expected) | (found.isnan() & expected.isnan())
    rest = (found - expected).masked_fill(same, 0)
    size = float(_finite(expected).norm())
    error = float(rest.norm())
    if not error <= 0.05 * size:
        text = f"differs from the reference ops by {error:.3g}, its norm being {size:.3g}"
        _fail(step, f"{name}, quantized,", text)


def _spec(x: Tensor) -> str:
    return f"a tensor {tuple(x.shape)} of {x.dtype} on {x.device}"


def _fail(step: str, name: str, what: str) -> None:
    raise OpsgraphError(f"OPSGRAPH_CHECK: {step}: {name} {what}")


LINE = 256


def compare_ranks(step: str, x: Tensor, group: str, group_size: int) -> None:
    """Raises OpsgraphError on every rank if ranks differ in the step or in x's shape or dtype.

    Each sends one line of text, cut to `LINE` bytes.
    """
    told = f"{tuple(x.shape)} {x.dtype} in {step}".encode().ljust(LINE)[:LINE]
    mine = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(x.device)
    ops = torch.ops._c10d_functional
    lines = ops.wait_tensor(ops.all_gather_into_tensor(mine, group_size, group)).view(-1, LINE)
    every = [bytes(line).decode(errors="replace").rstrip() for line in lines.tolist()]
    if len(set(every)) > 1:
        each = "; ".join(f"rank {rank} has {line}" for rank, line in enumerate(every))
        raise OpsgraphError(f"OPSGRAPH_CHECK: {step}: the ranks of group {group!r} differ: {each}")
