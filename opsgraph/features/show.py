"""A plan for the eye: the table that `print(plan)` shows, the networkx graph, and a picture.

The hooks are `Plan.__str__` and `Plan.graph`; `page` has that for pictures.
"""

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..base.config import Config
from ..op import FORWARD
from ..plan import Plan
from ..plan.lines import Line
from ..plan.result import Passes, Step

if TYPE_CHECKING:
    import networkx as nx


def positions(ops: tuple[int, ...], plan: Plan) -> str:
    """What a plan calls the first and the last of some ops: `3`, `3-5` or `1-q2`."""
    return "-".join(dict.fromkeys((plan.numbers[ops[0]], plan.numbers[ops[-1]])))


def _row(step: Step, plan: Plan, width: int = 24) -> str:
    before, after = step.edges
    text = f"  {step.where:>5}  {step.name:<{width}} {step.backend:<10}"
    if step.direction == FORWARD:
        text += f" {before} -> {after}"
        return text + (f"  saves {', '.join(step.saves)}" if step.saves else "")
    needs = [
        f"{n} (again: {positions(step.again[n], plan)})" if n in step.again else n
        for n in step.needs
    ]
    return text + (f" needs {', '.join(needs)}" if needs else "")


def table(plan: Plan) -> str:
    """Weights quantized, steps, refusals, saved values, costs where planners differ, replays."""
    names = [step.name for step in (*plan.forward, *plan.backward)]
    names += [refused.name for refused in plan.rejected]
    width = max((24, *map(len, names)))
    lines = ["prepare"] if plan.functions.prepare.lines else []
    for line in plan.functions.prepare.lines[:-1]:
        where, backend = line.note.split()
        lines.append(f"  {where:>5}  {line.function:<{width}} {backend:<10} {line.reads[0]}")
    lines += ["forward", *(_row(step, plan, width) for step in plan.forward)]
    if plan.backward:
        lines += ["backward", *(_row(step, plan, width) for step in plan.backward)]
    if plan.rejected:
        lines.append("rejected")
        for refused in plan.rejected:
            ops, name, direction, reason = refused
            where = positions(ops, plan) if ops else "all"
            fuser = f"{name:<{width}} {refused.backend:<10}"
            lines.append(f"  {where:>5}  {fuser} {direction}: {reason}")
    if plan.backward:
        each = "  ".join(f"{name} {size}" for name, size in plan.saved.items())
        lines.append(f"saved  {each}   {plan.saved_bytes_per_row} bytes per row")
    if plan.few is not None:
        lines.append(f"order  {_order(plan)}")
    if len(set(plan.costs.values())) > 1 or "measured" in plan.costs:
        each = ", ".join(f"{name} {cost:.0f}" for name, cost in plan.costs.items())
        taken = "; measured to be the fastest" if "measured" in plan.costs else ""
        lines.append(f"cost   {each} (weighted bytes per row){taken}")
    passes = plan.passes._asdict()
    told: dict[str, list[str]] = {name: _told(run) for name, run in passes.items()}
    if plan.joined is not None:
        whole = {"forward": _told(plan.joined.forward) or _told(plan.joined.silent())}
        whole["backward"] = _told(plan.joined.backward)
        told = {name: whole.get(name) or texts for name, texts in told.items()}
    if any(told.values()):
        lines.append("replay")
        lines += [f"  {name:<9}{text}" for name, texts in told.items() for text in texts]
    return "\n".join(line.rstrip() for line in lines)


def _order(plan: Plan) -> str:
    """In which order the gradients of weights are made, where rows decide it."""
    rows, few = plan.few

    def order(lines: Sequence[Line]) -> str:
        products = [line for line in lines if line.function.endswith("wgrad")]
        return ", ".join(str(line.results) for line in products)

    return (
        f"{order(plan.functions.backward.lines)}; {order(few.lines)} "
        f"where dy has {rows.start:,} to {rows.stop - 1:,} rows"
    )


def _told(run: Any) -> list[str]:
    """What is known of a pass's replays."""
    return run.told() if hasattr(run, "told") else []


def graph(plan: Plan) -> "nx.MultiDiGraph[Any]":
    """Nodes: gaps `("forward", 3)`; edges: steps taken, and refused ones with their reason."""
    import networkx as nx

    made: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
    for step in (*plan.forward, *plan.backward):
        ends = [(step.direction, step.ops[0]), (step.direction, step.ops[-1] + 1)]
        if step.direction != FORWARD:
            ends.reverse()
        made.add_edge(*ends, name=step.name, backend=step.backend, ops=step.ops, taken=True)
    for refused in plan.rejected:
        ops, name, direction, reason = refused
        if ops:
            ends = [(direction, ops[0]), (direction, ops[-1] + 1)]
            if direction != FORWARD:
                ends.reverse()
            made.add_edge(
                *ends, name=name, backend=refused.backend, ops=ops, taken=False, reason=reason
            )
    return made


_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})
COLORS = {
    "reference": "#7a8694", "aten": "#3b82c4", "triton": "#2e9e6b", "cpu": "#c4713b", "": "#7b5cb8"
}  # fmt: skip
"""Of backends; "" for those without a color of their own."""
_COLUMN, _LEFT, _HEIGHT = 140, 92, 34


def escaped(text: str) -> str:
    """For HTML; the module `html` is slow to import."""
    return text.translate(_ESCAPES)


def _box(x: float, y: float, width: float, text: str, color: str, dashed: bool, title: str) -> str:
    style = 'fill="none" stroke-dasharray="4 3"' if dashed else f'fill="{color}"'
    ink = "#8a4b4b" if dashed else "#ffffff"
    return (
        f"<g><title>{escaped(title)}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="26" rx="5" {style} '
        f'stroke="{"#b06a6a" if dashed else color}"/>'
        f'<text x="{x + width / 2:.0f}" y="{y + 17:.0f}" fill="{ink}" text-anchor="middle">'
        f"{escaped(text[: max(4, int(width / 6.6))])}</text></g>"
    )


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" fill="#334" text-anchor="{anchor}"'
    return f"<text {place}>{escaped(text)}</text>"


def _span(ops: tuple[int, ...]) -> tuple[float, float]:
    return _LEFT + ops[0] * _COLUMN + 4, (ops[-1] - ops[0] + 1) * _COLUMN - 8


def _refused_rows(plan: Plan, direction: str, y: float) -> tuple[list[str], float]:
    """Refused steps, packed into as few rows as they need."""
    ends: list[float] = []
    parts = []
    for refused in plan.rejected:
        ops, name, way, reason = refused
        if not ops or way != direction:
            continue
        x, width = _span(ops)
        level = next((k for k, end in enumerate(ends) if end <= x), len(ends))
        ends[level : level + 1] = [x + width]
        parts.append(
            _box(
                x, y + level * _HEIGHT, width, name, "", True, f"{name} {refused.backend}: {reason}"
            )
        )
    return parts, y + len(ends) * _HEIGHT


def _legend(plan: Plan, y: float) -> list[str]:
    parts = [_label(8, y + 17, "backends")]
    backends = dict.fromkeys(step.backend for step in (*plan.forward, *plan.backward))
    for k, name in enumerate(backends):
        parts.append(_box(_LEFT + k * 110, y, 100, name, _color(name), False, name))
    x = _LEFT + len(backends) * 110
    parts.append(_box(x, y, 100, "refused", "", True, "the reason is in each one's tooltip"))
    return parts


def _color(backend: str) -> str:
    return COLORS.get(backend, COLORS[""])


def svg(plan: Plan) -> str:
    """The picture as SVG text: a row of ops, then taken and refused steps of both passes."""
    width = max(_LEFT + len(plan.kinds) * _COLUMN + 60, 620)
    parts, y = [], 40.0
    for i, (kind, label) in enumerate(zip(plan.kinds, plan.labels, strict=True)):
        x, size = _span((i,))
        parts.append(_box(x, y, size, f"{plan.numbers[i]} {kind}", "#51606f", False, label))
    specs = {step.ops[0]: step.edges[0] for step in plan.forward}
    specs |= {step.ops[-1] + 1: step.edges[1] for step in plan.forward}
    parts += [
        _label(_LEFT + gap * _COLUMN, y - 10, str(spec), "middle") for gap, spec in specs.items()
    ]
    y += 1.5 * _HEIGHT
    for direction, steps in (("forward", plan.forward), ("backward", plan.backward)):
        if not steps:
            continue
        parts.append(_label(8, y + 17, direction))
        for step in steps:
            x, size = _span(step.ops)
            parts.append(
                _box(x, y, size, step.name, _color(step.backend), False, _row(step, plan).strip())
            )
        refused, y = _refused_rows(plan, direction, y + _HEIGHT)
        parts += refused
        y += _HEIGHT / 2
    if plan.backward:
        each = ", ".join(f"{name} {size}" for name, size in plan.saved.items())
        parts.append(_label(8, y + 17, f"saved: {each} = {plan.saved_bytes_per_row} bytes per row"))
        y += _HEIGHT
    parts += _legend(plan, y)
    extent = f'width="{width}" height="{y + 44:.0f}"'
    style = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {extent} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"])


def logged(plan: Plan, config: Config) -> Plan:
    """The plan, after what OPSGRAPH_LOGS asks for is on stderr."""
    if "plan" in config.logs:
        print(f"{plan}\nplanned in {plan.planning_seconds * 1e3:.1f} ms", file=sys.stderr)
    if "reject" in config.logs:
        for refused in plan.rejected:
            ops, name, direction, reason = refused
            who = f"{name} of {refused.backend}" if refused.backend else name
            print(f"opsgraph: {ops} {who} ({direction}): {reason}", file=sys.stderr)
    if "code" in config.logs:
        sources = plan.prepare_source, plan.forward_source, plan.backward_source
        few = plan.few and plan.few.function.source
        print(*filter(None, (*sources, few)), file=sys.stderr)
    return plan


Plan.__str__ = table  # type: ignore[method-assign,assignment]
Plan.graph = property(graph)
for _name in Passes._fields:
    setattr(Plan, f"{_name}_source", property(attrgetter(f"functions.{_name}.source")))
