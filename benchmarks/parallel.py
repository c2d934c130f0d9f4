"""A model of the step time of a tensor-parallel LayerNormMLP on nodes of eight H100 or H200.

Nothing of it is measured: times follow from FLOPs, bytes and link bandwidths, all
stated in `GPUS`, `NODE` and `PROTOCOLS` with their source. One step is forward and backward of a
gated block without biases in bf16, on one sequence, under sequence parallelism. "plain" runs one
collective after the other between the GEMMs; "overlapped" is what the fusers of
`opsgraph.fusers.exchanges` do. Prints a table, draws a plot and writes both.

    python -m benchmarks.parallel [--hidden 8192] [--ffn 28672] [--gloo] [--out FOLDER]

--gloo also runs the overlap fusers on two ranks of this machine, beside their prediction.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pipeline import beside, pieced
from opsgraph.kernels.exchange.pieces import cuts

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = tuple(1024 * 2**k for k in range(1, 8))
BYTES = 2  # of a bf16


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU in FLOP/s and bytes/s, as its data sheet gives them."""

    name: str
    flops: float
    memory: float
    multiprocessors: int = 132


GPUS = (
    # NVIDIA H100 data sheet, SXM: 989.4 TFLOP/s bf16 without sparsity, HBM3 3.35 TB/s.
    Gpu("H100", 989.4e12, 3.35e12),
    # NVIDIA H200 data sheet, SXM: the same multiprocessors, HBM3e 4.8 TB/s.
    Gpu("H200", 989.4e12, 4.8e12),
)


@dataclass(frozen=True)
class Node:
    """Links of one GPU, bytes/s in one direction, and how many GPUs share a node."""

    gpus: int
    nvlink: float
    network: float


# NVLink 4 is 900 GB/s for both directions (H100 data sheet); beyond the node, one 400 Gb/s
# adapter for each GPU (DGX H100 data sheet).
NODE = Node(8, 450e9, 50e9)

# (base, a step over NVLink, a step over the network) in seconds, and the share of the bandwidth:
# rings of NCCL's protocols Simple, LL128 and LL, from the table in its src/graph/tuning.cc.
PROTOCOLS = (
    (8.4e-6, 3.4e-6, 14.0e-6, 1.0),
    (14.0e-6, 1.9e-6, 4.0e-6, 0.92),
    (6.6e-6, 0.6e-6, 2.7e-6, 0.5),
)

# Shares of the peaks that large transfers and products reach. Assumptions, near what is published:
# 0.8 is 790 TFLOP/s of a large bf16 product and 360 GB/s of NCCL's bus bandwidth over NVLink.
REACHED_FLOPS, REACHED_MEMORY, REACHED_LINK = 0.8, 0.9, 0.8
TILE = (128, 256)  # of the result that a multiprocessor computes at a time
BUSY = 16  # multiprocessors that a running collective takes from a product


@dataclass(frozen=True)
class Machine:
    """A GPU, and how many ranks a layer is split over."""

    gpu: Gpu
    ranks: int

    def product(self, m: int, n: int, k: int) -> float:
        """Seconds of an [m, k] by [k, n] product: whole waves of tiles, or its bytes."""
        tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
        units = self.gpu.multiprocessors
        work = math.ceil(tiles / units) * units * TILE[0] * TILE[1] * 2 * k
        moved = BYTES * (m * n + n * k + m * k)
        return max(work / (self.gpu.flops * REACHED_FLOPS), self.pointwise(moved))

    def pointwise(self, moved: float) -> float:
        """Seconds of reading and writing some bytes."""
        return moved / (self.gpu.memory * REACHED_MEMORY)

    def gather(self, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes, all ranks' pieces together.

        A ring: every link passes (ranks - 1) / ranks of it. The rings of a node's GPUs cross to the
        next node over all its adapters.
        """
        if self.ranks == 1:
            return 0.0
        nodes = math.ceil(self.ranks / NODE.gpus)
        bandwidth = NODE.nvlink if nodes == 1 else min(NODE.nvlink, NODE.gpus * NODE.network)
        carried = size * (self.ranks - 1) / self.ranks / (bandwidth * REACHED_LINK)
        far = nodes - 1
        near = self.ranks - 1 - far
        return min(
            base + near * over_nvlink + far * over_network + carried / share
            for base, over_nvlink, over_network, share in PROTOCOLS
        )

    @property
    def share(self) -> float:
        """Of the product's speed, what a running collective takes."""
        return BUSY / self.gpu.multiprocessors


@dataclass(frozen=True)
class Block:
    """A gated MLP with its norm: hidden and ffn widths, and the length of the sequence."""

    hidden: int
    ffn: int
    length: int


def pipelined(machine: Machine, m: int, n: int, k: int, size: float) -> float:
    """A product whose rows arrive from, or leave in, pieces of a collective, as fusers cut them."""
    count = len(cuts(m // machine.ranks)) if machine.ranks > 1 else 1
    piece, travel = machine.product(m // count, n, k), machine.gather(size / count)
    return pieced(piece, travel, count, machine.share)


def step(machine: Machine, block: Block) -> dict[str, float]:
    """Seconds of a step: of its products, its pointwise passes, its collectives and the whole."""
    t, hidden, length = machine.ranks, block.hidden, block.length
    ffn = block.ffn / t
    rows = length / t
    inner, wide = round(ffn), round(2 * ffn)
    size = BYTES * length * hidden
    fc1 = machine.product(length, wide, hidden)
    fc2 = machine.product(length, hidden, inner)
    dgrad1, wgrad1 = machine.product(length, hidden, wide), machine.product(wide, hidden, length)
    dgrad2, wgrad2 = machine.product(length, inner, hidden), machine.product(hidden, inner, length)
    # In bytes: the norm reads x and writes y, backward reads x and dy and writes dx; the activation
    # reads [*, 2f] and writes [*, f], backward reads [*, 2f] and [*, f] and writes [*, 2f], [*, f].
    norm = machine.pointwise(BYTES * rows * hidden * 5)
    activation = machine.pointwise(BYTES * length * ffn * (3 + 6))
    products = fc1 + fc2 + dgrad1 + wgrad1 + dgrad2 + wgrad2
    collective = machine.gather(size)
    # Forward: gather the norm's output, scatter FC2's. Backward: gather dy, and the norm's output
    # again for FC1's weight gradient, scatter dx.
    plain = products + norm + activation + 5 * collective
    overlapped = norm + activation + wgrad2
    overlapped += pipelined(machine, length, wide, hidden, size)  # gather, FC1
    overlapped += pipelined(machine, length, hidden, inner, size)  # FC2, scatter
    overlapped += pipelined(machine, length, inner, hidden, size)  # gather dy, FC2's dgrad
    overlapped += beside(dgrad1, collective, machine.share)  # FC1's dgrad, gather
    overlapped += beside(wgrad1, collective, machine.share)  # FC1's wgrad, scatter dx
    return {
        "products": products,
        "pointwise": norm + activation,
        "collectives": 5 * collective,
        "plain": plain,
        "overlapped": overlapped,
    }


def predictions(hidden: int, ffn: int) -> Iterator[dict[str, Any]]:
    """One record for each GPU, number of ranks and length."""
    for gpu in GPUS:
        for ranks in RANKS:
            for length in LENGTHS:
                found = step(Machine(gpu, ranks), Block(hidden, ffn, length))
                yield {"gpu": gpu.name, "ranks": ranks, "length": length, **found}


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds plain and overlapped: a row for each length, a column for each TP."""
    lines = []
    for gpu in GPUS:
        lines.append(f"{gpu.name}: ms a step, plain > overlapped")
        lines.append(f"{'tokens':>7}" + "".join(f"{f'TP {ranks}':>16}" for ranks in RANKS))
        for length in LENGTHS:
            cells = [
                f"{1e3 * r['plain']:.2f} > {1e3 * r['overlapped']:.2f}"
                for r in records
                if r["gpu"] == gpu.name and r["length"] == length
            ]
            lines.append(f"{length // 1024:>6}K" + "".join(f"{cell:>16}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over one GPU against TP, a line for some lengths; dashed without overlap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GPUS), figsize=(10, 4.5), sharey=True, layout="constrained")
    for gpu, axis in zip(GPUS, axes, strict=True):
        axis.plot(RANKS, RANKS, color="lightgray", lw=1, label="linear")
        for k, length in enumerate(LENGTHS[::2]):
            rows = [r for r in records if r["gpu"] == gpu.name and r["length"] == length]
            one = rows[0]["plain"]
            color, label = f"C{k}", f"{length // 1024}K tokens"
            axis.plot(RANKS, [one / r["overlapped"] for r in rows], "o-", color=color, label=label)
            axis.plot(RANKS, [one / r["plain"] for r in rows], "--", color=color, lw=1)
        axis.axvline(NODE.gpus, color="gray", lw=0.8, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axis.set_title(f"{gpu.name}, predicted; dashed: without overlap")
        axis.set_xlabel("tensor-parallel ranks (dotted: one node)")
    axes[0].set_ylabel("times faster than one GPU")
    axes[0].legend()
    figure.savefig(path)
    plt.close(figure)


def assumptions() -> dict[str, Any]:
    """All that the model takes as given."""
    return {
        "gpus": [asdict(gpu) for gpu in GPUS],
        "node": asdict(NODE),
        "protocols": PROTOCOLS,
        "reached": {"flops": REACHED_FLOPS, "memory": REACHED_MEMORY, "link": REACHED_LINK},
        "tile": TILE,
        "multiprocessors of a collective": BUSY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--ffn", type=int, default=28672)
    parser.add_argument("--gloo", action="store_true", help="also measure on two ranks here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = list(predictions(args.hidden, args.ffn))
    title = (
        f"hidden {args.hidden}, ffn {args.ffn}, gated, bf16, one sequence; a model, not measured"
    )
    text = f"{title}\n{table(records)}"
    print(text)
    (args.out / "parallel.txt").write_text(text)
    sizes = {"hidden": args.hidden, "ffn": args.ffn}
    content = {"sizes": sizes, "assumptions": assumptions(), "predicted": records}
    (args.out / "parallel.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(records, args.out / "parallel.svg")
    if args.gloo:
        from benchmarks import parallel_gloo

        parallel_gloo.report(args.out)


if __name__ == "__main__":
    main()
