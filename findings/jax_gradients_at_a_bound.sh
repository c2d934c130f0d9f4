#!/usr/bin/env bash
# JAX: four ways to bound a value have three gradients at the bound.
#
# Packages: jax and jaxlib 0.10.2 (CPU), ml_dtypes 0.6.0, numpy 2.4.1. A minute to install.
# Seen, at x equal to the upper bound: the gradient of jnp.clip is 0.5 (as jnp.minimum's, a tie),
#   of lax.clamp 0, of jax.nn.relu6 0 and of jax.nn.hard_tanh 1; eager and jitted alike. Values
#   are equal everywhere, so one form is easily taken for another: of bf16 values that reach a
#   limit, such as that of a clamped gated activation, training differs.
# Expected: one convention for functions that compute the same, or a word in their documentation.
# Exit status: 0 while this is so, 1 once anything of it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
	jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
functions = {
    "jnp.clip(x, -1, 1)": (lambda x: jnp.clip(x, -1.0, 1.0), 0.5),
    "jnp.minimum(x, 1)": (lambda x: jnp.minimum(x, 1.0), 0.5),
    "lax.clamp(-1, x, 1)": (lambda x: jax.lax.clamp(-1.0, x, 1.0), 0.0),
    "relu6(x + 5)": (lambda x: jax.nn.relu6(x + 5.0), 0.0),
    "hard_tanh(x)": (jax.nn.hard_tanh, 1.0),
}
changed = False
for name, (function, before) in functions.items():
    eager = float(jax.grad(function)(1.0))
    jitted = float(jax.jit(jax.grad(function))(1.0))
    changed |= (eager, jitted) != (before, before)
    print(f"{name:20} at the bound 1: gradient {eager}, jitted {jitted}")
print("changed" if changed else "as described: 0.5, 0 and 1")
raise SystemExit(changed)
PYTHON
