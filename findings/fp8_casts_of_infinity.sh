#!/usr/bin/env bash
# PyTorch 2.13 makes a finite E4M3 of infinity; ml_dtypes (so JAX) a NaN. E8M0 differs as well.
#
# Packages: torch 2.13.0, ml_dtypes 0.6.0, numpy 2.4.1; on the CPU. Minutes to install, and
#   gigabytes where the registry has a CUDA build of torch.
# Seen: `.to(torch.float8_e4m3fn)` of inf, and of all that rounds beyond 448, is 448; ml_dtypes
#   says NaN to both (and so did PyTorch 2.11). E5M2, which can hold it, keeps inf in both.
#   `.to(torch.float8_e8m0fnu)` of 0 is 2^-127 and of -4 is 4; ml_dtypes says NaN to both.
# Expected: one of the two everywhere. An overflow that a loss scaler has to see gets lost with
#   E4M3 and not with E5M2, and a negative scale becomes a positive one.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

print(*(f"{name} {version(name)}" for name in ("torch", "ml_dtypes", "numpy")), sep=", ")
inf, nan = float("inf"), float("nan")
cases = {  # values, then what torch and ml_dtypes make of them
    "float8_e4m3fn": ([inf, -inf, 500.0, 448.0], [448, -448, 448, 448], [nan, nan, nan, 448]),
    "float8_e5m2": ([inf, -inf, 65536.0, 448.0], [inf, -inf, inf, 448], [inf, -inf, inf, 448]),
    "float8_e8m0fnu": ([0.0, -4.0, 4.0], [2.0**-127, 4, 4], [nan, nan, 4]),
}
changed = False
for name, (values, by_torch, by_ml_dtypes) in cases.items():
    first = torch.tensor(values).to(getattr(torch, name)).float().numpy()
    array = np.array(values, np.float32).astype(getattr(ml_dtypes, name))
    second = array.astype(np.float32)
    same = np.array_equal(first, np.float32(by_torch), equal_nan=True)
    same &= np.array_equal(second, np.float32(by_ml_dtypes), equal_nan=True)
    changed |= not same
    print(f"{name:14} of {values}: torch {first.tolist()}, ml_dtypes {second.tolist()}")
print("changed" if changed else "as described: they differ")
raise SystemExit(changed)
PYTHON
