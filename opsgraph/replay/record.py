"""A record: a pass as a function of its own, whose stretches are replayed by one native call each.

Its variables are slots, first the arguments of the pass. A stretch is handed where its inputs, its
results and its arena begin. Results are what a line in Python, another stretch or the caller reads:
PyTorch allocates each. All else that a stretch allocates is temporary, and lies in one arena, in
which two temporaries share memory unless they are in use at the same time.

    def replayed(ops, v0, v1, fits=fits):
        if modes() and followed() or not fits(v0, v1) or short(v0, v1):
            return None
        v3, = starmap(new, layouts0)
        failed = replay0_0(0, v0, v1, v3)
        if failed:
            fail0(failed)
        return (v3,), (v0,)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import starmap
from typing import Any

import torch

from ..guards.cached import cached_property
from ..guards.compiled import compiled
from ..guards.operands import reach
from ..guards.owned import in_place_of
from ..guards.torch_private import dispatch_modes, dispatch_stack, empty_strided
from ..kernels.cpu import memory
from .calling import bits, short
from .parts import ALIGNED, InPython, Layout, Stretch, name, view


class Record:
    """A recorded pass. returned: what it returns, slots in tuples; ends: its views, by slot.

    Its text is made, and compiled, when it is replayed for the first time: many a layout of a call
    comes twice and never again.
    """

    def __init__(
        self, count: int, present: Sequence[int], twins: Mapping[int, int], fits: Any, saved: int,
        has_ops: bool, parts: Sequence[Stretch | InPython], ends: Mapping[int, int], returned: Any,
        device: torch.device, shared: Iterable[tuple[int, int]], layouts: Mapping[int, Layout],
    ) -> None:  # fmt: skip
        """count: of the arguments. present: which are tensors, twins: which are one of these again.

        fits: tells whether tensors are laid out as recorded. saved: how many arguments, the last
        ones, come in a list. shared: those that have to share memory. layouts: of the arguments.
        """
        self.parts, self.fits = parts, fits
        now = torch.get_num_threads(), _reduces() if device.type == "cuda" else False
        self._write = partial(
            _written, count, present, twins, fits, saved, has_ops, parts, ends, returned, device,
            shared, layouts, *now,
        )  # fmt: skip

    @cached_property
    def _made(self) -> tuple[str, Callable[..., Any]]:
        source, namespace = self._write()
        return source, compiled("replayed", source, namespace)

    @property
    def source(self) -> str:
        """Its text."""
        return self._made[0]

    @property
    def run(self) -> Callable[..., Any]:
        """Replays the pass; returns None, having done nothing, where memory is not as recorded."""
        return partial(self._made[1], fits=_fits)

    @property
    def run_if(self) -> Callable[..., Any] | None:
        """The same, which also looks whether arguments are laid out as recorded."""
        return None if self.fits is None else self._made[1]


_reduces: Callable[[], Any] = torch._C._get_cublas_allow_bf16_reduced_precision_reduction


def _written(
    count: int, present: Sequence[int], twins: Mapping[int, int], fits: Any, saved: int,
    has_ops: bool, parts: Sequence[Stretch | InPython], ends: Mapping[int, int], returned: Any,
    device: torch.device, shared: Iterable[tuple[int, int]], layouts: Mapping[int, Layout],
    threads: int, reduces: Any,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """The text of a record, and what it names; see `Record`.

    threads, reduces: the number of threads, and what cuBLAS may do, when it was recorded.
    """
    namespace: dict[str, Any] = {
        "torch": torch, "kept": memory.empty,
        "new": empty_strided(device), "fits": fits, "exact": fits, "modes": dispatch_stack,
        "threads": torch.get_num_threads, "followed": dispatch_modes, "view": view,
        "in_place_of": in_place_of, "starmap": starmap,
    }  # fmt: skip
    if device.type == "cuda":
        namespace["stream"] = torch._C._cuda_getCurrentRawStream
        namespace["current"] = torch._C._cuda_getDevice
        namespace["reduces"] = _reduces
    names = [name(k) for k in range(count)]
    first = len(names) - saved
    head = [*["ops"] * has_ops, *names[:first], *["saved"] * bool(saved), "fits=fits"]
    lines = [f"{', '.join(names[first:])}, = saved"] if saved else []
    tensors = ", ".join(map(name, present))
    test = f"modes() and followed() or not fits({tensors})"  # which may fit under a mode
    if twins:
        others = (f"{name(k)} is not {name(first)}" for k, first in twins.items())
        test += f" or fits is exact and ({' or '.join(others)})"
    if device.type == "cpu":
        test = f"threads() != {threads} or {test}"
    if device.type == "cuda":
        test = f"current() != {device.index} or reduces() != {reduces} or {test}"
    if needed := {k: layout for k, layout in layouts.items() if k in present}:
        room = [(t.itemsize, reach(*rest) * t.itemsize) for t, *rest in needed.values()]
        namespace["short"] = short(room)
        test += f" or short({', '.join(map(name, needed))})"
    lines += [f"if {test}:", "    return None"]
    pairs = [tuple(f"{name(k)}.data_ptr()" for k in pair) for pair in sorted(shared)]
    tests = [f"{one} != {other}" for one, other in pairs]
    read = {k for part in parts if isinstance(part, Stretch) for k in part.bases if k < count}
    read = read.union(*shared) if device.type == "cuda" else set()
    if read:  # what kernels are compiled for
        namespace["bits"] = bits()
        tests.append(f"bits({', '.join(map(name, sorted(read)))}) % {ALIGNED}")
    lines += [f"if {' or '.join(tests)}:", "    return None"] if tests else []
    lines += ["saved.clear()"] * bool(saved)
    for number, part in enumerate(parts):
        lines += part.text(number, namespace)
    lines += [f"{name(end)} = {name(slot)}.view_as({name(slot)})" for end, slot in ends.items()]
    lines.append(f"return {_spelled(returned)}")
    body = "\n".join(f"    {line}" for line in lines)
    return f"def replayed({', '.join(head)}):\n{body}\n", namespace


def _fits(*tensors: Any) -> bool:
    return True


def _spelled(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"({''.join(f'{_spelled(item)}, ' for item in returned)})"
    return name(returned)
