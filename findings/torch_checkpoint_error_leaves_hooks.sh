#!/usr/bin/env bash
# In PyTorch 2.11 an exception from a checkpointed function that is caught and kept spoils what is
# computed next: its backward runs the function again, and raises the exception once more.
#
# Packages: torch 2.11.0 and 2.13.0, numpy 2.4.1; on the CPU. Minutes to install, more than ten on a
#   busy machine, and gigabytes of disk where the registry has CUDA builds; one is removed before the
#   other comes.
# Seen: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False), whose function raises.
#   While the exception is referred to, (y * y).sum().backward() of a tensor that has nothing to do
#   with it raises the function's exception in 2.11.0; in 2.13.0 it gives the gradient. Without the
#   reference both do. Code that collects errors, to log them later, meets it.
# Why: the hooks that the checkpoint sets for saved tensors stay as long as its generator lives, which
#   the traceback holds.
# Expected: hooks that end with the call, however it ends.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/kept.py" <<'PYTHON'
import sys

import torch
from torch.utils.checkpoint import checkpoint


def refuses(x):
    raise ValueError("refused")


def attempt(keep):
    kept = None
    try:
        checkpoint(refuses, torch.ones(2, requires_grad=True), use_reentrant=False)
    except ValueError as error:
        kept = error if keep else None
    y = torch.ones(3, requires_grad=True)
    z = (y * y).sum()
    try:
        z.backward()
    except ValueError as error:
        return f"raises_{error}"
    assert y.grad.tolist() == [2.0] * 3
    del kept
    return "right"


found = [attempt(False), attempt(True)]
print(f"torch {torch.__version__}: exception dropped {found[0]}, kept {found[1]}")
raise SystemExit(found != sys.argv[1:])
PYTHON
while read -r version expected; do
	python3 -m venv "$folder/venv"
	"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
		"torch==$version" numpy==2.4.1 </dev/null
	# shellcheck disable=SC2086
	"$folder/venv/bin/python" "$folder/kept.py" $expected </dev/null || { echo changed; exit 1; }
	rm -rf "$folder/venv"
done <<'CASES'
2.11.0 right raises_refused
2.13.0 right right
CASES
echo "as described: an exception that is kept spoils the next backward in 2.11.0"
