"""The one comparison of opsgraph with the fp64 formulas: outputs and every gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsgraph import Sequential
from opsgraph.ops.sizes import complete_sizes
from opsgraph.testing import formulas

TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}
"""(rtol, atol) against fp64 for a result that is rounded once, as `assert_close` says."""
GEMM = (1e-3, 1e-5)
"""The same for fp32 results of a matrix product."""

LAYOUTS = ("plain", "transposed", "strided", "offset", "expanded rows", "one value")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x in another memory layout; NaN lies where no code may read. The expanded ones change x."""
    hole = torch.full_like(x, float("nan"))
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack((x, hole), -1)[..., 0]
    if layout == "offset":
        return torch.cat((hole, x), -1)[..., x.shape[-1] :]
    if layout == "expanded rows":
        return x[:1].expand_as(x) if x.dim() > 1 else x
    if layout == "one value" and x.numel():
        return x.flatten()[0].expand(x.shape)
    return x


def assert_close(
    found: Tensor,
    expected: Tensor,
    what: str,
    dtype: torch.dtype | None = None,
    gemm: bool = False,
    rounded: bool = False,
    noise: float = 0.0,
) -> None:
    """Within the tolerance of `dtype` (by default that of `found`).

    rounded: an intermediate was rounded to `dtype` as well, which a sum may then cancel: the error
    is not in proportion to the element but to the largest one, and atol is 4 units of `dtype`'s
    precision of that (in fp32 and fp64, 1,000 units: there sums of rounding errors, amplified by
    norms of nearly equal numbers, are all that is left). noise: more of the same, for an input
    known to be ill-conditioned.
    """
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    assert found.isfinite().all() or not expected.isfinite().all(), f"{what}: not finite"
    dtype = dtype or found.dtype
    rtol, atol = GEMM if gemm and dtype == torch.float32 else TOLERANCES[dtype]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    if rounded:
        units = 1000 if dtype in (torch.float32, torch.float64) else 4
        atol = max(atol, units * torch.finfo(dtype).eps * largest)
    torch.testing.assert_close(
        found.double(), expected, rtol=rtol, atol=atol + noise * largest,
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip


def _output(k: int) -> str:
    return f"output {k}" if k else "y"


class Case:
    """A module with inputs, parameters and gradients for it, all from one seed.

    build: makes the modules of the Sequential. frozen: parameters (by a part of their name) that
    need no gradient. layout, gradient_layout: of x and extra inputs, and of dy.
    """

    def __init__(
        self,
        build: Callable[[], Sequence[nn.Module]],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        layout: str = "plain",
        gradient_layout: str = "plain",
        frozen: Sequence[str] = (),
        input_grad: bool = True,
        weight_dtype: torch.dtype | None = None,
        make: Callable[[Tensor], Tensor] = lambda x: x,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.gradient_layout = dtype, gradient_layout
        self.module = Sequential(*build(), device=device, dtype=weight_dtype or dtype, **options)
        random = torch.randn(*shape, dtype=torch.float64, device=device)
        self.x = lay_out(make(random).to(dtype), layout).requires_grad_(input_grad)
        if self.module._lazy():
            complete_sizes(self.module._modules, self.x.shape[-1])
        for name, parameter in self.module.named_parameters():
            nn.init.normal_(parameter, 0.3, 0.6)
            parameter.requires_grad_(not any(part in name for part in frozen))
        shapes: list[torch.Size] = []

        def record(x: Tensor) -> Tensor:
            shapes.append(x.shape)
            return x

        y, outputs = formulas.run(self.module, self.x.detach().double(), self._wide(), record)
        self.extras = [
            lay_out(torch.randn(s, dtype=torch.float64, device=device).to(dtype), layout)
            .requires_grad_(input_grad)
            for s in shapes
        ]  # fmt: skip
        self.dys = [
            lay_out(torch.randn_like(value).to(dtype), gradient_layout) for value in (y, *outputs)
        ]

    def _wide(self) -> dict[str, Tensor]:
        return {
            name: p.detach().double().requires_grad_(p.requires_grad)
            for name, p in self.module.named_parameters()
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        """x and the extra inputs, by name."""
        return {"x": self.x} | {f"extra {k}": extra for k, extra in enumerate(self.extras)}

    def run(self, module: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of opsgraph, by name."""
        torch.manual_seed(1)
        result = (module or self.module)(*self.inputs.values())
        return self._with_gradients(result, self.inputs | dict(self.module.named_parameters()))

    def expected(self) -> dict[str, Tensor]:
        """The same by the formulas, in fp64."""
        torch.manual_seed(1)
        wide = {
            name: x.detach().double().requires_grad_(x.requires_grad)
            for name, x in self.inputs.items()
        }
        rest, parameters = iter(list(wide.values())[1:]), self._wide()
        y, outputs = formulas.run(self.module, wide["x"], parameters, lambda _: next(rest))
        assert next(rest, None) is None
        return self._with_gradients((y, *outputs), wide | parameters)

    def _with_gradients(self, result: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = result if isinstance(result, tuple) else (result,)
        assert len(outputs) == len(self.dys), f"{len(outputs)} outputs, expected {len(self.dys)}"
        found = {_output(k): y.detach() for k, y in enumerate(outputs)}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        moving = [
            (y, dy.to(y.dtype)) for y, dy in zip(outputs, self.dys, strict=True) if y.requires_grad
        ]
        if wanted and moving:
            ys, dys = zip(*moving, strict=True)
            gradients = torch.autograd.grad(
                ys, list(wanted.values()), dys, allow_unused=True, materialize_grads=True
            )
            found |= {f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}
        return found

    def check(
        self, gemm: bool = False, rounded: bool = False, noise: float = 0.0
    ) -> dict[str, Tensor]:
        """Compare training and inference with the formulas; returns what training gave."""
        expected = self.expected()
        given = self.inputs | dict(self.module.named_parameters())
        given |= {f"dy {k}": dy for k, dy in enumerate(self.dys)}
        before = {name: (t.detach().clone(), t._version) for name, t in given.items()}
        found = self.run()
        torch.manual_seed(1)
        with torch.no_grad():
            result = self.module(*self.inputs.values())
        outputs = result if isinstance(result, tuple) else (result,)
        for k, y in enumerate(outputs):
            found[f"inference {_output(k)}"] = y
            expected[f"inference {_output(k)}"] = expected[_output(k)]
        for name, (value, version) in before.items():
            assert given[name]._version == version, f"{name} was written to"
            assert torch.equal(given[name], value), f"{name} was changed"
        assert found.keys() == expected.keys()
        for name, value in found.items():
            leaf = given.get(name.removeprefix("d "))
            dtype = self.dtype if leaf is None else leaf.dtype
            assert value.dtype == dtype, f"{name}: {value.dtype}, expected {dtype}"
            assert_close(value, expected[name], name, dtype, gemm, rounded, noise)
        return found


def check(
    build: Callable[[], Sequence[nn.Module]],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    gemm: bool = False,
    rounded: bool = False,
    noise: float = 0.0,
    **settings: Any,
) -> dict[str, Tensor]:
    """Compare modules in sequence with the formulas: see `Case` and `assert_close`."""
    return Case(build, shape, dtype, device, **settings).check(gemm, rounded, noise)
