"""Linear layers, norms and activations, known by what they compute and not by their names."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...features.convert import is_untouched
from ...op import Op
from ...ops.activations import (
    GELU,
    QGELU,
    ClippedGELU,
    Hardswish,
    LeakyReLU,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    SReLU,
    Tanh,
)  # fmt: skip
from ...ops.linear import Linear
from ...ops.norms import LayerNorm, RMSNorm
from ...ops.transposed import TransposedLinear
from ...ops.xielu import XIELU

_EPS = 1e-5, 1e-6, 1e-8, 1e-12, 1e-7, 0.0
_BIAS = "bias", "beta", "b"
ACTIVATIONS: tuple[tuple[type[Op], tuple[Any, ...]], ...] = (
    (SiLU, ()), (GELU, ("none",)), (GELU, ()), (QGELU, ()), (ReLU, ()), (SReLU, ()), (ReLU6, ()),
    (Hardswish, ()), (Mish, ()), (ClippedGELU, ()), (Sigmoid, ()), (Tanh, ()), (LeakyReLU, ()),
    (LeakyReLU, (0.2,)), (LeakyReLU, (0.1,)),
)  # fmt: skip
_ROUNDINGS = None, "input", "weight"
_GAINS: tuple[dict[str, Any], ...] = (
    {}, {"zero_centered_gamma": True}, {"zero_centered_gamma": True, "round_gamma": True}
)  # fmt: skip
_DTYPES = (
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
)  # fmt: skip
_WIDEST = 65536
"""Numbers above it are not tried as the size of a norm's rows."""
_NEARLY = 0.02
"""The share of 16-bit results that may differ, by the order of a sum: roundings change 0.2."""


@dataclass
class Leaf:
    """What a module computes.

    kind: "linear", "norm" or "activation". names: its parameters, by those of the op.
    """

    kind: str
    op: type[Op]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    names: dict[str, str]
    width: int | None = None
    """Of what it takes; None for any."""

    def make(self) -> Any:
        """The op, without parameters."""
        return self.op(*self.arguments, **self.options)


class Refused(Exception):
    """A module that looks like a leaf, and why it is none."""


def leaf_of(module: nn.Module, known: dict[Any, Any]) -> Leaf | None:
    """What a module computes; None for one that is no leaf.

    known: keeps what was found for modules of one class with equal attributes. Raises Refused for
    a module that looks like one, and is not.
    """
    if any(child is not None for child in module._modules.values()):
        if isinstance(module, nn.Linear) or "weight" in dir(type(module)):
            raise Refused(f"a {type(module).__name__} has modules inside, as adapters do")
        return None
    parameters: dict[str, Tensor] = {n: p for n, p in module._parameters.items() if p is not None}
    shapes = [tuple(p.shape) for p in parameters.values()]
    flat = all(len(shape) == 1 and shape == shapes[0] for shape in shapes)
    is_linear = [len(s) for s in shapes] in ([2], [2, 1]) and next(iter(parameters)) == "weight"
    if not (is_linear or (flat and len(parameters) <= 2)) or isinstance(module, nn.Embedding):
        return None
    if not parameters and isinstance(module, nn.Dropout | nn.Identity | nn.ModuleList):
        return None
    if not parameters and any(
        module is v for v in vars(sys.modules[type(module).__module__]).values()
    ):
        return None  # a module of all models, as transformers' gelu
    if any(not p.is_floating_point() for p in parameters.values()):
        raise Refused("its weight is quantized")
    buffers = {n: b for n, b in module._buffers.items() if b is not None}
    if buffers and (set(buffers) != {"beta", "eps"} or set(parameters) != {"alpha_p", "alpha_n"}):
        return None
    if not is_untouched(module):
        raise Refused("it has hooks or a forward of its own")
    attributes = {
        k: v for k, v in module.__dict__.items()
        if isinstance(v, int | float | str | bool | torch.dtype | tuple | type(None))
        and k != "training"
    }  # fmt: skip
    others = [id(v) for k, v in module.__dict__.items() if k not in attributes and k[0] != "_"]
    dtypes = [p.dtype for p in parameters.values()]
    held = [b.item() for b in buffers.values()]
    key = (
        type(module),
        *held,
        *map(repr, attributes.items()),
        *shapes,
        *dtypes,
        *others,
        *parameters,
    )
    if key not in known:
        with torch.no_grad():
            known[key] = _found(module, parameters, is_linear)
    return known[key]  # type: ignore[no-any-return]


def _found(module: nn.Module, parameters: dict[str, Tensor], is_linear: bool) -> Leaf | None:
    if is_linear:
        return _linear(module, parameters)
    if module._buffers:
        return _xielu(module)
    if not parameters and (found := _activation(module)) is not None:
        return found
    return _norm(module, parameters)


def _linear(module: nn.Module, parameters: dict[str, Tensor]) -> Leaf | None:
    weight = parameters["weight"]
    bias = next((name for name in parameters if name != "weight"), None)
    names = {"weight": "weight"} | ({} if bias is None else {"bias": bias})
    if type(module) is nn.Linear:
        out, width = weight.shape
        options = {"bias": bias is not None, "device": "meta"}
        return Leaf("linear", Linear, (width, out), options, names, width)
    for kind in (Linear, TransposedLinear):
        matrix = weight if kind is Linear else weight.t()
        out, width = matrix.shape
        probe = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
        x = probe.to(weight.device, weight.dtype)
        try:
            y = module(x)
        except Exception:  # whatever it raises, it is no linear layer of this layout
            continue
        z = functional.linear(x, matrix, None if bias is None else parameters[bias])
        near = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 0.02
        same = type(y) is Tensor and y.shape == z.shape and y.dtype == z.dtype
        if same and torch.allclose(y.double(), z.double(), near, near * float(z.abs().max())):
            options = {"bias": bias is not None, "device": "meta"}
            return Leaf("linear", kind, (width, out), options, names, width)
    return None


def _plain(op: Any, x: Tensor) -> Tensor:
    kernel, params, _ = op.function
    return op.fwd(x, kernel, params)[0]  # type: ignore[no-any-return]


def _activation(module: nn.Module) -> Leaf | None:
    x = torch.cat([torch.linspace(-14, 14, 561), torch.tensor([-90.0, 50.0, 1e-3])])
    x = x.reshape(2, 6, 47)
    given = x.clone()
    try:
        y = module(given)
    except Exception:  # whatever it raises, it is no activation
        return None
    if not torch.equal(given, x):
        raise Refused("it changes its input in place")
    if type(y) is not Tensor or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for op, arguments in ACTIVATIONS:
        if torch.allclose(y.double(), _plain(op(*arguments), x.double()), rtol=1e-4, atol=2e-6):
            return Leaf("activation", op, arguments, {}, {})
    return None


def _xielu(module: nn.Module) -> Leaf | None:
    constants = [float(module._buffers[name]) for name in ("beta", "eps")]  # type: ignore[arg-type]
    arguments = 0.8, max(0.8, 2 * constants[0]), *constants
    op: Any = XIELU(*arguments, device="meta")
    x = torch.linspace(-14, 14, 561)
    values = [module._parameters[name] for name in ("alpha_p", "alpha_n")]
    if not _near(module(x), op.fwd(x, *values, *constants)[0], 1e-4):
        return None
    names = {"alpha_p": "alpha_p", "alpha_n": "alpha_n"}
    return Leaf("activation", XIELU, arguments, {"device": "meta"}, names)


def _norm(module: nn.Module, parameters: dict[str, Tensor]) -> Leaf | None:
    names: dict[str, str] = {}
    for name in parameters:
        names["bias" if name in _BIAS else "weight"] = name
    if len(names) != len(parameters) or ("weight" not in names and parameters):
        return None
    for own in _widths(module, parameters):
        width = 48 if own is None else own
        rows, values = _probe(width, names)
        exact = _run(module, names, values, rows, torch.float32)
        if exact is not None:
            break
    else:
        return None
    runs = [(d, _run(module, names, _cast(values, w), rows.to(d), w)) for d, w in _DTYPES]
    found: Any
    for found in _settings(module, width, values):
        if _near(exact, _op_run(found, values, rows), 2e-5) and all(
            y is None or _near(y, _op_run(found, _cast(values, w), rows.to(d)), 0.02)
            for (_, w), (d, y) in zip(_DTYPES, runs, strict=True)
        ):
            return Leaf("norm", type(found), (own, found.eps), _options(found), names, own)
    return None


def _widths(module: nn.Module, parameters: dict[str, Tensor]) -> Iterator[int | None]:
    """Widths that a norm may take: its parameters', else any, or a size that it holds."""
    if parameters:
        yield len(next(iter(parameters.values())))
        return
    yield None
    for value in module.__dict__.values():
        size = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        if type(size) is int and 1 < size <= _WIDEST:
            yield size


def _probe(width: int, names: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows `[3, 16, width]`, and values of parameters."""
    probe = torch.Generator().manual_seed(0)
    rows = torch.randn(48, width, generator=probe) + 0.3
    for k, size in enumerate((30, 1e-2, 1e-3, 1e-4)):
        rows[8 * k : 8 * k + 8] *= size
    values = {n: torch.randn(width, generator=probe) * 0.3 + 0.7 for n in names}
    return rows.view(3, 16, width), values  # of norms over another dimension, none takes it


def _settings(module: nn.Module, width: int, values: dict[str, Tensor]) -> Iterator[Op]:
    own = [v for v in module.__dict__.values() if type(v) is float and 0 <= v < 0.01]
    kinds = (LayerNorm,) if "bias" in values else (RMSNorm, LayerNorm)
    affine = {"elementwise_affine": bool(values), "device": "meta"}
    gains = _GAINS if values else _GAINS[:1]
    roundings = _ROUNDINGS if values else _ROUNDINGS[:2]
    for eps, kind, gain, rounding in product(dict.fromkeys((*own, *_EPS)), kinds, gains, roundings):
        bias = {} if kind is RMSNorm else {"bias": "bias" in values}
        yield kind(width, eps, normalized_dtype=rounding, **gain, **affine, **bias)


def _options(op: Any) -> dict[str, Any]:
    names = "normalized_dtype", "zero_centered_gamma", "round_gamma", "elementwise_affine"
    bias = {"bias": op.bias is not None} if isinstance(op, LayerNorm) else {}
    return {name: getattr(op, name) for name in names} | bias | {"device": "meta"}


def _cast(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in values.items()}


def _run(
    module: nn.Module, names: dict[str, str], values: dict[str, Tensor], x: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """What a module makes of rows with other values for its parameters, None if it raises."""
    given = {theirs: values[own].to(dtype) for own, theirs in names.items()}
    try:
        y = torch.func.functional_call(module, given, (x,))
    except Exception:  # such as a mixture of dtypes that it does not take
        return None
    return y if type(y) is Tensor and y.shape == x.shape else None


def _op_run(op: Any, values: dict[str, Tensor], x: Tensor) -> Tensor:
    parameters = [values.get(name) for name in op.names]
    gamma = op.constant("zero_centered_gamma", None)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = op.fwd(rows, *parameters, op.eps, gamma, op.normalized_dtype)[0]
    return y.view(x.shape)


def _near(y: Tensor, z: Tensor, tolerance: float) -> bool:
    if y.dtype != z.dtype or y.shape != z.shape:
        return False
    if not torch.allclose(y.double(), z.double(), rtol=tolerance, atol=tolerance / 10):
        return False
    return y.dtype != torch.bfloat16 or bool((y != z).double().mean() <= _NEARLY)
