"""What PyTorch 2.9 and Python 3.10 lack, and what later ones changed, held without them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import opsgraph

PACKAGE = Path(opsgraph.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

NEWER = {
    "ScalingType": "2.10",
    "SwizzleType": "2.10",
    "scaled_mm": "2.10",
    "grouped_mm": "2.10",
    "scaled_grouped_mm": "2.10",
    "node_creation_hook": "2.14",
    "set_output_grad_dtype": "2.14",
    "queue_callback": "2.15",
    "input_grad_buffers": "2.15",
    "scaled_addmm": "2.15",
}
"""Names of PyTorch's that 2.9 has not, and the version that brought them."""

GONE = {"make_block_ptr", "advance", "boundary_check", "padding_option", "can_reorder"}
"""What Triton 3.9 has no more, or 3.10 will not have, of `triton.language`."""

EXPORTED_LATER = {
    "PyCode_Addr2Location", "PyCode_GetCellvars", "PyCode_GetCode", "PyCode_GetFreevars",
    "PyCode_GetVarnames", "PyErr_GetHandledException", "PyErr_SetHandledException",
    "PyFloat_Pack2", "PyFloat_Pack4", "PyFloat_Pack8", "PyFloat_Unpack2", "PyFloat_Unpack4",
    "PyFloat_Unpack8", "PyFrame_GetBuiltins", "PyFrame_GetGenerator", "PyFrame_GetGlobals",
    "PyFrame_GetLasti", "PyFrame_GetLocals", "PyObject_CallOneArg", "PyObject_Vectorcall",
    "PyType_GetModuleByDef", "PyType_GetName", "PyType_GetQualName", "PyVectorcall_Function",
}  # fmt: skip
"""Functions that Python 3.11 exports and 3.10 does not, where some are inline in the headers."""

DIFFERENTIATED = [
    name for name in MODULES if name.startswith("ops/") or name.endswith("reference/activations.py")
]
"""Modules whose arithmetic autograd differentiates, for ops without bwd and for double_backward."""


def test_the_names_are_new_where_they_are_there() -> None:
    """Names that this table calls new, and that an older PyTorch has, would guard nothing."""
    for name, version in NEWER.items():
        there = hasattr(F, name) or hasattr(torch.autograd.graph, name)
        assert not there or torch.__version__ >= version, name


def at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes that run while a module is imported; annotations in quotes do not."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ClassDef):
            yield from at_import(node.body)
        else:
            yield from ast.walk(node)


@pytest.mark.parametrize("name", MODULES)
def test_importing_a_module_takes_nothing_newer_than_the_minimum(name: str) -> None:
    """Newer names are for functions, behind a check: one at the top takes the rest along."""
    for node in at_import(ast.parse(MODULES[name].read_text()).body):
        found: set[str] = set()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found = {node.attr}
        assert not found & NEWER.keys(), f"{found & NEWER.keys()} at import"


@pytest.mark.parametrize("name", [n for n in MODULES if "triton" in n])
def test_kernels_use_nothing_that_triton_gave_up(name: str) -> None:
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            used = {k.arg for k in node.keywords} | {getattr(node.func, "attr", None)}
            assert not used & GONE, f"line {node.lineno}: {used & GONE}"


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_no_gradient_depends_on_clamp(name: str) -> None:
    """At the bound it is 1 up to PyTorch 2.13, 0 since, and a half for a tensor as the bound.

    `_flat` takes no value at its upper bound from a clamp, and has no slope at the lower one.
    """
    body = ast.parse(MODULES[name].read_text()).body
    for node in (
        n for part in body if getattr(part, "name", "") != "_flat" for n in ast.walk(part)
    ):
        called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
        assert called not in ("clamp", "clamp_", "clamp_min", "clamp_max", "clip"), node.lineno


@pytest.mark.parametrize("name", ["features/dimensions.py", "features/compiled.py"])
def test_dynamo_meets_no_zip_of_unequal_lengths(name: str) -> None:
    """In PyTorch 2.9 it takes strict=False for strict=True."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
            assert "strict=True" in ast.unparse(node), node.lineno


@pytest.mark.parametrize("name", [*DIFFERENTIATED, "kernels/reference/norms.py"])
def test_vmap_meets_no_view_of_another_dtype(name: str) -> None:
    """It has no rule for it up to PyTorch 2.11."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "view":
            given = [ast.unparse(argument) for argument in node.args]
            assert not any(argument.startswith("torch.") for argument in given), node.lineno


@pytest.mark.parametrize(
    "name", [n for n, path in MODULES.items() if "pythonapi" in path.read_text()]
)
def test_python_exports_the_functions_that_are_called_in_it(name: str) -> None:
    """ctypes finds what a library exports: what is inline in Python's headers is not there."""
    nodes = [*ast.walk(ast.parse(MODULES[name].read_text()))]
    used = {node.value for node in nodes if isinstance(node, ast.Constant)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not used & EXPORTED_LATER, used & EXPORTED_LATER
