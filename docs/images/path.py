"""Writes path.svg, the path of one tensor in docs/design.md: python docs/images/path.py."""

from pathlib import Path

WIDTH, HIGH, STEP, LEFT, SIDE = 330, 44, 70, 40, 430
MAIN = (
    ("y = mlp(x)", ""),
    ("Sequential", "one stage after the other"),
    ("Stage", "reads the parameters, makes the call's key"),
    ("generated forward", "one step after the other"),
    ("kernels", "functions on tensors"),
    ("generated backward", "makes some values again, then gradients"),
    ("x.grad, weight.grad", ""),
)
PLANNING = (
    ("Program", "basic ops; a name and a spec for every value"),
    ("Claims", "which fuser could run where, or why not"),
    ("Planner", "a cover: claims for the backward, then the forward"),
    ("Code generation", "a forward and a backward, as text"),
)
NOTES = ("", "", "a key with a plan", "", "y, and the saved values", "")


def box(x: int, y: int, title: str, told: str) -> str:
    """A node: its name, and below it what it does."""
    middle, first = x + WIDTH // 2, y + (18 if told else 27)
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HIGH}" rx="6" fill="#f3f5f8" '
        f'stroke="#51606f"/><text x="{middle}" y="{first}" font-weight="bold">{title}</text>'
        f'<text x="{middle}" y="{y + 34}" fill="#5a6675">{told}</text>'
    )


def arrow(x: int, y: int, to_x: int, to_y: int, told: str = "") -> str:
    """An arrow, with a note at its right."""
    note = f'<text x="{x + 8}" y="{(y + to_y) // 2 + 4}" text-anchor="start">{told}</text>'
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="#51606f" marker-end="url(#end)"/>{note}'


def column(x: int, y: int, nodes: tuple[tuple[str, str], ...], notes: tuple[str, ...]) -> list[str]:
    """Nodes below each other, joined by arrows."""
    tops = [y + STEP * k for k in range(len(nodes))]
    middle = x + WIDTH // 2
    arrows = [
        arrow(middle, top + HIGH, middle, top + STEP - 2, note)
        for top, note in zip(tops, notes, strict=False)
    ]
    return [box(x, top, *node) for top, node in zip(tops, nodes, strict=True)] + arrows


stage, forward, first = 20 + 2 * STEP, 20 + 3 * STEP, 20 + 2 * STEP
last = first + STEP * (len(PLANNING) - 1)
parts = [
    f'<rect x="{SIDE - 16}" y="{first - 40}" width="{WIDTH + 32}" height="{last - first + 100}" '
    'rx="8" fill="#ffffff" stroke="#c4713b" stroke-dasharray="5 4"/>'
    f'<text x="{SIDE}" y="{first - 18}" text-anchor="start" fill="#c4713b">'
    "once for each key</text>",
    *column(LEFT, 20, MAIN, NOTES),
    *column(SIDE, first, PLANNING, ("",) * (len(PLANNING) - 1)),
    arrow(LEFT + WIDTH, stage + HIGH // 2, SIDE - 2, first + HIGH // 2),
    arrow(SIDE, last + HIGH // 2, LEFT + WIDTH + 2, forward + HIGH - 8),
    f'<text x="{SIDE - 58}" y="{stage + 14}" text-anchor="start">new</text>',
]
SIZE = SIDE + WIDTH + 40, 10 + STEP * len(MAIN)
Path(__file__).with_suffix(".svg").write_text(
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE[0]}" height="{SIZE[1]}" '
    'font-family="sans-serif" font-size="12" text-anchor="middle" fill="#1b2430">\n'
    '<defs><marker id="end" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="#51606f"/></marker></defs>\n'
    '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n",
    encoding="utf-8",
)
