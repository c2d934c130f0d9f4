"""A pytest plugin that takes from Triton's interpreter what costs most time and shows nothing.

Loaded by `test_interpreted.py`. A process with TRITON_INTERPRET=1 compiles no kernel, so what the
interpreter puts in the place of `triton.language` can stay there.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
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

_init_block, _init_tensor = tl.block_type.__init__, tl.tensor.__init__


def _block_once(self: tl.block_type, element_ty: Any, shape: Any) -> None:
    """Triton checks and names a type at each operation; equal ones share their attributes here."""
    known = vars(element_ty).setdefault("_blocks", {})
    sizes = tuple([size if type(size) is int else size.value for size in shape])
    if sizes not in known:
        _init_block(self, element_ty, shape)
        known[sizes] = vars(self)
    self.__dict__ = known[sizes]


def _tensor_once(self: tl.tensor, handle: Any, type: Any) -> None:
    """Triton makes anew of the type what the tensor has besides its handle."""
    known = vars(type).get("_of_tensors")
    if known is None:
        _init_tensor(self, None, type)
        known = type._of_tensors = dict(vars(self))
    vars(self).update(known)
    self.handle = handle


tl.block_type.__init__, tl.tensor.__init__ = _block_once, _tensor_once

_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_if_unequal(self: Any, lhs: Any, rhs: Any) -> Any:
    """Triton computes the shape of two blocks of one shape, too."""
    one, other = vars(lhs.type).get("shape"), vars(rhs.type).get("shape")
    if one is not None and other is not None and [*one] == [*other]:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


TritonSemantic.broadcast_impl_value = _broadcast_if_unequal

# Triton computes whether each sum of integers overflows, and drops the result unless debugging.
_builder = interpreter.interpreter_builder
if not _builder.options.debug:
    _builder.options = replace(_builder.options, sanitize_overflow=False)
