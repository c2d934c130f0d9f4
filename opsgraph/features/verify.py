"""What holds of all generated functions: nothing is read that is not there.

The hook is in `planned`.
"""

from collections.abc import Sequence

from ..base.errors import PlanError
from ..plan import Plan
from ..plan.lines import Function, Line

every = False
"""Whether all functions are verified, not only those under OPSGRAPH_CHECK."""


def verified(plan: Plan, asked: bool) -> Plan:
    """The plan, its functions verified if that is asked for."""
    if not (asked or every):
        return plan
    forward, backward, prepare = plan.functions
    for each in (backward, *(few.function for few in (plan.few,) if few)):
        verify(forward, each, prepare)
    return plan


def verify(forward: Function, backward: Function, prepare: Function | None = None) -> None:
    """Raises PlanError unless each variable read was given, saved or made, and not let go before.

    The backward has to take out of `saved` what the forward puts there.
    """
    functions = {"forward": forward, "backward": backward}
    if prepare is not None and prepare.lines:
        functions["prepare"] = prepare
    for name, function in functions.items():
        _verify_lines(name, function.parameters, function.lines)
    saved = forward.lines[-1].arguments[1]
    taken = next((line.makes for line in backward.lines if "saved" in line.reads), [])
    if (kept := [argument.text for argument in saved]) != taken:  # type: ignore[union-attr]
        raise PlanError(f"the backward takes {taken}, expected what the forward saves: {kept}")


def _verify_lines(name: str, parameters: Sequence[str], lines: Sequence[Line]) -> None:
    available, gone = set(parameters), set[str]()
    for number, line in enumerate(lines, 1):
        for variable in (*line.reads, *(v for v in line.dead if v not in line.makes)):
            if variable not in available:
                why = "was let go before" if variable in gone else "nothing has made"
                raise PlanError(f"line {number} of {name}, `{line}`, reads {variable}, which {why}")
        available.update(line.makes)
        available.difference_update(line.dead)
        gone.update(line.dead)
    if not lines or lines[-1].function != "return" or lines[-1].dead:
        raise PlanError(f"the last line of {name} does not return")
