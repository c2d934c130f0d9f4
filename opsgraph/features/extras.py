"""The extra inputs of a stage: which there are, examples of them, and whether a caller's fit."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.errors import OpError
from ..op import Op, row
from ..plan.basic_ops import BasicOps


def _lead(lead: torch.Size, ratio: tuple[int, int]) -> torch.Size:
    """Leading dimensions after ranks have exchanged rows: the first one is scaled."""
    up, down = ratio
    if up == down or not lead:
        return lead
    return torch.Size((lead[0] * up // down, *lead[1:]))


def _dims(run: BasicOps, i: int, name: str) -> int | None:
    edge = row(1, torch.float32, torch.device("cpu"))
    spec = run.kinds[i].extra_spec(run.ops[i], name, edge)
    return None if spec is None else len(spec.shape)


class ExtraInputs:
    """Those of a run."""

    def __init__(self, run: BasicOps) -> None:
        self.run = run
        self.dims = [_dims(run, i, name) for i, name, _ in run.inputs]
        """Of each: 2 for `[*, width]`, 1 for `[*]`, None where the op checks itself."""
        self.ratios = [factor.as_integer_ratio() for factor in run.factors]
        inputs = enumerate(run.inputs)
        self.takers = [(k, i, n) for k, (i, n, _) in inputs if hasattr(run.kinds[i], "taken")]
        spanning = zip(run.labels, run.ops, strict=True)
        self.trailing = [(label, op) for label, op in spanning if op.trailing()]
        """Ops that work on more than the last dimension."""

    def example(self, x: Tensor) -> list[Tensor]:
        """Extra inputs of the right shapes for an input, uninitialized."""
        run, rows = self.run, x.shape[:-1].numel()
        edge, found, lead = row(x.shape[-1], x.dtype, x.device), [], x.shape[:-1]
        specs = [edge]
        for kind, op in zip(run.kinds, run.ops, strict=True):
            specs.append(kind.out(op, specs[-1]))
        for (i, name, _), dims in zip(run.inputs, self.dims, strict=True):
            up, down = self.ratios[i]
            extra = run.kinds[i].example_extra(run.ops[i], name, specs[i], rows * up // down)
            more = _lead(lead, self.ratios[i])
            shape = extra.shape if dims is None else (*more, *extra.shape[1:])
            found.append(extra.view(shape))
        return found

    def verified(self, x: Tensor, extras: Sequence[Any]) -> Sequence[Tensor]:
        """A call's, as tensors where an op takes others too.

        Raises OpError for one that is none, or whose rows are not those of x, and for an x without
        an op's trailing dimensions.
        """
        for label, op in self.trailing:
            verify_trailing(op, label, x.shape)
        if self.takers:
            extras = list(extras)
        for k, i, name in self.takers:
            up, down = self.ratios[i]
            rows, taker = prod(x.shape[:-1]) * up // down, self.run.ops[i]  # numel() fixes a symbol
            extras[k] = taker.taken(name, extras[k], rows, self.run.labels[i])  # type: ignore[index,operator]
        for (i, name, _), extra, dims in zip(self.run.inputs, extras, self.dims, strict=True):
            lead = _lead(x.shape[:-1], self.ratios[i])
            if dims is None or extra.shape[: len(lead)] == lead:
                continue
            expected = (*lead, extra.shape[-1]) if dims == 2 else tuple(lead)
            got = f"{name} of shape {tuple(extra.shape)}"
            raise OpError(self.run.labels[i], got, f"{expected}")
        return extras


def verify_trailing(op: Op, label: str, shape: torch.Size) -> None:
    """Raises OpError for an input whose last dimensions are not those that the op works on."""
    sizes = op.trailing()
    if sizes and tuple(shape[-1 - len(sizes) : -1]) != sizes:
        expected = ", ".join(map(str, (*sizes, op.in_width)))
        raise OpError(label, f"input of shape {tuple(shape)}", f"[*, {expected}]")
