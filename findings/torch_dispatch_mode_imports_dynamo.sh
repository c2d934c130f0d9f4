#!/usr/bin/env bash
# PyTorch: the first operation under a TorchDispatchMode imports Dynamo and Inductor.
#
# Packages: torch 2.13.0 (CPU), numpy 2.4.1.
# Seen: `import torch` leaves torch._dynamo out. The first operation under any TorchDispatchMode,
#   here one that hands on what it gets, imports torch._dynamo and torch._inductor, some 900 modules:
#   about a second, where the addition takes microseconds. No compiler is asked for.
# Expected: a mode that compiles nothing costs what its function does.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/mode.py" <<'PYTHON'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HandOn(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def imported():
    return [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]


x = torch.ones(2)
before, modules = imported(), len(sys.modules)
with HandOn():
    x + x
print(f"torch {torch.__version__}: before {before}, after {imported()}")
raise SystemExit(bool(before) or len(imported()) < 2 or len(sys.modules) - modules < 300)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" "$folder/mode.py" || { echo changed; exit 1; }
echo "as described: one operation under a mode imported the compiler"
