#!/usr/bin/env bash
# Triton 3.9: the interpreter refuses a mask made of a block and of one number's comparison.
#
# Packages: triton 3.8.0 and 3.9.0, numpy 2.4.1; no GPU, no PyTorch. About a minute to install.
# Seen, with TRITON_INTERPRET=1: tl.store with the mask `(row < n) & (tl.program_id(0) == 0)`, a
#   block and a scalar, works in 3.8.0 and raises InterpreterError, "mask has unsupported dtype",
#   in 3.9.0. Choosing the bound, `row < tl.where(tl.program_id(0) == 0, n, 0)`, works in both.
# Expected: what 3.8.0 does: a scalar condition is broadcast over the block, as the compiler does.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >"$folder/mask.py" <<'PYTHON'
import sys

import numpy as np
import triton
import triton.language as tl


@triton.jit
def combined(address, n, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    y = address.to(tl.pointer_type(tl.int32))
    tl.store(y + row, row, (row < n) & (tl.program_id(0) == 0))


@triton.jit
def chosen(address, n, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    y = address.to(tl.pointer_type(tl.int32))
    tl.store(y + row, row, row < tl.where(tl.program_id(0) == 0, n, 0))


def outcome(kernel):
    y = np.full(8, -1, np.int32)
    try:
        kernel[(2,)](y.ctypes.data, 5, BLOCK=8)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right" if y.tolist() == [0, 1, 2, 3, 4, -1, -1, -1] else f"wrong: {y.tolist()}"


now = outcome(combined), outcome(chosen)
print(f"triton {triton.__version__}: combined: {now[0]}; chosen: {now[1]}")
raise SystemExit(now != (sys.argv[1], "right"))
PYTHON
python3 -m venv "$folder/venv"
for case in "3.8.0=right" "3.9.0=InterpreterError: ValueError('mask has unsupported dtype')"; do
	"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
		"triton==${case%%=*}" numpy==2.4.1
	TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/mask.py" "${case#*=}" ||
		{ echo changed; exit 1; }
done
echo "as described: refused by 3.9.0 alone"
