"""Between torch.nn and opsgraph: modules as ops and back, sharing the parameters.

The hook is `Converts`, a base of Sequential.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..base.errors import OpError, PlanError
from ..guards.torch_private import opaque
from ..guards.validation import flag
from ..op import Lowered, Op, arguments, row
from ..ops.activations import (
    GELU,
    Hardswish,
    LeakyReLU,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Tanh,
)
from ..ops.dequantized import DequantizedLinear, dequantizes
from ..ops.elementwise import Dropout, Identity
from ..ops.linear import Linear
from ..ops.lora import LoRALinear
from ..ops.norms import LayerNorm, RMSNorm
from ..ops.xielu import XIELU
from .adapters import adapted, is_peft, reason_against
from .called import CalledOp, reason, spread
from .dimensions import flat
from .extras import verify_trailing
from .inputs import described
from .known_models import of_transformers
from .several import SeveralLayers


def _linear(module: nn.Linear) -> Op:
    kind = DequantizedLinear if dequantizes(module.weight) else Linear
    return kind(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta"
    )


def _layer_norm(module: nn.LayerNorm) -> Op:
    has = module.weight is not None, module.bias is not None
    return LayerNorm(module.normalized_shape, module.eps, *has, device="meta")


def _rms_norm(module: nn.RMSNorm) -> Op:
    return RMSNorm(module.normalized_shape, module.eps, module.weight is not None, device="meta")


_FROM: dict[type[nn.Module], Callable[[Any], Op]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GELU: lambda module: GELU(module.approximate),
    nn.ReLU: lambda module: ReLU(),
    nn.SiLU: lambda module: SiLU(),
    nn.ReLU6: lambda module: ReLU6(),
    nn.LeakyReLU: lambda module: LeakyReLU(module.negative_slope),
    nn.Hardswish: lambda module: Hardswish(),
    nn.Mish: lambda module: Mish(),
    nn.Sigmoid: lambda module: Sigmoid(),
    nn.Tanh: lambda module: Tanh(),
    nn.Dropout: lambda module: Dropout(module.p),
    nn.Identity: lambda module: Identity(),
}


_PARAMETERS = {
    nn.Linear: {"weight", "bias"},
    nn.LayerNorm: {"weight", "bias"},
    nn.RMSNorm: {"weight"},
}
_CONSTANTS: dict[type[Op], tuple[str, ...]] = {XIELU: ("beta", "eps")}
"""Buffers of a module that are constants of the op."""
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


def _op_or_reason(module: nn.Module) -> Op | str:
    kind, name = type(module), type(module).__name__
    if not is_untouched(module):
        return "it has hooks or a forward of its own"
    op = _FROM[kind](module) if kind in _FROM else of_transformers(module)
    if not isinstance(op, Op):
        return op or f"no op is known for the class {name}"
    expected = _PARAMETERS.get(kind, {*op._parameters, *_CONSTANTS.get(type(op), ())})
    if {*module._parameters, *module._buffers, *module._modules} != expected:
        return "it has other parameters, buffers or submodules than its class gives it"
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if any(op._parameters.get(name) is None for name in names):
        return "it has a bias without a weight"
    for name in names:
        shape, needed = module._parameters[name].shape, op._parameters[name].shape  # type: ignore[union-attr]
        if shape != needed:
            return f"its {name} has shape {tuple(shape)}, and its sizes say {tuple(needed)}"
    _share(module, op)
    return op.train(module.training)


def op_from(module: nn.Module, left: dict[nn.Module, str] | None = None) -> nn.Module:
    """The op that computes what a torch module does, with its parameters; else the module itself.

    Only classes that are known are converted, not their subclasses (as parametrizations make):
    those may compute anything. A module stays itself, too, if it has hooks, a forward of its own,
    or parameters, buffers or submodules that its class does not give it. left: takes the reason.
    """
    found = module if isinstance(module, Op) else _op_or_reason(module)
    if isinstance(found, str):
        if left is not None:
            left[module] = found
        return module
    return found


def _of_several(cls: type[Op], modules: tuple[nn.Module, ...]) -> Op:
    """A Linear with the outputs of several layers, one after the other."""
    ops: list[Any] = []
    layers = tuple(_base_of(cls, module) if is_peft(module) else module for module in modules)
    for module in layers:
        found = _op_or_reason(module)
        if type(found) is not Linear or not issubclass(Linear, cls):
            why = f": {found}" if isinstance(found, str) else ""
            got = f"of({type(module).__name__} among several{why})"
            raise OpError(cls.__name__, got, "linear layers")
        ops.append(found)
    for name, values in {
        "in_features": [op.in_features for op in ops],
        "a bias": [op.has("bias") for op in ops],
        "dtype": [op.weight.dtype for op in ops],
        "device": [op.weight.device for op in ops],
    }.items():
        if any(value != values[0] for value in values):
            raise OpError(cls.__name__, f"layers that differ in {name}: {values}", "the same")
    bias = ops[0].has("bias")
    names = {"weight": "weight"} | ({"bias": "bias"} if bias else {})
    rows = sum(op.out_features for op in ops)
    op = Linear(ops[0].in_features, rows, bias=bias, device="meta")
    op.borrow(SeveralLayers(layers), **names).train(layers[0].training)
    return op if layers == modules else adapted(op, modules)


def _of_peft(cls: type[Op], module: Any) -> Op:
    """A LoRALinear of one layer; its Linear reads the base layer's parameters, and has none."""
    base = _base_of(cls, module)
    found = _op_or_reason(base)
    if not isinstance(found, Linear):
        raise OpError(cls.__name__, f"of({type(base).__name__}): {found}", "a linear base layer")
    kind = type(found)
    linear = kind(found.in_features, found.out_features, found.has("bias"), device="meta")
    names = {"weight": "weight"} | ({"bias": "bias"} if found.has("bias") else {})
    linear.borrow(base, **names)
    return adapted(linear, (module,))


def _base_of(cls: type[Op], module: Any) -> nn.Module:
    """The layer that an adapter of peft adapts. Raises OpError for one that is no LoRALinear."""
    reason = None if is_untouched(module) else "it has hooks or a forward of its own"
    if not issubclass(Linear, cls) and cls is not LoRALinear:
        reason = "it is a linear layer with adapters"
    if reason := reason or reason_against(module):
        raise OpError(cls.__name__, f"of(peft's {type(module).__name__}): {reason}", "LoRA")
    return module.get_base_layer()  # type: ignore[no-any-return]


def of(cls: type[Op], *modules: nn.Module) -> Op:
    """An op of this class that computes what a module does, with that module's own parameters.

    modules: one torch.nn layer, norm or activation, or one of transformers, as `from_torch` takes
    them; or several linear layers. Its parameters become those of the op, under the op's names; one
    put in a parameter's place later is not seen by the other. Copies and pickles of both together
    share them too. Raises OpError for a module that would compute something else than the op.

    Several linear layers of one input width, dtype and device become one product whose outputs are
    theirs one after the other, as gate and up before a SwiGLU. The layers keep the parameters, and
    state_dict keys; their memory is made one block (`SeveralLayers`), so that nothing is copied at
    a call. The op has no parameters of its own then.

    A linear layer with LoRA of peft, alone or among several, becomes a LoRALinear without
    parameters of its own: they stay peft's, and what peft does to them later holds.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise OpError(cls.__name__, f"of({described(module)})", "a torch.nn.Module")
    if len(modules) != 1:
        if not modules:
            raise OpError(cls.__name__, "of() without arguments", "a torch.nn.Module")
        return _of_several(cls, modules)
    (module,) = modules
    if is_peft(module):
        return _of_peft(cls, module)
    found = _op_or_reason(module)
    if isinstance(found, str):
        raise OpError(cls.__name__, f"of({type(module).__name__}): {found}", "a module like it")
    if not isinstance(found, cls):
        got = f"of({type(module).__name__}), which computes what {type(found).__name__} does"
        raise OpError(cls.__name__, got, f"a module that computes what {cls.__name__} does")
    return found


Op.of = classmethod(of)  # type: ignore[assignment]


def _share(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source._parameters.items():
        if parameter is not None:
            setattr(target, name, parameter)


class PlainOp(nn.Module):
    """An op run by its reference functions under plain autograd: no plan, no fusion.

    One with hooks or a forward of its own is called, as a Sequential calls it.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        """x: `[*, width]`."""
        called: Tensor = CalledOp(self.op, self._run)(x) if reason(self.op) else self._run(x)
        return called

    def _run(self, x: Tensor) -> Tensor:
        shape, x = x.shape, flat(x, 2)
        verify_trailing(self.op, type(self.op).__name__, shape)
        named: dict[str | None, Tensor] = {}
        for kind, op in self.op.lower():
            if kind.taps:
                named[op.channels["d"]] = x
            if kind.identity(op, "forward", self.training):
                continue
            spec = row(x.shape[-1], x.dtype, x.device)
            values = [
                op.constant(n, spec) if n in kind.constants
                else named[op.channels[n]] if n in kind.extra_inputs
                else getattr(*op.home(n))
                for n in arguments(kind.fwd) if n not in ("x", "want")
            ]  # fmt: skip
            x = kind.fwd(op, x, *values)[0]
        return x.view(*shape[:-1], x.shape[-1])


def _to_norm(op: Any, module: type[nn.Module], bias: dict[str, bool]) -> nn.Module:
    if op.zero_centered_gamma or op.normalized_dtype is not None:
        return PlainOp(op)
    return module(op.normalized_shape, op.eps, op.elementwise_affine, **bias, device="meta")


_APPROXIMATE = {"tanh": "tanh", "fast": "tanh", "none": "none"}
_TO: dict[type[Op], Callable[[Any], nn.Module]] = {
    Linear: lambda op: nn.Linear(op.in_features, op.out_features, op.has("bias"), device="meta"),
    LayerNorm: lambda op: _to_norm(op, nn.LayerNorm, {"bias": op.has("bias")}),
    RMSNorm: lambda op: _to_norm(op, nn.RMSNorm, {}),
    GELU: lambda op: PlainOp(op) if op.round_steps else nn.GELU(_APPROXIMATE[op.approximate]),
    ReLU: lambda op: nn.ReLU(),
    SiLU: lambda op: nn.SiLU(),
    ReLU6: lambda op: nn.ReLU6(),
    LeakyReLU: lambda op: nn.LeakyReLU(op.negative_slope),
    Hardswish: lambda op: nn.Hardswish(),
    Mish: lambda op: nn.Mish(),
    Sigmoid: lambda op: nn.Sigmoid(),
    Tanh: lambda op: nn.Tanh(),
    Dropout: lambda op: nn.Dropout(op.p),
    Identity: lambda op: nn.Identity(),
}


def _open(lowered: Sequence[Lowered]) -> bool:
    """Whether ops take values of others than themselves, or hand some out."""
    taken = {op.channels.get(name) for kind, op in lowered for name in kind.extra_inputs}
    given = {op.channels.get("d") for kind, op in lowered if kind.taps}
    return taken != given or None in taken or any(getattr(op, "to_caller", 0) for _, op in lowered)


def module_from(module: nn.Module, label: str) -> nn.Module:
    """The torch module that computes what an op does, with its parameters.

    Ops that torch.nn lacks become a `PlainOp`. Raises PlanError for ops with extra inputs or
    outputs, which no torch module in a sequence has, and for tensor-parallel ones.
    """
    if not isinstance(module, Op):
        return module
    lowered = module.lower()
    if any(kind.collective for kind, _ in lowered):
        raise PlanError(f"{label}: it exchanges tensors with other ranks, as no torch module does")
    if _open(lowered):
        raise PlanError(f"{label}: it has extra inputs or outputs, which nn.Sequential cannot pass")
    if len(entries := [*spread(label, module, False)]) > 1 and any(k.taps for k, _ in lowered):
        raise PlanError(
            f"{label}: ops beside a residual have hooks, which nn.Sequential cannot call"
        )
    if len(entries) > 1:  # ops inside have hooks
        return nn.Sequential(*(module_from(entry.module, label) for entry in entries))
    known = type(module) in _TO and reason(module) is None
    made = _TO[type(module)](module) if known else PlainOp(module)
    if not isinstance(made, PlainOp):
        _share(module, made)
    return made.train(module.training)


C = TypeVar("C", bound="Converts")
Places = dict[nn.Module | None, nn.Module | None]
"""What each module has become, for one that occurs again."""


def _converted(
    module: nn.Module, kind: Any, options: dict[str, Any], made: Places, left: dict[nn.Module, str]
) -> Any:
    for child in module._modules.values():
        if child is not None and child not in made:
            nested = type(child) is nn.Sequential and is_untouched(child)
            made[child] = (
                _converted(child, kind, options, made, left) if nested else op_from(child, left)
            )
    return _rebuilt(module, made, kind, options)


def _tell(module: nn.Module, left: dict[nn.Module, str], strict: bool) -> None:
    """Raise or warn of the modules that stay as they are, each with its place and the reason."""
    if left:
        places = [(n, m) for n, m in module.named_modules() if m in left]
        shown = "; ".join(f"{n} ({type(m).__name__}): {left[m]}" for n, m in places)
        if strict:
            raise PlanError(f"from_torch(strict=True): no op stands for {shown}")
        warnings.warn(f"from_torch leaves as they are, unfused: {shown}", stacklevel=3)


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
    def from_torch(
        cls: type[C], module: nn.Sequential, *, strict: bool = False, **options: Any
    ) -> C:
        """A Sequential with ops in the place of known torch modules, sharing the parameters.

        Nested nn.Sequentials are converted too, and activations and RMSNorms of transformers.
        Modules that are not known stay as they are, and so do those with hooks or a forward of
        their own: a UserWarning names them, with the reasons, or with strict=True a PlanError. One
        module at two places becomes one op at two places. options: as the constructor's. Raises
        PlanError for what is no nn.Sequential, or one with a forward of its own.
        """
        if not isinstance(module, nn.Sequential):
            raise PlanError(f"from_torch: got {type(module).__name__}, expected nn.Sequential")
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        own = owner is not nn.Sequential and Converts not in owner.__bases__
        if own or "forward" in module.__dict__:
            got = f"a {type(module).__name__} with a forward of its own"
            raise PlanError(f"from_torch: got {got}, expected one that runs its modules in order")
        strict = flag("from_torch", "strict", strict)
        left: dict[nn.Module, str] = {}
        converted = _converted(module, cls, options, {None: None}, left)
        _tell(module, left, strict)
        return converted  # type: ignore[no-any-return]

    @opaque
    def to_torch(self) -> nn.Sequential:
        """A plain nn.Sequential that computes the same, sharing the parameters."""
        return _unconverted(self)  # type: ignore[no-any-return]
