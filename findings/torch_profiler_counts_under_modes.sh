#!/usr/bin/env bash
# torch.profiler counts an op twice that a TorchDispatchMode sees.
#
# Packages: torch 2.13.0, numpy 2.4.1; on the CPU. Minutes to install, and gigabytes where the
#   registry has a CUDA build of torch.
# Seen: with a mode on the stack that hands every op on unchanged, `key_averages` says 2 calls of
#   aten::mm for one `torch.mm`; with two such modes it says 3. Without a mode it says 1. The op's
#   kernel runs once in each case.
# Expected: one call. Whoever counts ops, or adds up their times, under FlopCounterMode, selective
#   checkpoints or a mode of a library's own, counts some of them as often as modes are active.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PYTHON'
from contextlib import ExitStack
from importlib.metadata import version

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

print(f"torch {version('torch')}")


class HandOn(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        HandOn.seen += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


x = torch.randn(8, 8)
counts = []
for modes in range(3):
    with profile(activities=[ProfilerActivity.CPU]) as profiler, ExitStack() as stack:
        for _ in range(modes):
            stack.enter_context(HandOn())
        torch.mm(x, x)
    counts.append({entry.key: entry.count for entry in profiler.key_averages()}["aten::mm"])
print(f"calls of aten::mm with 0, 1 and 2 modes: {counts}; modes were asked {HandOn.seen} times")
same = counts == [1, 2, 3] and HandOn.seen == 3
print("as described" if same else "changed")
raise SystemExit(not same)
PYTHON
