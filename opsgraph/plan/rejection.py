"""`Rejection`: why a fuser, or a backend, is not used somewhere."""

from typing import Any, NamedTuple

from ..fuser import BACKWARD, Match
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


def obstacle(program: Program, i: int, still: bool) -> str | None:
    """Why no fuser may cover an op in a pass, or None. still: whether the op does nothing there."""
    if still and program.kinds[i].training_matters:
        return f"{program.kinds[i].__name__} does nothing in this mode"
    for dtype in program.promoted(i):
        if dtype != program.specs[i].dtype:
            return f"{program.numbers[i]} adds {dtype} to {program.specs[i].dtype}"
    return None


def refusal(
    program: Program, match: Match, direction: str, obstacles: list[str | None]
) -> str | None:
    """What speaks against a fuser at a place, or None. obstacles: of each op of the program."""
    ops = [i for i in match.positions.values() if i is not None]
    reason = next((r for i in ops if (r := obstacles[i])), None)
    reason = reason or _of_formats(program, match, ops, direction)
    if reason is None and direction == BACKWARD:
        reason = _of_gradients(program, match, ops)
    return reason or _of_the_fuser(program, match)


def _of_formats(program: Program, match: Match, ops: list[int], direction: str) -> str | None:
    """That a recipe's quantized operands and the fuser do not go together."""
    fuser, packed = match.fuser, [i for i in ops if program.packed(i, "weight", direction)]
    for i in packed:
        if not fuser.quantized:
            return "it takes plain values, and the recipe quantizes the linear's"
        if fuser.reject_formats and (reason := fuser.reject_formats(*program.storages(i))):
            return reason
    alone = fuser.quantized and not packed
    return "it takes quantized values, and these are not" if alone else None


def _of_gradients(program: Program, match: Match, ops: list[int]) -> str | None:
    """That a gradient leaves inside the run, or that none arrives where the fuser takes one."""
    for i in ops:
        if passes(program.kinds[i]) and i != match.stop - 1:
            return f"the gradient that leaves at {program.numbers[i]} is inside it"
    for key in match.fuser.declaration.tapped:
        tee = match.positions.get(key)
        if tee is not None and tee not in program.tapped:
            return f"no gradient arrives at the Tee {program.numbers[tee]}"
    return None


def _of_the_fuser(program: Program, match: Match) -> str | None:
    """What the fuser itself says: its `dtypes`, its `reject`."""
    fuser, x = match.fuser, program.specs[match.start]
    if fuser.dtypes is not None and x.dtype not in fuser.dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in fuser.dtypes)
        taken = f"{', '.join(most)} and {last}" if most else last
        return f"{fuser.name} takes {taken}, not {str(x.dtype).removeprefix('torch.')}"
    if fuser.reject is None:
        return None
    values = {key: None if i is None else program.ops[i] for key, i in match.positions.items()}
    return fuser.reject(*(values.get(name, x) for name in fuser.declaration.rejects))
