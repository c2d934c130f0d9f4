"""`python -m tests.mutation.found_again`: the fuzzer finds faults whose mends are taken back.

Each of `reverted` is planted in a copy of the package in a temporary folder, in which lives are
lived from a seed on until one fails, which must not fail without the fault. Which did, at which
step and after how many seconds is written to `benchmarks/results/found_again.json`. The exit status
is 1 if a fault was not found.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from .__main__ import copy, lives_of, run
from .form import ROOT, Fault, plant
from .reverted import REPORTS, REVERTED

RECORD = ROOT / "benchmarks" / "results" / "found_again.json"


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation.found_again", description=__doc__
    )
    parser.add_argument("names", nargs="*", help="parts of faults' names (default all faults)")
    parser.add_argument("--seconds", type=int, default=60, help="of lives, at most (default 60)")
    parser.add_argument("--out", type=Path, default=RECORD)
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    chosen = [f for f in REVERTED if any(name in f.name for name in given.names or [""])]
    with tempfile.TemporaryDirectory(prefix="opsgraph-found-again-") as folder:
        root = Path(folder) / "opsgraph"
        copy(root)
        for fault in chosen:
            record[fault.name] = found = found_by(fault, root, given.seconds)
            given.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            print(fault.name, found.get("life"), found.get("said", "not found"), flush=True)
    again = {name for name, found in record.items() if found["found"]}
    reports = [number for number, names in REPORTS.items() if again.intersection(names)]
    print(f"{len(again)} of {len(record)} faults, {len(reports)} of {len(REPORTS)} reports found")
    return int(not again.issuperset(fault.name for fault in chosen))


def found_by(fault: Fault, root: Path, seconds: int) -> dict[str, Any]:
    """Which life finds a fault that does not fail without it."""
    with plant(fault, root):
        outcome = run(lives_of(fault.seed, seconds), root, fault.interpreted)
    place = re.match(r"FAILED life (\d+), step (\d+): (.*)", outcome["by"])
    if place is None:
        return {"breaks": fault.breaks, "found": False}
    life, step, said = int(place[1]), int(place[2]), place[3]
    alone = run(lives_of(life, seconds, 1), root, fault.interpreted)
    found = {"breaks": fault.breaks, "found": not alone["noticed"], "life": life, "step": step}
    return found | {"said": said, "seconds": outcome["seconds"]}


if __name__ == "__main__":
    raise SystemExit(main())
