"""A pass that is replayed: recorded when it runs for the second time on tensors of the same shapes.

The first call runs the lines one by one: kernels are compiled and products measured. The second
runs them watched by the recorder; all others replay what it noted. A call is a normal one, in
Python, where a replay could do anything else: under dispatch modes, with subclasses of tensors, for
tensors that are laid out as none before.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.autograd.profiler import record_function

from ..base.config import Config
from ..guards.cached import cached_property
from ..guards.operands import Operands
from ..guards.torch_private import apart, ops_alone
from ..plan import Plan
from ..plan.lines import Function, Line
from ..plan.result import Passes
from . import launched as launched
from .assembly import assembled
from .expected import operands
from .interpreter import run_line, run_lines
from .native import why_not as absent
from .parts import ALIGNED, Stretch
from .record import Record
from .recording import Recording, ours

MOST = 64
"""Records of a pass, the latest: one for each number of rows."""
ATTEMPTS = 4
"""How often a pass is recorded until its lines in Python are found."""
_PLAIN = (Tensor, nn.Parameter)
_EXPRESSIONS = ("bind", "cast", "cast unless None", "add")


class Pass:
    """Stands for a generated function, and does what it does.

    name: what profilers show. saved: the names of what its last argument, a list, holds; None where
    there is none. why_not: why nothing is replayed, if it is known.
    """

    def __init__(
        self, name: str, function: Function, device: torch.device, config: Config,
        saved: Sequence[str] | None = None, why_not: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.function, self.device = name, function, device
        self.labelled = "steps" in config.logs
        self.has_ops = function.parameters[:1] == ("ops",)
        names = function.parameters[self.has_ops :]
        self.names = names if saved is None else (*names[:-1], *saved)
        self.saved = len(saved or ())
        self.operands: Operands | None = None
        """What it expects; None where PyTorch's ops alone run."""
        self.expects: Callable[[], Operands] | None = None
        """Finds that out, for the first call: a plan has passes that few calls run."""
        self.records: OrderedDict[Any, Any] = OrderedDict()
        """What replays calls of a key; None until the second call, False where nothing does."""
        self.in_python: set[int] = set()
        self.attempts = 0
        self.reason = why_not or _why_not(config) or absent(device.type)
        self.record: Record | None = None
        """The last one made, for the eye."""
        self.last: Any = None
        """Replays calls that are laid out as the last one, and returns None for others."""

    @cached_property
    def python(self) -> Callable[..., Any]:
        """What a call in Python runs."""
        return self._labelled if self.labelled else self.function.call

    @cached_property
    def first(self) -> Callable[..., Any]:
        """What the first call runs: no text is compiled that one call alone would run."""
        alone = self.labelled or not all(map(ours, self.function.lines))
        return self.python if alone else partial(run_lines, self.function)

    @apart  # a first call finds out much, and keeps it
    def __call__(self, *arguments: Any) -> Any:
        if profiler._is_profiler_enabled:
            with record_function(f"opsgraph {self.name}"):
                return self._run(arguments)
        last = self.last  # which another thread may take away
        if last is not None:
            result = last(*arguments)
            if result is not None:
                return result
        return self._run(arguments)

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        """A call of other layouts than the last one."""
        if (expects := self.expects) is not None:
            self.operands, self.expects = expects(), None
        if (self.reason is not None and self.operands is None) or not ops_alone():
            return self.python(*arguments)
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self(*arguments)
        tensors = arguments[self.has_ops :]
        if self.saved:
            tensors = (*tensors[:-1], *tensors[-1])
        if self.reason is not None and self.operands is not None and self.operands.again(tensors):
            del tensors  # each dies after its last use
            return self.python(*arguments)
        key: list[Any] = [torch.get_num_threads()]
        for tensor in tensors:
            if type(tensor) in _PLAIN or getattr(type(tensor), "is_plain_memory", False):
                key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            elif tensor is None:
                key.append(None)
            else:
                return self.python(*arguments)
        where, tensor = tuple(key), None
        record = self.records.get(where, self)
        if self.operands is not None:
            if record is self:  # none before is laid out so
                self.operands.verify(tensors, self.reason is not None)
            plain = self.operands.readable(tensors)
            if plain is not None:
                return self._run(self._handed(arguments, plain))
        if self.reason is not None:
            del tensors
            return self.python(*arguments)
        if record is None:
            if any(t is not None and not t.numel() for t in tensors):
                return self.python(*arguments)  # without memory nothing can be followed
            if self.device.type == "cuda" and any(
                t is not None and t.data_ptr() % ALIGNED for t in tensors
            ):
                return self.python(*arguments)
            handed = [tensors]
            del tensors  # each dies after its last use
            return self._record(where, handed, arguments)
        del tensors
        if record is False:
            return self.python(*arguments)
        if record is not self:
            with suppress(KeyError):  # another thread may have dropped it
                self.records.move_to_end(where)
            self.last = record.run_if
            result = record.run(*arguments)
            return self.python(*arguments) if result is None else result
        self.records[where] = None
        if len(self.records) > MOST:
            self.records.popitem(last=False)
        return self.first(*arguments)

    def _handed(self, arguments: Sequence[Any], tensors: list[Any]) -> tuple[Any, ...]:
        """The arguments of a call, with other tensors."""
        first = len(tensors) - self.saved
        saved = [tensors[first:]] if self.saved else arguments[len(arguments) :]
        return (*arguments[: self.has_ops], *tensors[:first], *saved)

    def _record(self, key: Any, handed: list[Any], arguments: Sequence[Any]) -> Any:
        """Run the pass, and record it on the way. handed: its tensors, which are taken from it."""
        ops = arguments[0] if self.has_ops else None
        recording = Recording(
            self.function, ops, self.names, handed.pop(), self.saved, self.in_python, self.device
        )
        variables = dict(zip(self.function.parameters, arguments, strict=True))
        result = recording.run(variables)
        record = assembled(recording)
        self.in_python = recording.in_python
        if record is not None:
            native = any(isinstance(part, Stretch) for part in record.parts)
            self.record, self.records[key] = record, record if native else False
            self.last = None  # the next call has the record's text compiled
        else:
            self.attempts += 1
            if self.attempts > ATTEMPTS:
                self.reason = "its lines hand each other what no slot holds"
        return result

    def _labelled(self, *arguments: Any) -> Any:
        """Run the lines one by one, each with a name that profilers show."""

        def labelled(line: Line, *rest: Any) -> Any:
            with record_function(f"opsgraph {line.function} {line.note}"):
                return run_line(line, *rest)

        return run_lines(self.function, *arguments, run=labelled)

    def told(self) -> list[str]:
        """What is replayed, and what is not and why, a line each; none before it is known."""
        if self.reason is not None:
            return [f"in Python: {self.reason}"]
        return [] if self.record is None else [str(part) for part in self.record.parts]


class ByRows:
    """Stands for a backward of two orders: `few` runs where the gradient has some of those rows."""

    def __init__(self, rows: range, few: Any, many: Any) -> None:
        self.rows, self.few, self.many = rows, few, many
        self.latest = many

    def __call__(self, ops: Any, dx: Tensor, *rest: Any) -> Any:
        run = self.latest = self.few if dx.size(0) in self.rows else self.many
        return run(ops, dx, *rest)

    def told(self) -> list[str]:
        """What the one that ran last says of its replays."""
        told: list[str] = self.latest.told()
        return told


def _why_not(config: Config) -> str | None:
    """Why passes are not replayed, or None."""
    if not config.replay:
        return "OPSGRAPH_REPLAY=0"
    if config.check:
        return "OPSGRAPH_CHECK=1 checks every step"
    return "OPSGRAPH_LOGS=steps runs them one by one" if "steps" in config.logs else None


def _into_main_grad(plan: Plan, function: Function) -> set[int]:
    """Numbers of the lines of a backward that make weight gradients which go into main_grad.

    What they do differs from call to call: they overwrite, add, or are not asked for. (Gradients
    that wait for `backward_dw` are calls, which stretches do not make, or tensors like others.)
    """
    places: Any = plan.elsewhere
    if places is None:
        return set()
    returned: Any = function.lines[-1].arguments[0]
    weights = {k for _, k in places.into_main_grad} - {*places.late}
    names = {returned[plan.specs.first_weight + k].text for k in weights}
    found = set()
    for number, line in reversed([*enumerate(function.lines)]):
        if names.intersection(line.makes):
            found.add(number)
            if line.function in _EXPRESSIONS:  # a cast, and what it is of
                names |= set(line.reads)
    return found


def replayed(
    plan: Plan, config: Config, why_not: str | None = None, joined: Any = None
) -> Plan:  # fmt: skip
    """The plan with passes that are replayed. why_not: why none is.

    joined: functions that do more than these, see `features.joined`; they are for replays alone.
    """
    x = plan.specs.inputs[0].spec
    assert x is not None

    def made(name: str, function: Function, saved: Sequence[str] | None = None) -> Any:
        if not function.lines:
            return function.call
        one = Pass(name, function, x.device, config, saved, why_not)
        if why_not is None and x.device.type in ("cpu", "cuda"):
            one.expects = partial(operands, plan, name, function, one.names)
        if saved is not None:
            one.in_python = _into_main_grad(plan, function)
        return one

    saved = [value.name for value in plan.specs.saved]
    forward, backward, prepare = plan.functions
    run = made("backward", backward, saved)
    if plan.few is not None:
        run = ByRows(plan.few.rows, made("backward", plan.few.function, saved), run)
    passes = Passes(made("forward", forward), run, made("prepare", prepare))
    if joined is None or getattr(passes.prepare, "reason", None) is not None:
        return replace(plan, passes=passes)
    whole = joined._replace(
        forward=made("forward", joined.forward),
        silent=cache(lambda: made("forward", joined.silent())),
        backward=joined.backward and made("backward", joined.backward, joined.saved),
    )  # fmt: skip
    return replace(plan, passes=passes, joined=whole)
