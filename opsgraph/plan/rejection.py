"""`Rejection`: why a fuser, or a backend, is not used somewhere."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..fuser import Fuser, Match
from ..op import BACKWARD
from ..op.functions import passes
from .program import Program


class _Rejection(NamedTuple):
    ops: tuple[int, ...]
    name: str
    direction: str
    reason: str


class Rejection(_Rejection):
    """Why a fuser that fits somewhere is not used there.

    backend: the fuser's; empty where the whole backend is refused. No item of the tuple.
    """

    backend: str

    def __new__(cls, *items: Any, backend: str = "") -> "Rejection":
        rejection = super().__new__(cls, *items)
        rejection.backend = backend
        return rejection


def obstacle(program: Program, i: int, still: bool, fuser: Fuser) -> str | None:
    """Why a fuser may not cover an op in a pass. still: whether the op does nothing there."""
    if still and program.kinds[i].training_matters:
        return f"{program.kinds[i].__name__} does nothing in this mode"
    for dtype in () if fuser.promotes else program.promoted(i):
        if dtype != program.specs[i].dtype:
            return f"{program.numbers[i]} adds {dtype} to {program.specs[i].dtype}"
    return None


def reasons(program: Program, match: Match, direction: str, still: Sequence[bool]) -> Iterator[str]:
    """What speaks against a fuser at a place. still: which ops do nothing in that pass."""
    fuser, x = match.fuser, program.specs[match.start]
    ops = [i for i in match.positions.values() if i is not None]
    for i in ops:
        if reason := obstacle(program, i, still[i], fuser):
            yield reason
    recipe = bool(program.run.quantizers)
    packed = [i for i in ops if recipe and program.packed(i, "weight", direction)]
    if packed and not fuser.quantized:
        yield "it takes plain values, and the recipe quantizes the linear's"
    if fuser.quantized and not packed:
        yield "it takes quantized values, and these are not"
    if fuser.recomputes not in (None, program.request.options.get("recompute", True)):
        yield f"it is for recompute={fuser.recomputes}"
    for i in packed:
        if fuser.reject_formats and (reason := fuser.reject_formats(*program.storages(i))):
            yield reason
    if direction == BACKWARD:
        for i in ops:
            if passes(program.kinds[i]) and i != match.stop - 1:
                yield f"the gradient that leaves at {program.numbers[i]} is inside it"
        for key in fuser.declaration.tapped:
            tee = match.positions.get(key)
            if tee is not None and tee not in program.tapped:
                yield f"no gradient arrives at the Tee {program.numbers[tee]}"
    if fuser.dtypes is not None and x.dtype not in fuser.dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in fuser.dtypes)
        taken = f"{', '.join(most)} and {last}" if most else last
        yield f"{fuser.name} takes {taken}, not {str(x.dtype).removeprefix('torch.')}"
    if fuser.reject is not None:
        values = {key: None if i is None else program.ops[i] for key, i in match.positions.items()}
        if reason := fuser.reject(*(values.get(name, x) for name in fuser.declaration.rejects)):
            yield reason
