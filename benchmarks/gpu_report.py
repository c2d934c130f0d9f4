"""Results of `benchmarks.gpu` for the eye: tables of text, README's tables, bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_targets import ENGINE, OURS, SIX, milliseconds, size_of, targets

Record = Mapping[str, Any]
RECIPES = ("bf16", "current", "delayed", "blocks")
MIB = 2**20


def number(value: float | None, form: str = "9.3f") -> str:
    """A figure in its column, or a dash."""
    width = int(form.partition(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def steps_text(case: Record) -> str:
    """A size: one line a column, and the kernels that take the most time of ours."""
    lines = [f"step at {size_of(case)}: ms; bytes a row; MiB; / {ENGINE}"]
    lines.append(
        f"  {'':26}{'device':>9}{'wall':>9}{'graph':>9}{'saved':>9}{'peak':>9}{'ratio':>9}"
    )
    columns = case["columns"]
    for name, column in columns.items():
        device, wall, graph = (milliseconds(column, clock) for clock in ("device", "wall", "graph"))
        saved, peak = column.get("saved_bytes"), column.get("peak_bytes")
        engine = milliseconds(columns.get(f"{name.partition('/')[0]}/{ENGINE}"), "device")
        ratio = device / engine if device and engine else None
        lines.append(
            f"  {name:26}{number(device)}{number(wall)}{number(graph)}"
            f"{number(saved and saved / case['rows'], '9.0f')}"
            f"{number(peak and peak / MIB, '9.0f')}{number(ratio, '9.2f')}"
        )
    for name, column in columns.items():
        if name.endswith(f"/{OURS}") or name.endswith(f"/{ENGINE}"):
            lines.append(f"  kernels of {name}: {kernels_text(column)}")
    lines += [f"  {name}: {why}" for name, why in case["refused"].items()]
    return "\n".join(lines)


def kernels_text(column: Record, most: int = 9) -> str:
    """`gemm 5.87 (6), copy_kernel 0.41 (5)`: milliseconds, and launches."""
    kernels = column.get("kernels", [])
    told = [f"{each['name'][:48]} {each['ms']:.3f} ({each['count']:.0f})" for each in kernels]
    return ", ".join(told[:most])


def bandwidth_text(case: Record) -> str:
    """A group: one line a function."""
    scaling = f" {case['scaling']}" if "scaling" in case else ""
    head = f"{case['group']}{scaling} [{case['rows']}, {case['width']}]"
    lines = [f"{head}: ms, TB/s, share of a copy's (up to {case['copy_TB/s']:.2f} TB/s)"]
    for name, found in case["functions"].items():
        launches = sum(kernel["count"] for kernel in found["kernels"])
        lines.append(
            f"  {name:52}{number(found['device_ms']['median'], '9.4f')}"
            f"{number(found['TB/s'], '7.2f')}{number(found['share'], '7.3f')}"
            f"{launches:>4.0f} kernels"
        )
    return "\n".join(lines + [f"  {name}: {why}" for name, why in case["refused"].items()])


def products_text(case: Record) -> str:
    """A size: PyTorch's time, and the others' ratios to it."""
    lines = [f"products at {size_of(case)}, {case['dtype']}: ms of PyTorch, ratios to it"]
    for each in case["products"]:
        told = "".join(
            f"  {name} {ratio:.3f}" for name, ratio in each["ratios"].items() if name != "PyTorch"
        )
        lines.append(f"  {each['name']:12}{each['ms']['PyTorch']:9.4f}{told}")
    told = "".join(f"  {name} {ratio:.3f}" for name, ratio in case["ratios"].items())
    lines.append(f"  {'together':12}{case['sums_ms']['PyTorch']:9.4f}{told}")
    reasons = {why for each in case["products"] for why in each["refused"].values()}
    return "\n".join(lines + [f"  {why}" for why in sorted(reasons)])


def grouped_text(case: Record) -> str:
    """One line for each column."""
    lines = [f"grouped step, {case['name']}: ms"]
    for name, column in case["columns"].items():
        device, wall = (milliseconds(column, clock) for clock in ("device", "wall"))
        lines.append(f"  {name:30}{number(device)}{number(wall)}")
        lines.append(f"    {kernels_text(column, 6)}")
    return "\n".join(lines + [f"  {name}: {why}" for name, why in case["refused"].items()])


TEXT = {
    "steps": steps_text,
    "bandwidth": bandwidth_text,
    "products": products_text,
    "grouped": grouped_text,
}


def cases_of(results: Record, part: str) -> list[Record]:
    """The records of a part."""
    found: list[Record] = results["parts"].get(part, {}).get("cases", [])
    return found


def text(results: Record) -> str:
    """Everything, the targets last."""
    lines = [f"{results['machine']}, {results['date']}"]
    for part, told in TEXT.items():
        lines += [told(case) for case in cases_of(results, part)]
    lines += [str(target) for target in targets(results)]
    lines += [f"not measured: {name}" for name in results["not_measured"]]
    return "\n".join(lines)


def markdown(results: Record) -> str:
    """README's tables: steps, products, grouped steps, and shares of bandwidth."""
    tables = (steps_markdown, ratios_markdown, grouped_markdown, bandwidth_markdown)
    found = ["\n".join(table(results)) for table in tables]
    return "\n\n".join(table for table in found if table)


def _head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _size(case: Record) -> str:
    return ", ".join(map(str, size_of(case)))


def _pair(case: Record, recipe: str, clock: str = "device") -> str:
    """`8.22 / 6.88 (1.19)`: ours, TransformerEngine's and the ratio."""
    columns = case["columns"]
    own, other = (milliseconds(columns.get(f"{recipe}/{n}"), clock) for n in (OURS, ENGINE))
    if own is None:
        return "-"
    return f"{own:.2f}" if other is None else f"{own:.2f} / {other:.2f} ({own / other:.2f})"


def steps_markdown(results: Record) -> Iterator[str]:
    """Milliseconds of the GPU's kernels in a step, ours beside TransformerEngine's."""
    cases = cases_of(results, "steps")
    if cases:
        yield from _head(["rows, H, F", *(f"{r}: ours / TE" for r in RECIPES), "six products"])
    for case in cases:
        six = milliseconds(case["columns"].get(SIX), "device")
        cells = [_pair(case, recipe) for recipe in RECIPES]
        yield _row([_size(case), *cells, number(six, "1.2f")])


def ratios_markdown(results: Record) -> Iterator[str]:
    """In bf16, ours over the others', by kernels' time and as CUDA graphs; memory."""
    cases = cases_of(results, "steps")
    others = ("nn.Sequential", "torch.compile", "Liger", ENGINE)
    if cases:
        yield from _head(["rows, H, F", *others, "saved / TE, bytes a row", "peak / TE"])
    for case in cases:
        columns = case["columns"]
        own = columns.get(f"bf16/{OURS}", {})
        cells = []
        for name in others:
            ratios = []
            for clock in ("device", "graph"):
                one, two = (milliseconds(c, clock) for c in (own, columns.get(f"bf16/{name}")))
                ratios.append(f"{one / two:.2f}" if one and two else "-")
            cells.append(", ".join(ratios))
        engine = columns.get(f"bf16/{ENGINE}", {})
        saved = [
            f"{each['saved_bytes'] / case['rows']:,.0f}" if each.get("saved_bytes") else "-"
            for each in (own, engine)
        ]
        peak, theirs = own.get("peak_bytes"), engine.get("peak_bytes")
        cells += [" / ".join(saved), f"{peak / theirs:.2f}" if peak and theirs else "-"]
        yield _row([_size(case), *cells])


def grouped_markdown(results: Record) -> Iterator[str]:
    """Milliseconds of the kernels in a step of groups."""
    cases = cases_of(results, "grouped")
    names = (OURS, "torch._grouped_mm", "torch._grouped_mm, compiled")
    if cases:
        yield from _head(["GroupedLinear, SwiGLU, GroupedLinear", *names])
    for case in cases:
        found = [milliseconds(case["columns"].get(name), "device") for name in names]
        yield _row([case["name"], *(number(each, "1.2f") for each in found)])


def bandwidth_markdown(results: Record) -> Iterator[str]:
    """Shares of a copy's bandwidth."""
    cases = cases_of(results, "bandwidth")
    if cases:
        yield from _head(["", "rows, columns", "share of a copy's bandwidth"])
    for case in cases:
        shares = [f"{n} {found['share']:.2f}" for n, found in case["functions"].items()]
        name = case.get("scaling", case["group"])
        yield _row([name, f"{case['rows']}, {case['width']}", "; ".join(shares)])


def bars(results: Record, folder: Path, stem: str) -> list[Path]:
    """PNG files: device time of steps, and shares of bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for name, draw in (("", draw_steps), ("_bandwidth", draw_bandwidth)):
        figure = draw(results)
        if figure is not None:
            made.append(folder / f"{stem}{name}.png")
            figure.savefig(made[-1], dpi=110)
    return made


def draw_steps(results: Record) -> Any:
    """One panel a size, one group of bars a recipe; the six products as a line."""
    from matplotlib import pyplot as plt

    cases = cases_of(results, "steps")
    if not cases:
        return None
    names = list(
        dict.fromkeys(
            name.partition("/")[2] for case in cases for name in case["columns"] if "/" in name
        )
    )
    figure, axes = plt.subplots(
        1, len(cases), figsize=(4.2 * len(cases), 4.2), layout="constrained", squeeze=False
    )
    width = 0.85 / len(names)
    for axis, case in zip(axes[0], cases, strict=True):
        for place, name in enumerate(names):
            found = [
                (k, milliseconds(case["columns"].get(f"{recipe}/{name}"), "device"))
                for k, recipe in enumerate(RECIPES)
            ]
            there = [(k + place * width, value) for k, value in found if value is not None]
            if there:
                axis.bar(*zip(*there, strict=True), width, label=name, align="edge")
        six = milliseconds(case["columns"].get(SIX), "device")
        if six is not None:
            axis.axhline(six, color="black", linewidth=0.8, linestyle="--", label=f"{SIX}, bf16")
        axis.set_xticks([k + 0.42 for k in range(len(RECIPES))], RECIPES)
        axis.set_title(_size(case))
        axis.set_ylabel("device time of a step, ms")
    axes[0][0].legend(fontsize=8)
    return figure


def draw_bandwidth(results: Record) -> Any:
    """One bar a function."""
    from matplotlib import pyplot as plt

    bars_of = [
        (f"{name}, {case.get('scaling', '')} [{case['rows']}, {case['width']}]", found["share"])
        for case in cases_of(results, "bandwidth")
        for name, found in case["functions"].items()
    ]
    if not bars_of:
        return None
    labels, shares = zip(*reversed(bars_of), strict=True)
    figure, axis = plt.subplots(figsize=(9, 0.19 * len(labels) + 1), layout="constrained")
    axis.barh(labels, shares)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("share of the bandwidth of a copy of as many bytes")
    axis.margins(y=0.005)
    return figure
