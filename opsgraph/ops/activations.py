"""Activations, computed in fp32: many names, and two kinds, `Activation` and `GatedActivation`.

A class with a name is its kind with other constants, so that what computes the kind computes each
of them. Gated ones halve the width: `y = f(a) * b`, a the first half.

That order is the opposite of `torch.nn.functional.glu`'s; `gate_second` turns it round. With
`glu_interleave_size=n` gate and value alternate in blocks of n columns instead. Of 16-bit inputs y
is rounded once; with `round_gate` where eager PyTorch rounds `f(a) * b`: f(a), then the product,
and in the backward `dy * b` before f' multiplies it. cache_quantized_input is TransformerEngine's
hint to keep the input in FP8: plans keep what they need in the dtype it has, and it changes
nothing.
"""

from collections.abc import Iterable
from math import isfinite
from typing import Any

from torch import Tensor

from ..base.errors import OpError
from ..guards.validation import Checked, choice, flag, number, positive, size
from ..kernels.reference import activations as reference
from ..kernels.reference.activations import Form
from ..op import Op, Spec

APPROXIMATIONS = ("tanh", "none", "fast")
Params = tuple[float, ...]
Function = tuple[str, Params, int | None]
"""kernel, with the words of `Form` after it, params and glu_interleave_size."""


def _approximation(who: str, name: str, value: Any) -> Any:
    return choice(who, name, value, APPROXIMATIONS)


def _limit(who: str, name: str, value: Any) -> float:
    return number(who, name, value, "a number, 0 or above", lambda limit: limit >= 0)


def _finite(who: str, name: str, value: Any) -> float:
    return number(who, name, value, "a finite number", isfinite)


class AnyActivation(Op):
    """What both kinds share: the function is a constant, and its parameters are part of it."""

    constants = ("kernel", "params", "glu_interleave_size", "function")
    kernel: str
    params: Params = ()
    glu_interleave_size: int | None = None

    def __init__(self, *, cache_quantized_input: bool = False) -> None:
        super().__init__()
        who = type(self).__name__
        self.cache_quantized_input = flag(who, "cache_quantized_input", cache_quantized_input)

    @property
    def kind(self) -> str:
        """The kernel's name and words, as kernels take them."""
        return str(Form(self.kernel, steps=getattr(self, "round_steps", False)))

    @property
    def function(self) -> Function:
        """The three together, as kernels take them."""
        return self.kind, self.params, self.glu_interleave_size

    def constant(self, name: str, x: Spec) -> Any:
        return self.kind if name == "kernel" else super().constant(name, x)

    def fwd(
        self, x: Tensor, kernel: str, params: Params = (), glu_interleave_size: int | None = None
    ) -> tuple[Tensor, tuple[()]]:
        return reference.activation_forward(x, kernel, params, glu_interleave_size), ()

    def bwd(
        self, dy: Tensor, x: Tensor, kernel: str, params: Params = (),
        glu_interleave_size: int | None = None,
    ) -> tuple[Tensor, tuple[()]]:  # fmt: skip
        return reference.activation_backward(dy, x, kernel, params, glu_interleave_size), ()

    @classmethod
    def sample(cls) -> Iterable[Op]:
        if hasattr(cls, "kernel"):
            return (cls(),)
        named = (kind for kind in cls.__subclasses__() if kind.__module__ == cls.__module__)
        return [op for kind in named for op in kind.sample()]


class Activation(AnyActivation):
    """`y = f(x)`, elementwise; `kernel` and `params` name f in every backend."""

    keeps_width = True

    @property
    def function(self) -> Function:
        """No gate alternates with a value, whatever attribute someone has set."""
        return self.kind, self.params, None

    def out(self, x: Spec) -> Spec:
        return x


class GatedActivation(AnyActivation):
    """`y = f(a) * g(b)` of `[*, 2 * width]`; `kernel` and `params` name f and g everywhere."""

    round_gate = Checked(flag)
    gate_second = Checked(flag)

    def __init__(
        self,
        glu_interleave_size: int | None = None,
        *,
        round_gate: bool = False,
        gate_second: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        name = "glu_interleave_size"
        self.glu_interleave_size = size(type(self).__name__, name, glu_interleave_size)
        self.round_gate, self.gate_second = round_gate, gate_second

    @property
    def kind(self) -> str:
        words = {"rounded": self.round_gate, "second": self.gate_second}
        words |= {"after": getattr(self, "clamp_after", False)}
        return str(Form(self.kernel, steps=getattr(self, "round_steps", False), **words))

    @property
    def pieces(self) -> int:
        """Into how many pieces, one after the other, its input falls: gate and value."""
        return 1 if self.glu_interleave_size else 2

    def reject(self, x: Spec) -> str | None:
        name = "glu_interleave_size"  # which may have been set since construction
        period = 2 * (size(type(self).__name__, name, self.glu_interleave_size) or 1)
        if x.width % period:
            return f"got input width {x.width}, expected a multiple of {period}"
        return None

    def width_before(self, out_width: int) -> int | None:
        return 2 * out_width

    def extra_repr(self) -> str:
        names = "glu_interleave_size", "round_gate", "gate_second"
        return ", ".join(f"{name}={value}" for name in names if (value := getattr(self, name)))

    def out(self, x: Spec) -> Spec:
        return x.like(x.width // 2)


class _Composed:
    """What functions share that models compose of several of PyTorch's operations.

    round_steps: in 16 bits y is rounded after each of them, as transformers' gelu_new ("tanh"),
    gelu_fast ("fast"), gelu_python ("none") and quick_gelu are; the gradient is that of f.
    """

    round_steps = Checked(flag)

    def __init__(self, *args: Any, round_steps: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.round_steps = round_steps


class GELU(_Composed, Activation):
    """`0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))`; exact (erf) with "none".

    "fast" is tanh's, multiplied out in another order, which `round_steps` tells apart.
    """

    approximate = Checked(_approximation)

    def __init__(self, approximate: str = "tanh", **options: Any) -> None:
        super().__init__(**options)
        self.approximate = approximate

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return {"tanh": "gelu", "none": "gelu_erf"}.get(self.approximate, "gelu_fast")

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(), cls("none"), cls("fast", round_steps=True)


class QGELU(_Composed, Activation):
    """`x * sigmoid(1.702 * x)`"""

    kernel = "qgelu"


class ReLU(Activation):
    """`max(x, 0)`"""

    kernel = "relu"


class SReLU(Activation):
    """`max(x, 0)^2`"""

    kernel = "srelu"


class SiLU(Activation):
    """`x * sigmoid(x)`"""

    kernel = "silu"


class Sigmoid(Activation):
    """`sigmoid(x)`"""

    kernel = "sigmoid"


class Tanh(Activation):
    """`tanh(x)`"""

    kernel = "tanh"


class ReLU6(Activation):
    """`min(max(x, 0), 6)`"""

    kernel = "relu6"


class Hardswish(Activation):
    """`x * min(max(x + 3, 0), 6) / 6`"""

    kernel = "hardswish"


class Mish(Activation):
    """`x * tanh(log(1 + exp(x)))`"""

    kernel = "mish"


class LeakyReLU(Activation):
    """`x` where it is above 0, else `negative_slope * x`, that finite."""

    kernel = "leaky_relu"
    negative_slope = Checked(_finite)

    def __init__(self, negative_slope: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.negative_slope = negative_slope

    @property
    def params(self) -> Params:  # type: ignore[override]
        return (self.negative_slope,)


class ClippedGELU(Activation):
    """GELU, exact (erf), clamped to `-limit` and limit. Gradients are 0 beyond it."""

    kernel = "gelu_clipped"
    limit = Checked(_limit)

    def __init__(self, limit: float = 10.0, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    @property
    def params(self) -> Params:  # type: ignore[override]
        return (self.limit,)


class GEGLU(_Composed, GatedActivation):
    """`gelu(a) * b`; approximate and round_steps: as GELU's."""

    approximate = Checked(_approximation)

    def __init__(
        self, approximate: str = "tanh", glu_interleave_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(glu_interleave_size, **options)
        self.approximate = approximate

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return {"tanh": "geglu", "none": "geglu_erf"}.get(self.approximate, "gelu_fast gated")

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(), cls("none")


class QGEGLU(_Composed, GatedActivation):
    """`a * sigmoid(1.702 * a) * b`"""

    kernel = "qgeglu"


class ReGLU(GatedActivation):
    """`max(a, 0) * b`"""

    kernel = "reglu"


class SReGLU(GatedActivation):
    """`max(a, 0)^2 * b`"""

    kernel = "sreglu"


class SwiGLU(GatedActivation):
    """`a * sigmoid(a) * b`"""

    kernel = "swiglu"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(), cls(glu_interleave_size=4), cls(round_gate=True, gate_second=True)


class GLU(GatedActivation):
    """`sigmoid(a) * b`"""

    kernel = "glu"


class ClampedSwiGLU(_Composed, GatedActivation):
    """`a' * sigmoid(alpha * a') * b'` with both halves clamped.

    `a' = min(a, limit)`, `b' = clamp(b, -limit, limit) + glu_linear_offset`.
    Gradients pass at the limit and are 0 beyond it. clamp_after: the gate is clamped when it is
    made, `min(a * sigmoid(alpha * a), limit)`.
    """

    kernel = "clamped_swiglu"
    clamp_after = Checked(flag)
    limit = Checked(_limit)
    alpha = Checked(_finite)
    glu_linear_offset = Checked(_finite)

    def __init__(
        self,
        limit: float = 7.0,
        alpha: float = 1.702,
        glu_linear_offset: float = 1.0,
        glu_interleave_size: int | None = None,
        *,
        clamp_after: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(glu_interleave_size, **options)
        self.limit, self.alpha, self.glu_linear_offset = limit, alpha, glu_linear_offset
        self.clamp_after = clamp_after

    @property
    def params(self) -> Params:  # type: ignore[override]
        return self.limit, self.alpha, self.glu_linear_offset

    @classmethod
    def sample(cls) -> Iterable[Op]:
        clamped = cls(limit=1.0, alpha=1.0, glu_linear_offset=0.0, clamp_after=True)
        return cls(), clamped, cls(round_steps=True, round_gate=True)


class SiTUGLU(GatedActivation):
    """`beta1 * tanh(a / beta1) * sigmoid(a) * beta2 * tanh(b / beta2)`, betas finite, above 0."""

    kernel = "situglu"
    beta1 = Checked(positive)
    beta2 = Checked(positive)

    def __init__(
        self,
        beta1: float = 4.0,
        beta2: float = 25.0,
        glu_interleave_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(glu_interleave_size, **options)
        self.beta1, self.beta2 = beta1, beta2

    @property
    def params(self) -> Params:  # type: ignore[override]
        return self.beta1, self.beta2


class Gated(GatedActivation):
    """`f(a) * b`, f an activation of one of the classes that gate nothing: `Gated(ReLU6())`."""

    def __init__(
        self, activation: Activation, glu_interleave_size: int | None = None, **options: Any
    ) -> None:
        if not isinstance(activation, Activation):
            got = f"activation {type(activation).__name__}"
            raise OpError("Gated", got, "an activation that is not gated, as ReLU6()")
        super().__init__(glu_interleave_size, **options)
        self.kernel, self.params = f"{activation.kernel} gated", activation.params
        self.round_steps = getattr(activation, "round_steps", False)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(Tanh()), cls(LeakyReLU(0.2), round_gate=True)
