"""A second order of a backward's lines, for few rows: weight gradients that are large come later.

A weight gradient is a result: it lives until the end of the pass. Where it is larger than what its
product lets go of, as with fewer rows than the weight has columns, it had better be made behind the
products after it. A plan has no row count. So it has a second backward, `Plan.few`, for the numbers
of rows with which that takes less memory: the same lines in another order, and the same bits. A
call runs the one for its rows (`replay.passes`).

- Only a product moves that is a line of its own: none that goes elsewhere, or is a user's.
- It moves to a later line, before any that overwrites what it reads, and only if the most that is
  alive at the same time (`alive`) from where it was on becomes less.
- Under a recipe there is one order: on a GPU one call computes both gradients of a linear layer.

The hook is in `planned`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

from ..plan import Plan
from ..plan.lines import Function, Line, let_go, value
from .alive import Noted, Peak, Step, Values, alive, last_uses

LEAST = 2**20
"""Bytes that a second order has to save."""
WORTH = 0.98
"""The most that is alive with a product where it is moved to, of what is with it where it was."""
WINDOW = 8
"""How many lines later a product may be made."""
MOST_ROWS = 2**31


class Few(NamedTuple):
    """A backward for few rows. rows: of the output's gradient, with which it is run."""

    rows: range
    function: Function


class Order:
    """An order of a backward's steps in which products come later; best with that many rows."""

    def __init__(self, values: Values, rows: int) -> None:
        self.values, self.steps = values, [*values.steps]
        self.sizes = [size.at(rows) for size in values.sizes]
        self.last = last_uses(self.steps)
        self.moved = set[int]()
        """The results of products that come later."""
        for product in [step for step in values.steps if step.product]:
            if self._size(product.makes) > self._size(product.reads):
                self._move(next(k for k, step in enumerate(self.steps) if step is product))

    def _size(self, values: Mapping[str, int]) -> int:
        return sum(self.sizes[number] for number in values.values())

    def _move(self, place: int) -> None:
        """Have a product come later, as soon as the least is alive that can be."""
        stop = min(place + 1 + WINDOW, len(self.steps) - 1)  # the last one returns
        product, *others = best = self.steps[place:stop]
        kept = {number for number in last_uses(best) if self.last[number] >= stop}
        least = WORTH * max(alive(best, self.sizes, kept))
        for k, other in enumerate(others, 1):
            if not self._may_follow(product, other):
                break
            order = [*others[:k], product, *others[k:]]
            if (most := max(alive(order, self.sizes, kept))) < least:
                least, best = most, order
        if best[0] is not product:
            self.moved.add(product.new[0])
            self.steps[place:stop] = best
            self.last |= {n: place + k for n, k in last_uses(best).items() if n not in kept}

    def _may_follow(self, product: Step, other: Step) -> bool:
        """Whether a product may come after a step that is behind it."""
        if not other.over.isdisjoint(product.values) or product.new[0] in other.values:
            return False
        rebound = product.reads.keys() & other.makes.keys()
        return not rebound or (rebound == {"dx"} and self._free(product))

    def _free(self, step: Step) -> bool:
        """Whether the gradient that a step reads, and may not overwrite, can have its own name."""
        moved = any(getattr(argument, "moved", False) for argument in step.line.arguments)
        name = self.values.called.get(step.reads["dx"], "dx")
        return not moved and name not in self.values.names

    def _named(self) -> dict[int, str]:
        """Gradients that get names of their own: what a product reads after `dx` is another, and
        what the step before it reads last, for a replay ends its stretch where a name dies."""
        found = list[int]()
        for before, step in pairwise(self.steps):
            if not self.moved.isdisjoint(step.new):
                found += [step.reads["dx"]] if "dx" in step.reads else []
                if "dx" in before.reads.keys() & before.makes.keys() and self._free(before):
                    found.append(before.reads["dx"])
        return {number: self.values.called[number] for number in found}

    def lines(self) -> tuple[list[Line], set[str]]:
        """The lines in that order, and the names that gradients have got."""
        named, lines, dx = self._named(), list[Line](), self.values.given["dx"]
        bound = set[int]()
        for step in self.steps:
            line = step.line._replace(dead=())
            if "dx" in step.makes and dx in named:
                lines.append(Line("bind", (value("dx"),), named[dx]))
                bound.add(dx)
            if step.reads.get("dx") in bound:
                name = named[step.reads["dx"]]
                line = line._replace(arguments=tuple(_called(name, a) for a in line.arguments))
            lines.append(line)
            dx = step.makes.get("dx", dx)
        return lines, {named[number] for number in bound}


def _called(name: str, argument: Any) -> Any:
    """An argument of a line; the gradient by another name."""
    return argument._replace(text=name) if getattr(argument, "text", "") == "dx" else argument


def _typical(values: Values) -> int:
    """Rows of the plan's input with which an order matters most: half of those with which a product
    makes as much as it reads, the most of any large product; 0 without one."""
    sizes, found = values.sizes, 0
    for step in values.steps:
        made = sum(sizes[number].fixed for number in step.new)
        read = sum(sizes[number].row for number in step.reads.values())
        if step.product and read and made >= LEAST:
            found = max(found, made // read // 2)
    return found


def _border(inside: int, outside: int, holds: Callable[[int], bool]) -> int:
    """The last number on the way from inside to outside, by halves, for which something holds."""
    while abs(outside - inside) > 1:
        between = (inside + outside) // 2
        inside, outside = (between, outside) if holds(between) else (inside, between)
    return inside


def second_order(values: Values) -> tuple[Order, range] | None:
    """Another order of a backward's steps, and with which rows of the plan's input it is better."""
    rows = _typical(values)
    if not rows or not (order := Order(values, rows)).moved:
        return None
    before, after = (Peak(steps, values.sizes) for steps in (values.steps, order.steps))

    def better(rows: int) -> bool:
        return before(rows) - after(rows) >= LEAST

    if not better(rows):
        return None
    first, last = (_border(rows, end, better) for end in (0, MOST_ROWS))
    return order, range(first, last + 1)


def with_few(plan: Plan, noted: Noted) -> Plan:
    """The plan, with a backward for few rows where there is one that takes less memory then."""
    products = [line for line, _ in noted.steps if line.function.endswith(".wgrad")]
    if noted.definitions is None or plan.specs.prepared or len(products) < 2:
        return plan
    if (found := second_order(Values(plan, noted.definitions, noted))) is None:
        return plan
    (order, rows), own = found, plan.functions.backward
    lines, names = order.lines()
    let_go(lines, names.union(*(line.dead for line in own.lines)))
    made = Function(own.name, own.parameters, lines, own.namespace)
    first, stop = (ceil(count * plan.specs.outputs[0].factor) for count in (rows.start, rows.stop))
    return replace(plan, few=Few(range(first, stop), made))
