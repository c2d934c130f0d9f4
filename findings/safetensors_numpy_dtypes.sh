#!/usr/bin/env bash
# safetensors.numpy writes arrays of ml_dtypes that it cannot read.
#
# Packages: safetensors 0.8.0, ml_dtypes 0.6.0, numpy 2.4.1. Small: some seconds to install.
# Seen: `save` and `save_file` accept bfloat16, float8_e4m3fn, float8_e5m2 and float8_e8m0fnu and
#   write BF16, F8_E4M3, F8_E5M2 and F8_E8M0. Of those bytes `load` raises KeyError for all four;
#   `load_file` and `safe_open(..., "np")` read bfloat16 and raise AttributeError for the FP8 ones,
#   because they look for the types in numpy itself.
# Expected: what a module's save accepts its load gives back, and load and load_file agree; or save
#   refuses. As it is, the error comes when a checkpoint is needed, not when it is written.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.4.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, load_file, save, save_file

print(*(f"{name} {version(name)}" for name in ("safetensors", "ml_dtypes", "numpy")), sep=", ")


def outcome(read, array):
    try:
        back = read()
    except Exception as error:
        return type(error).__name__
    return "equal" if back.dtype == array.dtype and np.array_equal(back, array) else "differs"


expected = {
    "bfloat16": ("KeyError", "equal", "equal"),
    "float8_e4m3fn": ("KeyError", "AttributeError", "AttributeError"),
    "float8_e5m2": ("KeyError", "AttributeError", "AttributeError"),
    "float8_e8m0fnu": ("KeyError", "AttributeError", "AttributeError"),
}
changed = False
for name, before in expected.items():
    array = np.arange(1, 9).astype(getattr(ml_dtypes, name))
    written = save({"a": array})
    save_file({"a": array}, "file")
    now = (
        outcome(lambda: load(written)["a"], array),
        outcome(lambda: load_file("file")["a"], array),
        outcome(lambda: safe_open("file", "np").get_tensor("a"), array),
    )
    changed |= now != before
    print(f"{name:15} saved; load: {now[0]}, load_file: {now[1]}, safe_open: {now[2]}")
print("changed" if changed else "as described: saved, but not read back")
raise SystemExit(changed)
PYTHON
