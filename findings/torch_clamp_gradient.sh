#!/usr/bin/env bash
# PyTorch 2.14 changed the gradient of torch.clamp at the bound: it was 1 and is 0, or a half.
#
# Packages: torch 2.13.0 and 2.14.1, numpy 2.4.1; on the CPU. Minutes to install, more than
#   ten on a busy machine, and gigabytes of disk where the registry has CUDA builds; one is
#   removed before the other comes.
# Seen, at x equal to the bound: clamp(-1, 1) with numbers has the gradient 1 in 2.13.0 and 0 in
#   2.14.1; with the same bounds as tensors it is 1 in 2.13.0 and 0.5 in 2.14.1; that of relu6 is 0
#   in both. Values do not differ. In bf16 values do hit a limit such as 7, so an activation that
#   is clamped trains otherwise after an upgrade.
# Expected: the same in both versions, and for a bound given as a number or as a tensor.
#   `torch.where(x > limit, limit, x)` has the gradient 1 in both.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/clamp.py" <<'PYTHON'
import sys

import torch

one = torch.tensor(1.0)
functions = (
    lambda x: x.clamp(-1, 1),
    lambda x: x.clamp(-one, one),
    lambda x: torch.nn.functional.relu6(x + 5),
    lambda x: torch.where(x > 1, 1.0, x),
)
now = []
for function in functions:
    x = torch.tensor([1.0], requires_grad=True)
    now.append(torch.autograd.grad(function(x).sum(), x)[0].item())
names = "clamp", "clamp by tensors", "relu6", "where"
said = ", ".join(f"{name} {value}" for name, value in zip(names, now))
print(f"torch {torch.__version__}, gradient at the bound: {said}")
raise SystemExit(now != [float(value) for value in sys.argv[1:]])
PYTHON
while read -r version expected; do
	python3 -m venv "$folder/venv"
	"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
		"torch==$version" numpy==2.4.1 </dev/null
	# shellcheck disable=SC2086
	"$folder/venv/bin/python" "$folder/clamp.py" $expected </dev/null || { echo changed; exit 1; }
	rm -rf "$folder/venv"
done <<'CASES'
2.13.0 1 1 0 1
2.14.1 0 0.5 0 1
CASES
echo "as described: 1 and 1 before, 0 and a half now"
