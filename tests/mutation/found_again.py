"""`python -m tests.mutation.found_again`: the fuzzer finds faults whose mends are taken back.

Each of `reverted` is planted in a copy of the package in a temporary folder, in which lives are
lived from a seed on until one fails. Which did, at which step and after how many seconds is written
to `benchmarks/results/found_again.json`. The exit status is 1 if a fault was not found.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

from .__main__ import copy, lives_of, run
from .form import ROOT, plant
from .reverted import REVERTED

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
    missed = 0
    with tempfile.TemporaryDirectory(prefix="opsgraph-found-again-") as folder:
        root = Path(folder) / "opsgraph"
        copy(root)
        for fault in REVERTED:
            if not any(name in fault.name for name in given.names or [""]):
                continue
            with plant(fault, root):
                command = lives_of(fault.seed, given.seconds)
                outcome = run(command, root, fault.interpreted)
            place = re.match(r"FAILED life (\d+), step (\d+): (.*)", outcome["by"])
            found = {"breaks": fault.breaks, "found": place is not None}
            if place is not None:
                life, step, said = int(place[1]), int(place[2]), place[3]
                found |= {"life": life, "step": step, "said": said, "seconds": outcome["seconds"]}
            missed += place is None
            record[fault.name] = found
            given.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            print(fault.name, found.get("life"), found.get("said", outcome["by"]), flush=True)
    print(f"{sum(r['found'] for r in record.values())} of {len(record)} found")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
