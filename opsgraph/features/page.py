"""A plan as one HTML page that works offline: ops on a line, steps taken and refused, what is kept.

`page` is what `Plan.draw` writes as `.html`. `fragment` is what notebooks show (`_repr_html_`): the
same without the script, its reasons in a table. Neither asks for anything from elsewhere, and the
page's policy forbids it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..op import BACKWARD, FORWARD
from ..plan import Plan
from ..plan.lines import Line
from .show import COLORS, escaped, positions, svg, table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Box(NamedTuple):
    """A step, taken or refused; `facts`: its details, each with a word before it."""

    name: str
    backend: str
    direction: str
    ops: tuple[int, ...]
    taken: bool
    key: str
    """What its lines of source say: `forward 2-3 cpu`."""
    facts: tuple[tuple[str, str], ...]


def page(plan: Plan) -> str:
    """The whole page."""
    style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    title = escaped(f"Plan: {', '.join(plan.kinds)}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
        f"<style>{style}</style></head>\n"
        f'<body class="opsgraph"><main>{_head(plan)}{_line(plan, "button")}\n'
        '<div class="beside"><section class="facts" aria-live="polite" aria-label="What is chosen">'
        f"{''.join(_facts(plan))}</section>\n"
        f'<section class="source" aria-label="Source">{"".join(_sources(plan))}</section></div>\n'
        f"{_absent(plan)}</main>\n<script>{script}</script></body></html>\n"
    )


def fragment(plan: Plan) -> str:
    """For notebooks, which may run no script."""
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    source = escaped("\n".join(source for _, source, _ in _functions(plan)))
    return (
        f'<div class="opsgraph"><style>{style}</style>{_line(plan, "div")}'
        f"<details><summary>as text, with reasons</summary><pre>{escaped(table(plan))}</pre>"
        f"</details><details><summary>source</summary><pre>{source}</pre></details></div>"
    )


# -- what there is --


def _boxes(plan: Plan, direction: str) -> Iterator[Box]:
    """The steps of a pass, then what was refused in it."""
    ends = ("from", "to") if direction == FORWARD else ("gradient to", "gradient from")
    for step in plan.forward if direction == FORWARD else plan.backward:
        again = {
            name: f" (made again by {positions(ops, plan)})" for name, ops in step.again.items()
        }
        facts = (
            ("is", f"taken, from {step.backend}"),
            ("ops", _labels(plan, step.ops)),
            *zip(ends, map(str, step.edges), strict=True),
            ("keeps", ", ".join(f"{name}, {_bytes(plan.saved[name])}" for name in step.saves)),
            ("needs", ", ".join(name + again.get(name, "") for name in step.needs)),
        )
        key = f"{direction} {step.where} {step.backend}"
        yield Box(step.name, step.backend, direction, step.ops, True, key, facts)
    for refused in plan.rejected:
        ops, name, way, reason = refused
        if ops and way == direction:
            why = (
                ("is", f"refused, from {refused.backend}"),
                ("because", reason),
                ("ops", _labels(plan, ops)),
            )
            yield Box(name, refused.backend, direction, ops, False, "", why)


def _labels(plan: Plan, ops: Iterable[int]) -> str:
    return ", ".join(f"{plan.numbers[i]} {plan.kinds[i]}" for i in ops)


def _bytes(count: int) -> str:
    return f"{count:,} bytes per row"


def _place(plan: Plan, name: str) -> int:
    """The op that a value's name ends with; `x6` after the last of six is at that one."""
    ends = [number for number in plan.numbers if name.endswith(number)]
    return plan.numbers.index(max(ends, key=len)) if ends else len(plan.numbers) - 1


def _kept(plan: Plan) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Each kept value with its facts, from the lines that make and read it."""
    makers = {name: line.note for line in plan.functions.forward.lines for name in line.makes}
    readers: dict[str, dict[str, None]] = {}
    for line in plan.functions.backward.lines:
        for name in line.reads:
            readers.setdefault(name, {})[line.note or line.function] = None
    for name, size in plan.saved.items():
        yield (
            name,
            (
                ("is", "kept for the backward"),
                ("takes", _bytes(size)),
                ("made by", makers.get(name, "the caller")),
                ("needed by", "; ".join(readers.get(name, ()))),
            ),
        )


# -- how it is written --


def _head(plan: Plan) -> str:
    parts = [f"{len(plan.kinds)} ops, {'training' if plan.backward else 'inference'}"]
    if plan.forward:
        parts.append(f"{plan.forward[0].edges[0]} to {plan.forward[-1].edges[1]}")
    if plan.backward:
        parts.append(f"{plan.saved_bytes_per_row:,} bytes per row kept for the backward")
    parts.append(f"planned in {plan.planning_seconds * 1e3:.1f} ms")
    told = escaped("; ".join(parts))
    return (
        f'<header><h1>A plan</h1><p>{told}</p><p class="keys"><label><input type="checkbox" '
        'id="refused" checked> refused steps</label> Arrow keys go from step to step, '
        "<kbd>Home</kbd> and <kbd>End</kbd> to the first and the last.</p></header>"
    )


def _line(plan: Plan, tag: str) -> str:
    """Everything that has a place on the line of ops: a grid with a column for each op.

    tag: what steps and values are, "button" where a script listens.
    """
    count = len(plan.kinds)
    cells = []
    for i, (kind, label) in enumerate(zip(plan.kinds, plan.labels, strict=True)):
        words = f"<b>{plan.numbers[i]}</b> {escaped(kind)}"
        cells.append(_cell(1, i, i, words, f'class="op" title="{escaped(label)}"'))
    row = 2
    for direction in (FORWARD, BACKWARD):
        if boxes := [*_boxes(plan, direction)]:
            cells.append(_cell(row, 0, count - 1, direction, 'class="pass"'))
            levels = _levels(boxes)
            cells += (
                _box(box, row + 1 + level, tag) for box, level in zip(boxes, levels, strict=True)
            )
            row += 2 + max(levels)
        if direction == FORWARD and plan.saved:
            cells.append(_cell(row, 0, count - 1, "kept for the backward", 'class="pass"'))
            cells += _chips(plan, row + 1, tag)
            row += 2
    return (
        '<div class="line" role="group" aria-label="Ops, steps and kept values" '
        f'style="--ops: {count}">{"".join(cells)}</div>'
    )


def _cell(row: int, first: int, last: int, inner: str, attributes: str) -> str:
    place = f"grid-area: {row} / {first + 1} / auto / {last + 2}"
    return f'<div {attributes} style="{place}">{inner}</div>'


def _levels(boxes: Sequence[Box]) -> list[int]:
    """Rows in which no two steps overlap: what is taken in the first, what was refused below."""
    ends: list[int] = []
    levels = []
    for box in boxes:
        first, last = min(box.ops), max(box.ops)
        level = next((k for k, end in enumerate(ends) if end < first), len(ends))
        if not box.taken:
            ends[level : level + 1] = [last]
        levels.append(0 if box.taken else level + 1)
    return levels


def _box(box: Box, row: int, tag: str) -> str:
    first, last = min(box.ops), max(box.ops)
    color = COLORS.get(box.backend, COLORS[""])
    kind = "taken" if box.taken else "refused"
    told = escaped("; ".join(f"{name} {text}" for name, text in box.facts if text))
    return (
        f'<{tag} type="button" class="box step {kind}" data-facts="{escaped(_identity(box))}" '
        f'data-key="{escaped(box.key)}" title="{told}" aria-pressed="false" '
        f'style="grid-area: {row} / {first + 1} / auto / {last + 2}; --backend: {color}">'
        f"<span>{escaped(box.name)}</span><small>{'' if box.taken else 'refused, '}"
        f"{escaped(box.backend)}</small></{tag}>"
    )


def _identity(box: Box) -> str:
    return f"{box.direction} {box.name} {box.backend} {'-'.join(map(str, box.ops))}"


def _chips(plan: Plan, row: int, tag: str) -> Iterator[str]:
    """A cell for each op that has kept values."""
    most = max(plan.saved.values()) or 1
    places: dict[int, str] = {}
    for name, size in plan.saved.items():
        chip = (
            f'<{tag} type="button" class="box value" data-facts="value {escaped(name)}" '
            f'aria-pressed="false" style="--share: {size / most:.3f}">{escaped(name)} '
            f"<small>{size:,} B</small></{tag}>"
        )
        place = _place(plan, name)
        places[place] = places.get(place, "") + chip
    for place, chips in places.items():
        yield _cell(row, place, place, chips, 'class="values"')


def _facts(plan: Plan) -> Iterator[str]:
    for direction in (FORWARD, BACKWARD):
        for box in _boxes(plan, direction):
            yield _article(_identity(box), f"{box.name}, {direction}", box.facts)
    for name, facts in _kept(plan):
        yield _article(f"value {name}", name, facts)


def _article(identity: str, title: str, facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in facts if text
    )
    head = f'<article id="{escaped(identity)}" hidden><h2>{escaped(title)}</h2>'
    return f"{head}<dl>{rows}</dl></article>"


def _functions(plan: Plan) -> Iterator[tuple[str, str, Sequence[Line]]]:
    """Name, source and lines of what the plan runs."""
    if plan.prepare_source:
        yield "prepare", plan.prepare_source, plan.functions.prepare.lines
    yield FORWARD, plan.forward_source, plan.functions.forward.lines
    if plan.backward:
        yield BACKWARD, plan.backward_source, plan.functions.backward.lines


def _sources(plan: Plan) -> Iterator[str]:
    for name, source, lines in _functions(plan):
        body = "".join(_numbered(name, source, lines))
        yield f'<h2>{name}</h2><pre tabindex="0" aria-label="{name}"><code>{body}</code></pre>'


def _numbered(name: str, source: str, lines: Sequence[Line]) -> Iterator[str]:
    """A function's lines, each with the key of the step that it is of."""
    keys = [f"{name} {line.note.partition(',')[0]}" for line in lines for _ in line.text()]
    text = source.splitlines()
    for key, words in zip([""] * (len(text) - len(keys)) + keys, text, strict=True):
        yield f'<span data-key="{escaped(key)}">{escaped(words)}\n</span>'


def _absent(plan: Plan) -> str:
    whole = [refused for refused in plan.rejected if not refused.ops]
    rows = "".join(f"<li><b>{escaped(r.name)}</b> {escaped(r.reason)}</li>" for r in whole)
    return f"<section><h2>Not there at all</h2><ul>{rows}</ul></section>" if rows else ""


def draw(plan: Plan, path: str | Path) -> None:
    """Write a picture: ops, steps taken, steps refused, as `.svg`.

    As `.html` a page to look around in: every step and its reasons, kept values, the source beside
    it. It needs nothing from elsewhere.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".html"):
        raise ValueError(f"draw: got {path.name!r}, expected a name ending in .svg or .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = svg(plan) if path.suffix == ".svg" else page(plan)
    path.write_text(text, encoding="utf-8")


Plan.draw, Plan._repr_html_ = draw, fragment  # type: ignore[attr-defined]
