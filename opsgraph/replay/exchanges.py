"""Exchanges between ranks within a stretch: calls of the process group, between native ones.

The group's own functions are called, on tensors over memory that the stretch has. So every rank's
exchanges stay in order, whether it replays or not, and the group's timeouts hold. An exchange that
is waited for at once runs on the current stream where the group can do that.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ..guards.torch_private import exchange_options, resolve_group
from .events import Event, Exchange, Operand, Wait

Run = list[tuple[int, Event]]
"""Events that one native call replays, each with the number of its line."""

_CALLS = {
    "all_gather": "_allgather_base({result}, {sent}, {options})",
    "reduce_scatter": "_reduce_scatter_base({result}, {sent}, {options})",
    "all_reduce": "allreduce([{result}], {options})",
}


def divided(events: Sequence[tuple[int, Event]]) -> list[Run | Exchange | Wait]:
    """The runs of native events, and the exchanges and waits between them."""
    parts: list[Run | Exchange | Wait] = []
    for line, event in events:
        if isinstance(event, Exchange | Wait):
            parts.append(event)
        elif parts and isinstance(parts[-1], list):
            parts[-1].append((line, event))
        else:
            parts.append([(line, event)])
    return parts


def texts(
    parts: Sequence[int | Exchange | Wait], tensor: Callable[[Operand], str],
    namespace: dict[str, Any],
) -> list[list[str]]:  # fmt: skip
    """The lines of source of each exchange and wait, none for runs, of which the lengths are given.

    tensor: how an operand is spelled. namespace: gets what the lines name.
    """
    at_once = {
        id(one) for one, other in pairwise(parts)
        if isinstance(other, Wait) and other.exchange is one
    }  # fmt: skip
    under_way: dict[int, str] = {}
    groups: dict[str, str] = {}
    found: list[list[str]] = []
    for part in parts:
        lines: list[str] = []
        if isinstance(part, Exchange):
            if part.group not in groups:
                namespace["group"] = resolve_group
                groups[part.group] = f"group{len(groups)}"
                lines.append(f"{groups[part.group]} = group({part.group!r})")
            now = id(part) in at_once
            work = under_way[id(part)] = f"work{len(under_way)}"
            lines.append(_start(part, groups[part.group], work, now, tensor, namespace))
        elif isinstance(part, Wait):
            work = under_way[id(part.exchange)]
            lines += [f"if {work} is not None:", f"    {work}.wait()", f"{work} = None"]
        found.append(lines)
    return found


def _start(
    exchange: Exchange, group: str, work: str, now: bool, tensor: Callable[[Operand], str],
    namespace: dict[str, Any],
) -> str:  # fmt: skip
    options = f"{exchange.kind}_{'now' if now else 'later'}"
    namespace[options] = exchange_options(exchange.kind, not now)
    result, sent = tensor(exchange.result), tensor(exchange.sent)
    call = _CALLS[exchange.kind].format(result=result, sent=sent, options=options)
    return f"{work} = {group}.{call}"


def count(parts: Sequence[int | Exchange | Wait]) -> str:
    """What there is, for the eye. parts: see `texts`."""
    runs = [part for part in parts if isinstance(part, int)]
    launches, exchanges = sum(runs), sum(isinstance(part, Exchange) for part in parts)
    calls = "one native call" if len(runs) < 2 else f"{len(runs)} native calls"
    beside = f" and {exchanges} exchange{'s' * (exchanges > 1)}" if exchanges else ""
    return f"{launches} launches in {calls}{beside}"
