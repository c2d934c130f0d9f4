"""GroupedLinear: one linear layer for each group of rows, as mixtures of experts use them."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..guards.torch_private import recorded
from ..guards.validation import Checked, Fixed, features, flag, function, integers, place, whole
from ..op import Op, Spec
from .delayed import Queue, TellsOfWeightGradients, in_use, mark_delayed, queue_of
from .joined import join, pack, parameters, parts_of
from .main_grad import add_to_main_grad, exact_gradient, weight_gradient
from .parameters import MarksParameters, empty_parameter


def _pieces(x: Tensor, split_sizes: Tensor) -> tuple[Tensor, ...]:
    sizes = split_sizes.tolist()
    verify_sizes("GroupedLinear", sizes, x.shape[0])
    return tuple(torch.split(x, sizes))


def verify_sizes(where: str, sizes: Sequence[int], rows: int) -> None:
    """Raises OpError for sizes of groups that do not add up to the rows."""
    if sum(sizes) != rows or min(sizes, default=0) < 0:
        expected = f"sizes that add to {rows}, the rows of x, none below 0"
        raise OpError(where, f"split_sizes {list(sizes)}", expected)


class GroupedLinear(MarksParameters, TellsOfWeightGradients, Op):
    """`y[rows of g] = x[rows of g] @ weight[g].T + bias[g]`.

    Rows are split by an extra input, `split_sizes`: integers `[num_groups]`, a tensor on any device
    or a list, adding to the row count; groups may be empty. x: `[*, in_features]`. Parameters, as
    TransformerEngine's: `weight0`, `weight1`, ... `[out_features, in_features]` and `bias0`, ...
    `[out_features]` or None. The attributes weight and bias are all groups' as one tensor
    `[num_groups, ...]`, and may be set to one; a state dict with keys `weight` and `bias` of that
    shape is accepted.

    Parameters lie one after the other in memory, where kernels read them as one tensor; what puts
    others in their place (FSDP, `load_state_dict(assign=True)`) costs a copy at each call.

    single_grouped_weight, single_grouped_bias: one parameter `weight`, or `bias`, of that shape in
    the place of `weight0`, ...: of many groups autograd alone takes milliseconds. State dicts of
    either form load into the other.

    Initialized inside `rng_state_tracker_function().fork()` where that is given.
    accumulate_into_main_grad: weights' gradients go into their `main_grad`, see `main_grad`.
    delay_wgrad_compute: the backward leaves the weights' gradients to `backward_dw()`.
    """

    gemm = True
    required = ("weight",)
    extra_inputs = ("split_sizes",)
    takes_buffers = ("output", "grad_input")
    num_groups = Fixed("another GroupedLinear")
    in_features = Checked(features)
    out_features = Checked(features)
    init_method = Checked(function)
    rng_state_tracker_function = Checked(function)
    accumulate_into_main_grad = Checked(flag)
    overwrite_main_grad = Checked(flag)
    delay_wgrad_compute = Checked(flag)
    single_grouped_weight = Fixed("another GroupedLinear")
    single_grouped_bias = Fixed("another GroupedLinear")
    weight: Any
    bias: Any

    def __init__(
        self,
        num_groups: int,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        rng_state_tracker_function: Callable[[], Any] | None = None,
        accumulate_into_main_grad: bool = False,
        overwrite_main_grad: bool = False,
        delay_wgrad_compute: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        place(who, device, dtype)
        num_groups = whole(who, "num_groups", num_groups)
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.group_names = {
            name: tuple(f"{name}{g}" for g in range(num_groups)) for name in ("weight", "bias")
        }
        self.single_grouped_weight = flag(who, "single_grouped_weight", single_grouped_weight)
        self.single_grouped_bias = flag(who, "single_grouped_bias", single_grouped_bias)
        self.init_method = init_method
        self.rng_state_tracker_function = rng_state_tracker_function
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.overwrite_main_grad = overwrite_main_grad
        self.delay_wgrad_compute = delay_wgrad_compute
        bias = flag(who, "bias", bias)
        for name, there in (("weight", True), ("bias", bias)):
            shape = self._shape(name)
            for part in self.names_of(name):
                parameter = empty_parameter(shape, device, dtype) if there else None
                self.register_parameter(part, parameter)
        self._pack()
        self.reset_parameters()

    def is_single(self, name: str) -> bool:
        """Whether "weight" or "bias" is one parameter."""
        single: bool = getattr(self, f"single_grouped_{name}")
        return single

    def names_of(self, name: str) -> tuple[str, ...]:
        """The parameters that "weight" or "bias" stands for."""
        return (name,) if self.is_single(name) else self.group_names[name]

    def joined(self) -> Collection[str]:
        """Parameters that `fwd` does not name: it takes them as one."""
        return [*self.names_of("weight"), *self.names_of("bias")]

    def _parts(self, name: str) -> list[Any]:
        """The parameters of each group; none if one is not there."""
        members = [self.own_parameter(part) for part in self.names_of(name)]
        return [] if any(part is None for part in members) else members

    def _join(self, name: str) -> Tensor | None:
        names = self.names_of(name)
        own = self._parameters
        tensors: Any = [own[part] if part in own else getattr(self, part, None) for part in names]
        if all(map(_is_there, tensors)):
            return join(self, names, tuple(tensors))
        if any(map(_is_there, tensors)):
            present = [g for g, part in enumerate(tensors) if part is not None]
            got, who = f"{name} of groups {present} alone", type(self).__name__
            raise OpError(who, got, "one of each group, or none")
        return None

    def __getattr__(self, name: str) -> Any:
        """Of each group's weights or biases all as one, `[num_groups, ...]`."""
        if name in ("weight", "bias") and not self.is_single(name):
            return self._join(name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; "weight" and "bias" are those of all groups, one after the other."""
        if name not in ("weight", "bias") or self.is_single(name):
            super().register_parameter(name, param)
            return
        if param is not None and param.shape[:1] != (self.num_groups,):
            got, expected = f"{name} of shape {tuple(param.shape)}", f"{self.num_groups} groups"
            raise OpError(type(self).__name__, got, expected)
        for g, part in enumerate(self.names_of(name)):
            parameter = (
                None if param is None else nn.Parameter(param.detach()[g], param.requires_grad)
            )
            super().register_parameter(part, parameter)

    def __setattr__(self, name: str, value: Any) -> None:
        parameter = value is None or isinstance(value, nn.Parameter)
        if parameter and name in ("weight", "bias") and not self.is_single(name):
            self.register_parameter(name, value)
        else:
            super().__setattr__(name, value)

    def _pack(self) -> None:
        for name in ("weight", "bias"):
            if not self.is_single(name):
                pack(self._parts(name))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._pack()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _mark_parameters(self) -> None:
        for weight in self._parts("weight"):
            mark_delayed(weight, self.delay_wgrad_compute)

    @property
    def wgrad_queue(self) -> Queue | None:
        return in_use(queue_of(self), self.delay_wgrad_compute)

    def reset_parameters(self) -> None:
        """Initialize each group as nn.Linear does, or by init_method and zeros."""
        self.mark()
        if self.in_features is None or self.out_features is None:
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        tracker = self.rng_state_tracker_function
        weights, biases = self._parts("weight"), self._parts("bias")
        with tracker().fork() if tracker else nullcontext(), torch.no_grad():
            if self.init_method is None:
                for parameter in (*weights, *biases):
                    nn.init.uniform_(parameter, -bound, bound)
                return
            for weight in weights:
                for group in weight.unbind() if self.single_grouped_weight else [weight]:
                    self.init_method(group.t() if self.reads_transposed else group)
            for bias in biases:
                nn.init.zeros_(bias)

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        if self.in_features is None and in_width is not None:
            self.in_features = in_width
        if self.out_features is None and out_width is not None:
            self.out_features = out_width
        if self.in_features is None or self.out_features is None:
            return
        lazy = [n for n, p in self._parameters.items() if isinstance(p, UninitializedParameter)]
        for name in lazy:
            shape = self._shape("weight" if name.startswith("weight") else "bias")
            self._parameters[name].materialize(shape)  # type: ignore[union-attr]
        if lazy:
            self._pack()
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        if name.startswith("weight"):
            self.out_features, self.in_features = shape[-2:]
        else:
            self.out_features = shape[-1]

    def _shape(self, name: str) -> tuple[int | None, ...]:
        """Of a parameter that "weight" or "bias" stands for."""
        shape = self.shape_of(name) or ()
        return shape if self.is_single(name) else shape[1:]

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        shape = self.num_groups, self.out_features, self.in_features
        return {"weight": shape, "bias": shape[:2]}.get(name)

    def taken(self, name: str, value: Any, rows: int, where: str) -> Tensor:
        """split_sizes as a tensor int64; those on the CPU are checked here. Raises OpError."""
        count = self.num_groups
        if not isinstance(value, Tensor):
            sizes = integers(where, "split_sizes", value, count)
            value = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        if value.dim() != 1 or value.shape[0] != count or value.dtype not in INTEGERS:
            kind = str(value.dtype).removeprefix("torch.")
            got = f"split_sizes {kind} of shape {tuple(value.shape)}"
            raise OpError(where, got, f"integers of shape ({count},), one for each group")
        if value.layout is not torch.strided or value.is_meta:
            got = f"split_sizes on {value.device} of layout {value.layout}"
            raise OpError(where, got, "a dense tensor with values")
        followed = recorded() or torch.compiler.is_compiling()
        if type(value) is Tensor and value.is_cpu and not followed:
            verify_sizes(where, value.tolist(), rows)
        taken: Tensor = value.to(torch.int64)
        return taken

    @property
    def in_width(self) -> int | None:
        width: int | None = self.in_features
        return width

    def width_before(self, out_width: int) -> int | None:
        return self.in_width

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return None

    def example_extra(self, name: str, x: Spec, rows: int) -> Tensor:
        sizes = torch.zeros(self.num_groups, dtype=torch.int64, device=x.device)
        sizes[0] = rows - rows // 2
        sizes[-1] += rows // 2
        return sizes

    def out(self, x: Spec) -> Spec:
        return x.like(self.out_features)

    def fwd(
        self, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[()]]:
        return products(F.linear, x, split_sizes, weight, bias), ()

    def bwd(
        self, dy: Tensor, x: Tensor, split_sizes: Tensor, weight: Tensor, bias: Tensor | None,
        weight_stored: Tensor, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
        dx = dweight = dbias = None
        grads = _pieces(dy, split_sizes)
        if "x" in want:
            dx = torch.cat([g @ w for g, w in zip(grads, weight, strict=True)])
        if "weight" in want:
            pairs = [*zip(grads, _pieces(x, split_sizes), strict=True)]
            dweight = self.weigh(weight_gradients, self, _wgrad, pairs, weight_stored)
        if "bias" in want and bias is not None:
            dbias = bias_gradients(grads, bias)
        return dx, (None, dweight, dbias)

    def _own_keys(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        found = dict(super()._own_keys(state_dict, prefix))
        for name in ("weight", "bias"):
            whole, parts = prefix + name, [prefix + part for part in self.group_names[name]]
            if self.is_single(name):
                values = [found.get(part) for part in parts]
                if whole not in found and _of_one_shape(values):
                    found[whole] = torch.stack([found.pop(part) for part in parts])
            elif _of_one_shape([found.get(whole)]) and found[whole].shape[:1] == (len(parts),):
                found |= zip(parts, found.pop(whole).unbind(), strict=True)
        return found

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.in_features}, {self.out_features}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(2, out_features=16), cls(3, out_features=16, bias=False)


def _is_there(value: Any) -> bool:
    return value is not None


def _of_one_shape(values: Sequence[Any]) -> bool:
    """Whether values are tensors that can be stacked."""
    lazy = UninitializedParameter
    there = all(isinstance(value, Tensor) and not isinstance(value, lazy) for value in values)
    return there and all(value.shape == values[0].shape for value in values)


def products(
    linear: Callable[..., Tensor], x: Tensor, split_sizes: Tensor, weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """`linear` of each group's rows; in a recorded graph, for other sizes too, of all, masked."""
    biases = [None] * weight.shape[0] if bias is None else bias.unbind()
    if not recorded():
        parts = zip(_pieces(x, split_sizes), weight.unbind(), biases, strict=True)
        return torch.cat([linear(*part) for part in parts])
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    groups = (rows >= split_sizes.cumsum(0)).sum(1, keepdim=True)
    y = x.new_zeros(())
    for g, (own, added) in enumerate(zip(weight.unbind(), biases, strict=True)):
        here = groups == g
        y = torch.where(here, linear(torch.where(here, x, 0), own, added), y)
    return y


def bias_gradients(grads: Sequence[Tensor], bias: Tensor) -> Tensor:
    """The sums of each group's rows, `[groups, out]` of bias's dtype."""
    return torch.stack([grad.sum(0, dtype=bias.dtype) for grad in grads])


def _wgrad(dy: Tensor, x: Tensor) -> Tensor:
    return dy.t() @ x


def weight_gradients(
    fc: Any, product: Callable[..., Tensor], pairs: Sequence[tuple[Any, Any]], weights: Tensor
) -> Tensor | None:
    """`weight_gradient` of each group, of its dy and x. weights: as parameters."""
    if not fc.accumulate_into_main_grad and fc.reads_transposed:
        return torch.stack([product(x, dy) for dy, x in pairs]).transpose(1, 2)
    if not fc.accumulate_into_main_grad:
        return torch.stack([product(dy, x) for dy, x in pairs])
    if not parts_of(weights):
        sums = [exact_gradient(product, dy, x, weights) for dy, x in pairs]
        return add_to_main_grad(torch.stack(sums), weights, fc.overwrite_main_grad)
    return _each(lambda k, weight: weight_gradient(fc, product, *pairs[k], weight), weights)


def into_main_grads(fc: Any, gradients: Tensor, weights: Tensor) -> Tensor | None:
    """All groups' weight gradients into their main_grad; returns what autograd is given.

    weights: as parameters.
    """
    overwrite = fc.overwrite_main_grad
    if not parts_of(weights):
        return add_to_main_grad(gradients, weights, overwrite)
    return _each(lambda k, weight: add_to_main_grad(gradients[k], weight, overwrite), weights)


def _each(add: Callable[[int, Tensor], Tensor | None], weights: Tensor) -> Tensor | None:
    """The dummy gradients of all groups, if there are any."""
    numbered = enumerate(parameters(weights))
    dummies = [add(k, weight) if weight.requires_grad else None for k, weight in numbered]
    if all(gradient is None for gradient in dummies):
        return None
    return torch.stack([torch.zeros_like(weights[0]) if g is None else g for g in dummies])


INTEGERS = {
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip
