"""A pytest plugin that takes from Triton's interpreter what costs half its time and shows nothing.

Loaded by `test_interpreted.py`. A process with TRITON_INTERPRET=1 compiles no kernel, so what the
interpreter puts in the place of `triton.language` can stay there.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patched: set[Any] = set()
_scope = SimpleNamespace(restore=lambda: None)


def _patch_once(function: Any) -> SimpleNamespace:
    """Triton does this at each launch and each call inside a kernel, of `tl.sum` too."""
    if function not in _patched:
        _patch(function)
        _patched.add(function)
    return _scope


interpreter._patch_lang = _patch_once

_dtype, _dtypes = interpreter._get_np_dtype, {}


def _dtype_once(kind: Any) -> Any:
    """Triton makes a table of all dtypes at each call."""
    if kind.name not in _dtypes:
        _dtypes[kind.name] = _dtype(kind)
    return _dtypes[kind.name]


interpreter._get_np_dtype = _dtype_once

# Triton computes whether each sum of integers overflows, and drops the result unless debugging.
_builder = interpreter.interpreter_builder
if not _builder.options.debug:
    _builder.options = replace(_builder.options, sanitize_overflow=False)
