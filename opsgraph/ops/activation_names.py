"""Activations by name: TransformerEngine's names and transformers'."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from ..op import Op
from .activations import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    QGELU,
    ClampedSwiGLU,
    ClippedGELU,
    GatedActivation,
    Hardswish,
    LeakyReLU,
    Mish,
    ReGLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    SiTUGLU,
    SReGLU,
    SReLU,
    SwiGLU,
    Tanh,
)
from .elementwise import Identity

_KINDS: dict[str, type[Op]] = {
    "gelu": GELU,
    "geglu": GEGLU,
    "qgelu": QGELU,
    "qgeglu": QGEGLU,
    "relu": ReLU,
    "reglu": ReGLU,
    "srelu": SReLU,
    "sreglu": SReGLU,
    "silu": SiLU,
    "swiglu": SwiGLU,
    "glu": GLU,
    "clamped_swiglu": ClampedSwiGLU,
    "situglu": SiTUGLU,
}
_OF_TRANSFORMERS: dict[str, Callable[..., Op]] = {
    "gelu_python": partial(GELU, "none"),
    "gelu_new": GELU,
    "gelu_fast": GELU,
    "gelu_accurate": GELU,
    "gelu_pytorch_tanh": GELU,
    "gelu_python_tanh": GELU,
    "gelu_10": ClippedGELU,
    "quick_gelu": QGELU,
    "relu2": SReLU,
    "relu6": ReLU6,
    "leaky_relu": LeakyReLU,
    "swish": SiLU,
    "hardswish": Hardswish,
    "mish": Mish,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "linear": Identity,
}
ACTIVATIONS: dict[str, Callable[..., Op]] = _KINDS | _OF_TRANSFORMERS
"""Activations by the names that `LayerNormMLP(activation=...)` takes.

"gelu" is TransformerEngine's, the tanh form; transformers' "gelu", exact, is "gelu_python" too.
"""

GATED = frozenset(n for n, k in _KINDS.items() if issubclass(k, GatedActivation))


def keywords(name: str) -> tuple[str, ...]:
    """The arguments that an activation's constructor takes, those of its bases among them."""
    made = ACTIVATIONS[name]
    kind: Any = made.func if isinstance(made, partial) else made
    found: dict[str, None] = {}
    for base in kind.__mro__[: kind.__mro__.index(Op)]:
        for argument, parameter in signature(base).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found[argument] = None
    return tuple(found)
