"""The first lines of a plan's functions: casts for autocast, quantized values put together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..op import FORWARD, STORED
from .quantized import Packing, Parts

if TYPE_CHECKING:
    from .codegen import Writer


def write_preamble(
    writer: "Writer", copies: Packing, direction: str, names: Sequence[str]
) -> dict[str, str]:
    """Casts, and quantized weights and kept values from their parts.

    names: what the plan saves. Returns where a stored weight is found that a cast has hidden.
    """
    stored = _cast(writer, direction, names)
    _load_weights(writer, copies, direction)
    if direction != FORWARD:
        for value, (copy, parts) in copies.kept.items():
            quantizer = writer.quantizer(copies.quantizer(value))
            dtype, given = writer.space.spec(value).dtype, f"{copy}=({_commas(parts)})"
            text = f"{value} = {quantizer}.load({dtype}, {given})"
            writer.add(text, _names(parts), [value], "load")
    return stored


def write_parts(writer: "Writer", copies: Packing) -> None:
    """Take the quantized values that are kept apart."""
    for value, (copy, parts) in copies.kept.items():
        quantizer = writer.quantizer(copies.quantizer(value))
        text = f"{_commas(parts)} = {quantizer}.parts({value}, {copy!r})"
        writer.add(text, [value], _names(parts), "keep")


def _names(parts: Parts) -> list[str]:
    return [name for name, _ in parts]


def _commas(parts: Parts) -> str:
    return "".join(f"{name}, " for name in _names(parts)).strip()


def _cast(writer: "Writer", direction: str, names: Sequence[str]) -> dict[str, str]:
    """Casts for an active autocast; returns where a stored weight is still to be found."""
    program, stored = writer.program, {}
    compute = program.request.compute
    if compute is None:
        return {}
    if direction == FORWARD:
        for name in program.activations:
            if name in program.casts:
                writer.add(f"{name} = {name}.to({compute})", [name], [name], "autocast")
    for (i, name), variable in program.weight_names.items():
        if variable not in program.casts or (direction != FORWARD and variable not in names):
            continue
        if program.packed(i, name, direction):
            continue
        if variable in names:
            stored[variable] = variable + STORED
            writer.add(f"{stored[variable]} = {variable}", [variable], [stored[variable]])
        writer.add(f"{variable} = {variable}.to({compute})", [variable], [variable], "autocast")
    return stored


def _load_weights(writer: "Writer", copies: Packing, direction: str) -> None:
    """Put quantized weights together from their parts."""
    program = writer.program
    for (i, name), variable in program.weight_names.items():
        found = copies.weight_parts(i, name, direction)
        if found:
            given = [f"{copy}=({_commas(parts)})" for copy, parts in found.items()]
            quantizer = writer.quantizer(program.run.quantizers[i, name])
            text = f"q{variable} = {quantizer}.load({program.specs[i].dtype}, {', '.join(given)})"
            reads = [n for parts in found.values() for n, _ in parts]
            writer.add(text, reads, [f"q{variable}"], "load")
