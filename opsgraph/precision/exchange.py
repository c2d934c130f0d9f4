"""The largest of each rank's amaxes, by a collective that is the same whatever a rank holds.

Ranks may differ in what they hold: an expert without tokens made no state yet. A collective of as
many numbers as there are would then wait for ever, or mix layers. So the first one has a fixed size
and begins with a digest of what follows; where digests differ every rank raises the same error.

On CUDA the host does not wait for the digests: where they differ nothing is taken over, and the
error comes with a later exchange, when they are known.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import OpsgraphError

SLOTS = 4096
"""Amaxes in the first collective: more, of some thousand layers, follow in a second one."""
_PIECES = 4


class _Check(NamedTuple):
    """Digests that are being compared on a device: when it is done, and whether they agree."""

    done: Any
    agree: Tensor
    held: int


_checks: list[_Check] = []


def reduce_max(values: Sequence[Tensor], description: Hashable, group: Any) -> list[Tensor]:
    """The largest value over the ranks of a group, for each of the tensors `[n]`; see below."""
    pieces = reduce_flat(values, description, group).split([value.numel() for value in values])
    return [piece.to(value.device) for piece, value in zip(pieces, values, strict=True)]


def reduce_flat(values: Sequence[Tensor], description: Hashable, group: Any) -> Tensor:
    """The largest values over the ranks of a group, of all tensors `[n]` one after the other.

    description: of the values, the same on every rank. Raises OpsgraphError if it is not; on CUDA a
    later call does, and this one returns -1 everywhere.
    """
    raise_late()
    device = _device(values, group)
    header = _header(description, device)
    flat = [header, *(value.to(device) for value in values)]
    count = sum(value.numel() for value in values)
    first = torch.cat([*flat, _padding(max(0, SLOTS - count), device)])
    first, rest = first[: header.numel() + SLOTS], first[header.numel() + SLOTS :]
    _reduce(first, group)
    agree = (first[: header.numel()] == header).all()
    _verify(agree, count, wait=bool(rest.numel()))
    if rest.numel():
        rest = rest.clone()
        _reduce(rest, group)
    held = torch.cat((first[header.numel() :], rest)) if rest.numel() else first[header.numel() :]
    return torch.where(agree, held[:count], -1.0)


def _reduce(values: Tensor, group: Any) -> None:
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=group)


def _device(values: Sequence[Tensor], group: Any) -> torch.device:
    """Where the group exchanges: it must not depend on what this rank holds."""
    if "nccl" not in str(torch.distributed.get_backend_config(group)):
        return torch.device("cpu")
    held = [value.device for value in values if value.is_cuda]
    return held[0] if held else torch.device("cuda", torch.cuda.current_device())


@lru_cache(64)
def _header(description: Hashable, device: torch.device) -> Tensor:
    """A digest in fp32, and its negative: the largest of all are these where all are the same."""
    digest = sha256(repr(description).encode()).digest()
    pieces = [float(int.from_bytes(digest[2 * k : 2 * k + 2], "big")) for k in range(_PIECES)]
    return torch.tensor([*pieces, *(-piece for piece in pieces)], device=device)


@lru_cache(64)
def _padding(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), -1.0, device=device)


def _verify(agree: Tensor, count: int, wait: bool) -> None:
    """Raise if the ranks differ, now or when it is known; wait: now."""
    if not agree.is_cuda or wait:
        if not bool(agree):
            _fail(count)
    elif not torch.cuda.is_current_stream_capturing():
        known = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
        known.copy_(agree, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(agree.device))
        _checks.append(_Check(done, known, count))


def raise_late() -> None:
    """Raise the error of an earlier exchange on CUDA, if by now it is known."""
    while _checks and _checks[0].done.query():
        check = _checks.pop(0)
        if not bool(check.agree):
            _checks.clear()
            _fail(check.held)


def _fail(count: int) -> None:
    raise OpsgraphError(
        f"autocast: got {count} amaxes on this rank and others on another one of the "
        "amax_reduction_group, expected the same layers on all; call recipe.prepare(model) on "
        "every rank before the first step"
    )
