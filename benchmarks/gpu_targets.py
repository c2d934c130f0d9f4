"""What the results of `benchmarks.gpu` are held against, and how far they are."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
OURS, ENGINE, SIX = "opsgraph", "TE LayerNormMLP", "six products"
QUANTIZED = ("current", "delayed", "blocks")
OF_PRODUCTS = {
    (8192, 4096, 14336): 1.00,
    (4096, 8192, 28672): 1.00,
    (8192, 2048, 5632): 1.02,
    (2048, 4096, 14336): 1.02,
    (8192, 1024, 3584): 1.10,
}
"""Of a step in bf16 over its six products, by rows, hidden and ffn."""
OF_BF16 = {(8192, 4096, 14336): 1.65, (8192, 2048, 5632): 1.35}
"""How many times faster a step under current scaling is to be."""
CLOCKS = {"device": "device time", "graph": "wall time as a CUDA graph"}


class Target(NamedTuple):
    """A figure and its limit: `at_least`, or at most."""

    name: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is met, as exactly as it is printed."""
        found = round(self.found, 3)
        return found >= self.limit if self.at_least else found <= self.limit

    def __str__(self) -> str:
        told = "reached" if self.reached else "not reached"
        word = "at least" if self.at_least else "at most"
        return f"{told:<12}{self.found:>7.3f}  {word} {self.limit:<7.4g} {self.name}"


def size_of(case: Record) -> tuple[int, int, int]:
    """Rows, hidden and ffn."""
    return case["rows"], case["hidden"], case["ffn"]


def milliseconds(column: Record | None, clock: str) -> float | None:
    """A column's time by a clock: "device", "wall" or "graph"; None where it has none."""
    found = (column or {}).get(f"{clock}_ms")
    if isinstance(found, Mapping):
        return float(found["median"])
    return None if found is None else float(found)


def _ratio(case: Record, one: str, other: str, clock: str) -> float | None:
    columns = case["columns"]
    first, second = (milliseconds(columns.get(name), clock) for name in (one, other))
    return None if first is None or second is None else first / second


def step_targets(case: Record) -> Iterator[Target]:
    """Those of one size."""
    size, where = size_of(case), f"at {size_of(case)}"

    def compared(one: str, other: str, clock: str, limit: float, at_least: bool = False) -> Any:
        ratio = _ratio(case, one, other, clock)
        if ratio is not None:
            yield Target(f"{one} / {other}, {CLOCKS[clock]}, {where}", ratio, limit, at_least)

    for recipe in QUANTIZED:
        yield from compared(f"{recipe}/{OURS}", f"{recipe}/{ENGINE}", "device", 0.93)
    if size in OF_PRODUCTS:
        yield from compared(f"bf16/{OURS}", SIX, "device", OF_PRODUCTS[size])
    for clock in CLOCKS:
        for other in (ENGINE, "torch.compile", "Liger"):
            yield from compared(f"bf16/{OURS}", f"bf16/{other}", clock, 0.95)
        if size in OF_BF16:
            yield from compared(
                f"bf16/{OURS}", f"current/{OURS}", clock, OF_BF16[size], at_least=True
            )
    for recipe in ("bf16", *QUANTIZED):
        yield from _memory_targets(case, recipe, where)


def _memory_targets(case: Record, recipe: str, where: str) -> Iterator[Target]:
    own, other = (case["columns"].get(f"{recipe}/{name}", {}) for name in (OURS, ENGINE))
    rows, hidden, ffn = size_of(case)
    if own.get("saved_bytes"):
        limit = 2 * hidden + 4 * ffn + 4
        name = f"saved bytes a row / (2H + 4F + 4), {recipe}, {where}"
        yield Target(name, own["saved_bytes"] / rows / limit, 1.0)
    if own.get("peak_bytes") and other.get("peak_bytes"):
        name = f"peak memory / {ENGINE}'s, {recipe}, {where}"
        yield Target(name, own["peak_bytes"] / other["peak_bytes"], 0.85)


def bandwidth_targets(case: Record) -> Iterator[Target]:
    """Those of one group of functions."""
    shape = [case["rows"], case["width"]]
    size = 2 * shape[0] * shape[1]
    for name, found in case["functions"].items():
        limit = None
        if name.endswith("Norm backward"):
            limit = 0.85 if size >= 2**26 else 0.70 if shape == [8192, 1024] else None
        elif name == "LayerNorm forward":
            limit = 0.92 if size >= 2**26 else None
        elif "cast" in name and "both copies" in name and case["scaling"] != "nvfp4":
            limit = 0.88
        if limit is not None:
            scaling = f", {case['scaling']}" if "scaling" in case else ""
            told = f"share of a copy's bandwidth: {name}{scaling}, {shape}"
            yield Target(told, found["share"], limit, at_least=True)


def grouped_targets(case: Record) -> Iterator[Target]:
    """That of one case of groups."""
    columns = case["columns"]
    own, other = (
        milliseconds(columns.get(name), "device") for name in (OURS, "torch._grouped_mm, compiled")
    )
    if own is not None and other is not None:
        told = f"grouped step / torch._grouped_mm, compiled: {case['name']}"
        yield Target(told, own / other, 0.92)


def targets(results: Record) -> list[Target]:
    """All that the results say something about."""
    found: list[Target] = []
    for part, of in (
        ("steps", step_targets),
        ("bandwidth", bandwidth_targets),
        ("grouped", grouped_targets),
    ):
        for case in results["parts"].get(part, {}).get("cases", []):
            found.extend(of(case))
    return found
