"""Between torch.nn and opsgraph: modules as ops and back, sharing the parameters.

The hook is `Converts`, a base of Sequential.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..base.errors import PlanError
from ..op import Op, arguments, row
from ..ops.activations import GELU, ReLU, SiLU
from ..ops.elementwise import Dropout, Identity
from ..ops.linear import Linear
from ..ops.norms import LayerNorm, RMSNorm
from .extras import verify_trailing


def _linear(module: nn.Linear) -> Op:
    return Linear(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta"
    )


def _layer_norm(module: nn.LayerNorm) -> Op:
    return LayerNorm(
        module.normalized_shape,
        module.eps,
        module.weight is not None,
        module.bias is not None,
        device="meta",
    )


def _rms_norm(module: nn.RMSNorm) -> Op:
    return RMSNorm(module.normalized_shape, module.eps, module.weight is not None, device="meta")


_FROM: dict[type[nn.Module], Callable[[Any], Op]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GELU: lambda module: GELU(module.approximate),
    nn.ReLU: lambda module: ReLU(),
    nn.SiLU: lambda module: SiLU(),
    nn.Dropout: lambda module: Dropout(module.p),
    nn.Identity: lambda module: Identity(),
}


_PARAMETERS = {
    nn.Linear: {"weight", "bias"},
    nn.LayerNorm: {"weight", "bias"},
    nn.RMSNorm: {"weight"},
}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def is_untouched(module: nn.Module) -> bool:
    """Whether nothing was put on this very module: a forward of its own, or a hook."""
    return "forward" not in module.__dict__ and not any(
        getattr(module, name, None) for name in _HOOKS
    )


def op_from(module: nn.Module) -> nn.Module:
    """The op that computes what a torch module does, with its parameters; else the module itself.

    Only classes that are known are converted, not their subclasses (as parametrizations make):
    those may compute anything. A module stays itself, too, if it has hooks, a forward of its own,
    or parameters, buffers or submodules that its class does not give it.
    """
    kind = type(module)
    own = {*module._parameters, *module._buffers, *module._modules}
    if kind not in _FROM or not is_untouched(module) or own != _PARAMETERS.get(kind, set()):
        return module
    op = _FROM[kind](module)
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if any(op._parameters.get(name) is None for name in names):  # a bias without a weight
        return module
    _share(module, op)
    return op.train(module.training)


def _share(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source._parameters.items():
        if parameter is not None:
            setattr(target, name, parameter)


class PlainOp(nn.Module):
    """An op run by its reference functions under plain autograd: no plan, no fusion."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        """x: `[*, width]`."""
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        verify_trailing(self.op, type(self.op).__name__, shape)
        for kind, op in self.op.lower():
            if kind.identity(op, "forward", self.training):
                continue
            spec = row(x.shape[-1], x.dtype, x.device)
            names = [n for n in arguments(kind.fwd) if n not in ("x", "want")]
            values = [
                op.constant(n, spec) if n in kind.constants else getattr(*op.home(n)) for n in names
            ]
            x = kind.fwd(op, x, *values)[0]
        return x.view(*shape[:-1], x.shape[-1])


def _to_norm(op: Any, module: type[nn.Module], bias: dict[str, bool]) -> nn.Module:
    if op.zero_centered_gamma or op.normalized_dtype is not None:
        return PlainOp(op)
    return module(op.normalized_shape, op.eps, op.elementwise_affine, **bias, device="meta")


_TO: dict[type[Op], Callable[[Any], nn.Module]] = {
    Linear: lambda op: nn.Linear(op.in_features, op.out_features, op.has("bias"), device="meta"),
    LayerNorm: lambda op: _to_norm(op, nn.LayerNorm, {"bias": op.has("bias")}),
    RMSNorm: lambda op: _to_norm(op, nn.RMSNorm, {}),
    GELU: lambda op: nn.GELU(op.approximate),
    ReLU: lambda op: nn.ReLU(),
    SiLU: lambda op: nn.SiLU(),
    Dropout: lambda op: nn.Dropout(op.p),
    Identity: lambda op: nn.Identity(),
}


def module_from(module: nn.Module, label: str) -> nn.Module:
    """The torch module that computes what an op does, with its parameters.

    Ops that torch.nn lacks become a `PlainOp`. Raises PlanError for ops with extra inputs or
    outputs, which no torch module in a sequence has, and for tensor-parallel ones.
    """
    if not isinstance(module, Op):
        return module
    kinds = [entry.kind for entry in module.lower()]
    if any(kind.collective for kind in kinds):
        raise PlanError(f"{label}: it exchanges tensors with other ranks, as no torch module does")
    if any(kind.extra_inputs or kind.taps for kind in kinds):
        raise PlanError(f"{label}: it has extra inputs or outputs, which nn.Sequential cannot pass")
    made = _TO[type(module)](module) if type(module) in _TO else PlainOp(module)
    if not isinstance(made, PlainOp):
        _share(module, made)
    return made.train(module.training)


C = TypeVar("C", bound="Converts")
Places = dict[nn.Module | None, nn.Module | None]
"""What each module has become, for one that occurs again."""


def _converted(module: nn.Module, kind: Any, options: dict[str, Any], made: Places) -> Any:
    for child in module._modules.values():
        if child is not None and child not in made:
            nested = type(child) is nn.Sequential and is_untouched(child)
            made[child] = _converted(child, kind, options, made) if nested else op_from(child)
    return _rebuilt(module, made, kind, options)


def _rebuilt(module: nn.Module, made: Places, kind: Any, options: dict[str, Any]) -> Any:
    found = kind(OrderedDict((n, made[m]) for n, m in module._modules.items()), **options)
    found.training = module.training  # its own alone: the modules inside have theirs
    return found


def _unconverted(module: nn.Module) -> Any:
    made: Places = {None: None}
    for name, child in module._modules.items():
        if child is not None and child not in made:
            label = f"{name}:{type(child).__name__}"
            nested = isinstance(child, Converts)
            made[child] = _unconverted(child) if nested else module_from(child, label)
    return _rebuilt(module, made, nn.Sequential, {})


class Converts(nn.Module):
    """What a Sequential knows of nn.Sequential."""

    @classmethod
    def from_torch(cls: type[C], module: nn.Sequential, **options: Any) -> C:
        """A Sequential with ops in the place of known torch modules, sharing the parameters.

        Nested nn.Sequentials are converted too. Modules that are not known stay as they are, and so
        do those with hooks or a forward of their own. One module at two places becomes one op at
        two places. options: as the constructor's. Raises PlanError for what is no nn.Sequential,
        or one with a forward of its own.
        """
        if not isinstance(module, nn.Sequential):
            raise PlanError(f"from_torch: got {type(module).__name__}, expected nn.Sequential")
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        own = owner is not nn.Sequential and Converts not in owner.__bases__
        if own or "forward" in module.__dict__:
            got = f"a {type(module).__name__} with a forward of its own"
            raise PlanError(f"from_torch: got {got}, expected one that runs its modules in order")
        return _converted(module, cls, options, {None: None})  # type: ignore[no-any-return]

    def to_torch(self) -> nn.Sequential:
        """A plain nn.Sequential that computes the same, sharing the parameters."""
        return _unconverted(self)  # type: ignore[no-any-return]
