"""`python -m tests.mutation`: plants faults one by one, and records what notices each.

A copy of the package and its tests is made in a temporary folder. First all that the faults name
has to pass in the copy as it is. Then each fault is planted there; the tests that it names are run
until one fails, and lives of the fuzzer until one fails. What was noticed is written to
`benchmarks/results/mutation.json` after each fault; a fault that stands there is not run again
without `--again`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .faults import FAULTS
from .form import ROOT, Fault, plant
from .reverted import REVERTED

RECORD = ROOT / "benchmarks" / "results" / "mutation.json"
LIMIT = 600
"""Seconds after which tests count as failed: a fault may make something wait for ever."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a fault was noticed by no test, 2 if tests fail without one."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of faults' names (default all faults)")
    parser.add_argument("--fuzz", type=int, default=120, help="seconds of lives, 0 for none")
    parser.add_argument("--again", action="store_true", help="also those that are recorded")
    given = parser.parse_args(arguments)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    chosen = [
        fault
        for fault in (*FAULTS, *REVERTED)
        if any(name in fault.name for name in given.names or [""])
        if given.again or fault.name not in record
    ]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="opsgraph-mutation-") as folder:
        root = Path(folder) / "opsgraph"
        copy(root)
        if (failure := wrong_without(chosen, root, given.fuzz)) is not None:
            print(f"fails without a fault: {failure}")
            return 2
        for fault in chosen:
            checks = {"tests": tests_of(fault.tests, fault.interpreted)}
            if given.fuzz:
                checks["fuzzer"] = lives_of(fault.seed, given.fuzz)
            with plant(fault, root):
                found = {name: run(c, root, fault.interpreted) for name, c in checks.items()}
            record[fault.name] = {"breaks": fault.breaks, **found}
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            missed += not found["tests"]["noticed"]
            told = "; ".join(f"{name} {told_of(outcome)}" for name, outcome in found.items())
            print(f"{fault.name}: {told}", flush=True)
    return int(missed > 0)


def copy(root: Path) -> None:
    """All files of the repository that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)


def wrong_without(faults: Iterable[Fault], root: Path, seconds: int) -> str | None:
    """What fails in the copy as it is, of all tests and lives that the faults name."""
    named: dict[bool, set[str]] = {False: set(), True: set()}
    lives = set()
    for fault in faults:
        named[fault.interpreted] |= {*fault.tests}
        lives.add((fault.seed, fault.interpreted))
    commands = [(tests_of(sorted(tests), way), way) for way, tests in named.items() if tests]
    commands += [(lives_of(seed, seconds), way) for seed, way in sorted(lives) if seconds]
    outcomes = (run(command, root, way, 1800) for command, way in commands)
    return next((outcome["by"] for outcome in outcomes if outcome["noticed"]), None)


def tests_of(tests: Iterable[str], interpreted: bool) -> list[str]:
    """The command that runs tests until one fails."""
    plugin = ["-p", "tests.kernels.interpreted.quick_interpreter"] if interpreted else []
    paths = [f"tests/{name}" for name in tests]
    options = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, *plugin, *paths]


def lives_of(seed: int, seconds: int, *most: int) -> list[str]:
    """The command that lives lives until one fails. most: how many, if not any number."""
    return [sys.executable, "-m", "tests.mutation.lives", *map(str, (seed, seconds, *most))]


def run(
    command: Sequence[str], root: Path, interpreted: bool, limit: int = LIMIT
) -> dict[str, Any]:
    """Whether a command failed in the copy, after how many seconds, and what it said of it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "OPSGRAPH"))}
    environment |= {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(root.parent / "cache")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # its dates are to the second
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=root, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        said = f"FAILED to end within {limit} s"
    lines = said.strip().splitlines() or [""]
    by = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    seconds = round(time.monotonic() - start, 1)
    noticed = process.returncode != 0
    return {"noticed": noticed, "seconds": seconds, "by": by[:160] if noticed else ""}


def told_of(outcome: dict[str, Any]) -> str:
    """An outcome in words."""
    return f"{outcome['by'] if outcome['noticed'] else 'NOTHING'} ({outcome['seconds']} s)"


if __name__ == "__main__":
    raise SystemExit(main())
