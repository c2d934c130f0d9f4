"""Checkpoints of other libraries in opsgraph's layout and back: functions on state dicts.

A gated MLP may come as three weights, `gate_proj`, `up_proj` and `down_proj`, where LayerNormMLP
has two, the first with the gate's rows above the value's; and those rows may alternate in blocks,
for `glu_interleave_size`. Every function returns a new dict and leaves the given one as it is:
entries that it changes have memory of their own, all others are passed on. What is done to whole
weights may as well be done to one rank's shares. `opsgraph.parallel` has what splits them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import OpError
from ..guards.validation import whole

GATE, UP, DOWN = "gate_proj.", "up_proj.", "down_proj."
"""What a Llama-like MLP calls its three linear layers."""


def interleave_glu(
    state: Mapping[str, Any], names: Iterable[str], glu_interleave_size: int
) -> dict[str, Any]:
    """Have gate and value, one half of the rows each, alternate in blocks of rows.

    names: of the linear layers' weights and biases before gated activations, without the modules
    that they are in: `("fc1_weight", "fc1_bias")` means those of every LayerNormMLP. Raises OpError
    for a name that no entry has, and for rows that blocks do not divide.
    """
    return _rearranged("interleave_glu", state, names, glu_interleave_size, (2, -1))


def deinterleave_glu(
    state: Mapping[str, Any], names: Iterable[str], glu_interleave_size: int
) -> dict[str, Any]:
    """The inverse of `interleave_glu`: the gate's rows, then the value's."""
    return _rearranged("deinterleave_glu", state, names, glu_interleave_size, (-1, 2))


def _rearranged(
    who: str, state: Mapping[str, Any], names: Iterable[str], size: int, outer: tuple[int, int]
) -> dict[str, Any]:
    block = whole(who, "glu_interleave_size", size)
    rearranged = dict(state)
    for name in (names,) if isinstance(names, str) else tuple(names):
        keys = [key for key in state if key == name or key.endswith(f".{name}")]
        if not keys:
            raise OpError(who, f"no entry {name!r}", f"one of {_some(state)}")
        for key in keys:
            rearranged[key] = _exchange(who, key, state[key], block, outer)
    return rearranged


def _exchange(who: str, key: str, value: Tensor, block: int, outer: tuple[int, int]) -> Tensor:
    """Rows seen as `[*outer, block]`, the outer two exchanged."""
    if not value.shape or value.shape[0] % (2 * block):
        expected = f"rows in a multiple of {2 * block}"
        raise OpError(who, f"{key} of shape {tuple(value.shape)}", expected)
    blocks = value.shape[0] // (2 * block)
    split = value.unflatten(0, (*(blocks if n < 0 else n for n in outer), block))
    exchanged: Tensor = split.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return exchanged.flatten(0, 2)


def join_llama_mlp(
    state: Mapping[str, Any],
    *,
    fc1: str = "fc1_",
    fc2: str = "fc2_",
    glu_interleave_size: int | None = None,
) -> dict[str, Any]:
    """Join every Llama-like MLP's three weights, and biases if it has them, into FC1 and FC2.

    `P.gate_proj.weight` and `P.up_proj.weight` become the upper and the lower rows of
    `P.fc1_weight`, as SwiGLU takes them, and `P.down_proj.weight` becomes `P.fc2_weight`, P being
    the name of the MLP. fc1, fc2: what comes before "weight" and "bias"; for an
    `og.Sequential(RMSNorm, Linear, SwiGLU, Linear)` these are `"1."` and `"3."`.
    glu_interleave_size: FC1's rows alternate, as by `interleave_glu`. Raises OpError for an MLP
    that lacks a part, and if there is none.
    """
    merged: dict[str, Any] = {}
    used: set[str] = set()
    for prefix in _prefixes("join_llama_mlp", state, f"{GATE}weight"):
        for kind in ("weight", "bias"):
            parts = [f"{prefix}{part}{kind}" for part in (GATE, UP, DOWN)]
            present = [key for key in parts[:2] if key in state]
            if kind == "weight" and not all(key in state for key in parts):
                missing = next(key for key in parts if key not in state)
                raise OpError("join_llama_mlp", f"no {missing}", f"it beside {parts[0]}")
            if len(present) == 1:
                both = " and ".join(parts[:2])
                raise OpError("join_llama_mlp", f"{present[0]} alone", f"both {both}")
            if present:
                halves = [state[key] for key in present]
                if halves[0].shape != halves[1].shape:
                    shapes = " and ".join(str(tuple(half.shape)) for half in halves)
                    raise OpError("join_llama_mlp", f"{prefix}: shapes {shapes}", "two equal ones")
                joined = torch.cat(halves)
                if glu_interleave_size is not None:
                    joined = interleave_glu({"": joined}, "", glu_interleave_size)[""]
                merged[f"{prefix}{fc1}{kind}"] = joined
            if parts[2] in state:
                merged[f"{prefix}{fc2}{kind}"] = state[parts[2]]
            used.update(parts)
    return _replaced(state, used, merged)


def split_llama_mlp(
    state: Mapping[str, Any],
    *,
    fc1: str = "fc1_",
    fc2: str = "fc2_",
    glu_interleave_size: int | None = None,
) -> dict[str, Any]:
    """The inverse of `join_llama_mlp`, with the same arguments."""
    parts: dict[str, Any] = {}
    used: set[str] = set()
    for prefix in _prefixes("split_llama_mlp", state, f"{fc1}weight", f"{fc2}weight"):
        for kind in ("weight", "bias"):
            first, second = f"{prefix}{fc1}{kind}", f"{prefix}{fc2}{kind}"
            if first in state:
                joined = state[first]
                if glu_interleave_size is not None:
                    joined = deinterleave_glu({"": joined}, "", glu_interleave_size)[""]
                if joined.shape[0] % 2:
                    got = f"{first} of shape {tuple(joined.shape)}"
                    raise OpError("split_llama_mlp", got, "an even number of rows")
                gate, up = (half.clone() for half in joined.chunk(2))
                parts |= {f"{prefix}{GATE}{kind}": gate, f"{prefix}{UP}{kind}": up}
            if second in state:
                parts[f"{prefix}{DOWN}{kind}"] = state[second]
            used.update((first, second))
    return _replaced(state, used, parts)


def _prefixes(who: str, state: Mapping[str, Any], *names: str) -> list[str]:
    """The names of the modules that have all of these entries, each with its dot."""
    prefixes = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])]
    prefixes = [
        p for p in prefixes if (not p or p.endswith(".")) and all(p + n in state for n in names)
    ]
    if not prefixes:
        raise OpError(who, f"no {' with '.join(names)}", f"one of {_some(state)}")
    return prefixes


def _replaced(state: Mapping[str, Any], used: set[str], entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in used} | entries


def _some(state: Mapping[str, Any]) -> str:
    """A few of the keys, for messages."""
    keys = list(state)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} others" if len(keys) > 5 else "")
