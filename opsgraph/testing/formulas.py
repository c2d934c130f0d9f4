"""What every op means: fp64 and plain autograd, with nothing from the ops' own `fwd`.

`run` interprets a Sequential. Only the dropout mask comes from the package: which elements are kept
is not a formula. `tests/kernels` checks that mask.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.reference.dropout import keep_mask
from ..layernorm_mlp import LayerNormMLP
from ..op import Op
from ..ops.activation_names import ACTIVATIONS

Parameters = Mapping[str, Tensor]
Formula = Callable[[Any, Tensor, Callable[[str], Any]], Tensor]


def with_limits(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function that is 0 and level at -inf, and x at inf, where its formula says NaN."""
    y = function(torch.where(x.isinf(), 0, x))
    return torch.where(x == math.inf, x, torch.where(x == -math.inf, 0, y))


def gelu(x: Tensor, approximate: str) -> Tensor:
    """In fp64, which is to be exact, nothing cancels far below 0; in others as PyTorch has it."""
    exact, factor = x.dtype == torch.float64, math.sqrt(2 / math.pi)

    def twice_normal(x: Tensor) -> Tensor:
        if approximate == "none":
            z = x / math.sqrt(2)
            return torch.special.erfc(-z) if exact else 1 + torch.erf(z)
        u = factor * (x + 0.044715 * x**3)
        return 2 * torch.sigmoid(2 * u) if exact else 1 + torch.tanh(u)

    return with_limits(lambda x: 0.5 * x * twice_normal(x), x)


def halves(op: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and value: the first and second half, or blocks of `glu_interleave_size` in turn."""
    block = op.glu_interleave_size or max(1, x.shape[-1] // 2)
    gate = torch.arange(x.shape[-1], device=x.device) // block % 2 == op.gate_second
    return x[..., gate], x[..., ~gate]


def gated(function: Callable[[Any, Tensor], Tensor]) -> Formula:
    """`act(a) * b`"""

    def formula(op: Any, x: Tensor, get: Any) -> Tensor:
        a, b = halves(op, x)
        return function(op, a) * b

    return formula


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """The gradient passes at a bound; torch.clamp's does up to PyTorch 2.13, and is 0 since."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def clamped_swiglu(op: Any, x: Tensor, get: Any) -> Tensor:
    limit, alpha, offset = op.params
    a, b = halves(op, x)
    b = clamp(b, -limit, limit) + offset
    if op.clamp_after:
        gate = clamp(a * torch.sigmoid(alpha * a), -math.inf, limit)
    else:
        a = clamp(a, -math.inf, limit)
        gate = a * torch.sigmoid(alpha * a)
    y: Tensor = gate * b
    return y


def situglu(op: Any, x: Tensor, get: Any) -> Tensor:
    beta1, beta2 = op.params
    a, b = halves(op, x)
    gate = beta1 * torch.tanh(a / beta1) * torch.sigmoid(a)
    y: Tensor = gate * beta2 * torch.tanh(b / beta2)
    return y


def affine(op: Any, x: Tensor, get: Any) -> Tensor:
    """`x * gamma + beta`, each where there is one; `1 + gamma` if it is zero-centred."""
    gamma, beta = get("weight"), get("bias")
    if gamma is not None:
        x = x * (1 + gamma if op.zero_centered_gamma else gamma)
    return x if beta is None else x + beta


def rmsnorm(op: Any, x: Tensor, get: Any) -> Tensor:
    """`eps=None` is the epsilon of the dtype that statistics have: at least fp32."""
    eps = op.eps
    if eps is None:
        eps = torch.finfo(torch.promote_types(op.weight.dtype, torch.float32)).eps
    return affine(op, x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps), get)


def layernorm(op: Any, x: Tensor, get: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return affine(op, centred * torch.rsqrt(variance + op.eps), get)


def l2normalization(op: Any, x: Tensor, get: Any) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + op.eps)


def linear(op: Any, x: Tensor, get: Any) -> Tensor:
    y: Tensor = x @ get("weight").T
    bias = get("bias")
    return y if bias is None else y + bias


def transposed_linear(op: Any, x: Tensor, get: Any) -> Tensor:
    """The weight is `[in, out]`."""
    return linear(op, x, turned(get))


def turned(get: Callable[[str], Any]) -> Callable[[str], Any]:
    """Parameters of a layer whose weight is transposed, as those of the layer whose is not."""
    return lambda name: get(name).mT if name == "weight" else get(name)


def grouped_linear(op: Any, x: Tensor, get: Callable[[str], Any], sizes: Sequence[int]) -> Tensor:
    """Rows of each group by its own weight. x: `[*, in_features]`; sizes: rows of each group.

    get: gives a parameter by its name, None where there is none. Returns `[*, out_features]`.
    """
    weights, biases = (_of_groups(op, name, get) for name in ("weight", "bias"))
    if isinstance(op, ops.TransposedGroupedLinear):
        weights = [weight.T for weight in weights]
    found = [
        rows @ weight.T if bias is None else rows @ weight.T + bias
        for rows, weight, bias in zip(
            x.flatten(0, -2).split(list(sizes)), weights, biases, strict=True
        )
    ]
    return torch.cat(found).reshape(*x.shape[:-1], op.out_features)


def _of_groups(op: Any, name: str, get: Callable[[str], Any]) -> list[Any]:
    whole = get(name)
    return [get(f"{name}{g}") if whole is None else whole[g] for g in range(op.num_groups)]


def dropout(op: Any, x: Tensor, get: Any) -> Tensor:
    """The seed is drawn as the op draws it: once for each call, in the order of the sequence."""
    if not op.training or op.p == 0:
        return x
    seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    rows = x.numel() // max(1, x.shape[-1])
    keep = keep_mask(seed, rows, x.shape[-1], op.p).view(x.shape)
    return torch.where(keep, x / (1 - op.p), 0) if op.p < 1 else torch.zeros_like(x) * x


def relu(x: Tensor) -> Tensor:
    """The gradient at 0 is 0; a NaN is kept."""
    return torch.where(x <= 0, 0, x)


def xielu(op: Any, x: Tensor, get: Any) -> Tensor:
    """transformers' formula; min's gradient at a tie is not compared."""
    p = torch.nn.functional.softplus(get("alpha_p"))
    n = op.beta + torch.nn.functional.softplus(get("alpha_n"))
    below = torch.expm1(torch.where(x > op.eps, op.eps, x)) - x
    y: Tensor = torch.where(x > 0, p * x * x, n * below) + op.beta * x
    return y


def relu6(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, torch.where(x >= 6, 6, x))


def hardswish(x: Tensor) -> Tensor:
    """The gradient at -3 is 0, at 3 it is 1.5."""
    return x * torch.where(x <= -3, 0, torch.where(x > 3, 6, x + 3)) / 6


def leaky(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def gated_by(op: Any, a: Tensor, b: Tensor) -> Tensor:
    name = op.kernel.removesuffix(" gated")
    act = {"tanh": torch.tanh, "leaky_relu": lambda a: leaky(a, *op.params)}[name](a)
    return act * b


def silu(x: Tensor) -> Tensor:
    return with_limits(lambda x: x * torch.sigmoid(x), x)


def qgelu(x: Tensor) -> Tensor:
    return with_limits(lambda x: x * torch.sigmoid(1.702 * x), x)


FORMULAS: dict[type[nn.Module], Formula] = {
    ops.GELU: lambda op, x, get: gelu(x, op.approximate),
    ops.QGELU: lambda op, x, get: qgelu(x),
    ops.ReLU: lambda op, x, get: relu(x),
    ops.SReLU: lambda op, x, get: relu(x) ** 2,
    ops.SiLU: lambda op, x, get: silu(x),
    ops.GEGLU: gated(lambda op, a: gelu(a, op.approximate)),
    ops.QGEGLU: gated(lambda op, a: qgelu(a)),
    ops.ReGLU: gated(lambda op, a: relu(a)),
    ops.SReGLU: gated(lambda op, a: relu(a) ** 2),
    ops.SwiGLU: gated(lambda op, a: silu(a)),
    ops.GLU: gated(lambda op, a: torch.sigmoid(a)),
    ops.ClampedSwiGLU: clamped_swiglu,
    ops.LayerScale: lambda op, x, get: x * get("weight"),
    ops.XIELU: xielu,
    ops.Sigmoid: lambda op, x, get: torch.sigmoid(x),
    ops.Tanh: lambda op, x, get: torch.tanh(x),
    ops.ReLU6: lambda op, x, get: relu6(x),
    ops.Hardswish: lambda op, x, get: hardswish(x),
    ops.Mish: lambda op, x, get: x * torch.tanh(torch.nn.functional.softplus(x)),
    ops.LeakyReLU: lambda op, x, get: leaky(x, op.negative_slope),
    ops.ClippedGELU: lambda op, x, get: clamp(gelu(x, "none"), -op.limit, op.limit),
    ops.Gated: lambda op, x, get: gated_by(op, *halves(op, x)),
    ops.SiTUGLU: situglu,
    ops.RMSNorm: rmsnorm,
    ops.LayerNorm: layernorm,
    ops.L2Normalization: l2normalization,
    ops.BasicLinear: linear,
    ops.Linear: linear,
    ops.TransposedLinear: transposed_linear,
    ops.Bias: lambda op, x, get: x + get("bias"),
    ops.ConstantScale: lambda op, x, get: op.scale * x,
    ops.Identity: lambda op, x, get: x,
    ops.Dropout: dropout,
}
"""The rest, Tee, Add and their like, Residual, and Reshape (a plain module), are `run`'s."""
ADDS = ops.Add, ops.ScaledAdd, ops.WeightedAdd


def _steps(modules: Mapping[str, nn.Module | None], prefix: str) -> Iterator[tuple[str, Any]]:
    """`(prefix of its parameters, module)` of each step; a Residual is `"push"`, ..., itself."""
    for name, module in modules.items():
        if isinstance(module, ops.Residual):
            yield "", "push"
            yield from _steps(module.ops._modules, f"{prefix}{name}.ops.")
            yield "", module
        else:
            yield f"{prefix}{name}.", module


def _channel(step: Any) -> str | None:
    named: str | None = next(iter(step.channels.values()), None)
    return named


def run(
    module: nn.Module,
    x: Tensor,
    parameters: Parameters,
    extra: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Returns y and the extra outputs of a Sequential or a LayerNormMLP.

    parameters: by their names in the module's state dict. extra: called with the value at an Add
    that no Tee serves, it returns the extra input.
    """
    if isinstance(module, LayerNormMLP):
        return layernorm_mlp(module, x, parameters)
    steps = list(_steps(module._modules, ""))
    reads = [(i, _channel(step)) for i, (_, step) in enumerate(steps) if isinstance(step, ADDS)]
    channels: dict[str | None, Tensor] = {}
    stack: list[Tensor] = []
    outputs: list[Tensor] = []
    for i, (prefix, step) in enumerate(steps):
        if step == "push":
            stack.append(x)
        elif isinstance(step, ops.Residual):
            x = step.residual_scale * stack.pop() + step.scale * x
        elif isinstance(step, ops.Tee):
            name = _channel(step)
            if name is not None:
                channels[name] = x
            read = name is not None and any(j > i and name == other for j, other in reads)
            if step.to_caller or not read:
                outputs.append(x)
        elif isinstance(step, ADDS):
            name = _channel(step)
            assert name in channels or extra is not None, "an Add without a Tee"
            other = channels[name] if name in channels else extra(x)  # type: ignore[misc]
            if isinstance(step, ops.WeightedAdd):
                other = other * parameters[f"{prefix}weight"]
            x = x + (step.scale * other if isinstance(step, ops.ScaledAdd) else other)
        elif isinstance(step, Op):
            x = FORMULAS[type(step)](step, x, lambda name, p=prefix: parameters.get(p + name))  # type: ignore[misc]
        else:
            own = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
            if isinstance(step, LayerNormMLP):
                x, _ = layernorm_mlp(step, x, own)
            else:
                x = torch.func.functional_call(step, own, (x,))
    return x, outputs


def layernorm_mlp(module: Any, x: Tensor, parameters: Parameters) -> tuple[Tensor, list[Tensor]]:
    """A LayerNormMLP's out, and the rest that it returns."""

    def get(prefix: str) -> Callable[[str], Any]:
        return lambda name: parameters.get(prefix + name)

    norm = {"LayerNorm": layernorm, "RMSNorm": rmsnorm}[module.normalization]
    normed = norm(module, x, get("layer_norm_"))
    act: Any = ACTIVATIONS[module.activation](**module.activation_params)
    product = FORMULAS[ops.Linear]  # as it is now: under a recipe another one
    h = FORMULAS[type(act)](act, product(module, normed, get("fc1_")), get(""))
    bias, outputs = parameters.get("fc2_bias"), []
    if module.return_bias and bias is not None:
        outputs.append(bias)
    if module.return_layernorm_output:
        outputs.append(normed)
    apart = module.return_bias
    y = product(module, h, lambda name: None if apart and name == "bias" else get("fc2_")(name))
    return y, outputs
