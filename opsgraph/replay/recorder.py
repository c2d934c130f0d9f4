"""The recorder: it watches lines of a pass run in Python, and notes what reached memory.

Three things reach memory: a C++ kernel's call, a Triton kernel's launch, an op of PyTorch. The
first two tell the recorder themselves (`guards.watching`), the ops are seen by a dispatch mode.
Each becomes an event, whose operands are places: a buffer and an offset in it. A buffer is an
argument's memory, or what was allocated on the way.

Rules:

- What the recorder does not know for certain makes the line one that stays in Python, with the
  reason: an op that is not in its tables, a number read from memory, an address in no buffer.
- The allocator hands out memory again. So an allocation takes the place of every buffer that had
  its addresses before.
- Values may share memory in the call that is recorded and not in others: one tensor given twice, an
  op that returns its input. So of several buffers a line's is the one that it reads by name; where
  that does not tell, replays have to see the same arguments shared.
"""

import os
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..guards.torch_private import mode_flags, set_mode_flags
from ..guards.watching import watching
from ..kernels.cublaslt.product import Product
from .events import (
    Aten,
    Buffer,
    Event,
    Exchange,
    Kernel,
    Launch,
    Matmul,
    Operand,
    Place,
    Wait,
)  # fmt: skip
from .shim import dtype_code

MOST_WORDS = 96
"""Words of a kernel's record or parameters that the library has room for."""


class _Refused(Exception):
    """Why a line stays in Python."""


_ALLOCATIONS = {
    "aten.empty.memory_format", "aten.new_empty.default", "aten.empty_strided.default",
    "aten.empty_like.default", "aten.new_empty_strided.default",
}  # fmt: skip
_ZEROS = {"aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default"}
_COPIES = {"aten._to_copy.default", "aten.clone.default"}
_VIEWS = {
    "aten.t.default", "aten.transpose.int", "aten.view.default", "aten._unsafe_view.default",
    "aten.slice.Tensor", "aten.select.int", "aten.detach.default", "aten.expand.default",
    "aten.unsqueeze.default", "aten.squeeze.dim", "aten.alias.default", "aten.permute.default",
    "aten.view.dtype", "aten.as_strided.default", "aten.lift_fresh.default",
}  # fmt: skip
_PRODUCTS = {
    "aten.mm.default": ("mm", 2), "aten.mm.out": ("mm", 2), "aten.bmm.default": ("bmm", 2),
    "aten.bmm.out": ("bmm", 2), "aten.addmm.default": ("addmm", 3),
    "aten.addmm.out": ("addmm", 3), "aten.baddbmm.default": ("baddbmm", 3),
    "aten.baddbmm.out": ("baddbmm", 3),
}  # fmt: skip
"""What each computes, and how many operands it reads."""
_EXCHANGES = {
    "_c10d_functional.all_gather_into_tensor.default": "all_gather",
    "_c10d_functional.reduce_scatter_tensor.default": "reduce_scatter",
    "_c10d_functional.all_reduce.default": "all_reduce",
    "_c10d_functional.all_reduce_.default": "all_reduce",
}
_WAIT = "_c10d_functional.wait_tensor.default"


@cache
def _name(func: Any) -> str:
    """What an op is called, as its text is."""
    return str(func)


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last one's end."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


_turn = threading.Lock()
_entered: list["Recorder"] = []
"""The recorders of all threads."""
_flags: dict[str, bool] = {}
"""PyTorch's, from before the first of them."""


def _forked() -> None:
    """A forked child has neither the other threads that may hold the lock nor their recorders."""
    global _turn
    _turn = threading.Lock()
    if _entered and not watching.modes:
        _entered.clear()
        set_mode_flags(_flags)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Recorder(TorchDispatchMode):
    """Notes the events of one line after the other: `begin()`, the line, `take()`, inside of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dynamo compiles nothing under a mode; to tell it so imports it, which takes seconds."""
        return False

    def __init__(self, count: int = 0) -> None:
        """count: of the arguments."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count
        self.shared: set[tuple[int, int]] = set()
        """Arguments that are taken for each other."""
        self.buffers: list[Buffer] = []
        self._ranges: list[tuple[int, int, int]] = []
        """Begin, number and end of each buffer that is there, in order."""
        self._longest = 0
        """Bytes of the largest one that there was."""
        self._overlap = False
        """Whether some, of arguments, ever shared memory."""
        self.consumed: Collection[int | None] = ()
        """The arguments that a line may overwrite, by their numbers."""
        self.taken: dict[int, int] = {}
        """Of results that may be written over an argument, if nothing else refers to that: its
        number, by the result's buffer."""
        self.reading: Collection[int] = ()
        """The buffers of the values that a line reads."""
        self._events: list[Event] = []
        self._first = 0
        self._reason: str | None = None
        self._under_way: list[Exchange] = []

    def argument(self, k: int, tensor: Tensor) -> Place | None:
        """Make the memory of a tensor known, replays are handed it as number k; its place."""
        if not (size := span(tensor)):
            return None
        start = tensor.data_ptr()
        near = self._ranges[self._near(start, start + size)]
        self._overlap = self._overlap or any(end > start for _, _, end in near)
        insort(self._ranges, self._new(start, size, tensor.device, k))
        return Place(len(self.buffers) - 1, 0)

    def _new(
        self, start: int, size: int, device: torch.device, k: int | None = None
    ) -> tuple[int, int, int]:  # fmt: skip
        """The range of a buffer that is made known."""
        self.buffers.append(Buffer(size, device, k))
        self._longest = max(self._longest, size)
        return start, len(self.buffers) - 1, start + size

    def _near(self, start: int, end: int) -> slice:
        """The buffers that may have some of these addresses: none begins behind them."""
        first = bisect_left(self._ranges, (start - self._longest,))
        return slice(first, bisect_left(self._ranges, (end,), first))

    # -- a line --

    def begin(self) -> None:
        """A line begins, as the first one does when the recorder is entered."""
        self._events, self._reason, self._first = [], None, len(self.buffers)
        self._under_way = []

    def __enter__(self) -> Any:
        self.begin()
        watching.recorder = self
        watching.modes += 1
        with _turn:
            if not _entered:
                _flags.update(mode_flags())
            _entered.append(self)
            return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        watching.modes -= 1
        watching.recorder = None
        with _turn:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
            _entered.remove(self)
            if not _entered:
                set_mode_flags(_flags)

    def take(self) -> tuple[list[Event], str | None]:
        """The events of the line that just ran, and why there are none if it stays in Python."""
        if self._under_way:
            self.refuse("it leaves an exchange under way")
        if self._reason is not None:  # what it allocated is no buffer of a stretch
            self._ranges = [r for r in self._ranges if r[1] < self._first]
            return [], self._reason
        return self._events, None

    def refuse(self, reason: str) -> None:
        """Have the line stay in Python."""
        self._reason = self._reason or reason

    # -- places --

    def find(self, address: int) -> Place | None:
        """The place of an address in a buffer, or None; None too if it may be any of several."""
        if not self._overlap:  # then only the last that begins so early may have it
            last = bisect_left(self._ranges, (address + 1,)) - 1
            start, number, end = self._ranges[last] if last >= 0 else (0, 0, 0)
            return Place(number, address - start) if address < end else None
        found = [r for r in self._ranges[self._near(address, address + 1)] if address < r[2]]
        if len(found) > 1:
            found = [r for r in found if r[1] in self.reading] or found
        alone = len(found) == 1 or (bool(found) and self._one(found))
        return Place(found[0][1], address - found[0][0]) if alone else None

    def _one(self, found: Sequence[tuple[int, int, int]]) -> bool:
        """Whether buffers are arguments that begin together; replays then see that they do."""
        slots = [self.buffers[number].argument for _, number, _ in found]
        together = len({start for start, _, _ in found}) == 1
        if not together or any(slot is None or slot >= self.count for slot in slots):
            return False
        self.shared |= {(slots[0], slot) for slot in slots[1:]}  # type: ignore[misc]
        return True

    def _place(self, address: int) -> Place:
        place = self.find(address)
        if place is None:
            raise _Refused("it reads memory that no value or more than one has")
        return place

    def _operand(self, tensor: Any) -> Operand | None:
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor) or not tensor.numel():
            raise _Refused("an operand is empty")
        if dtype_code(tensor.dtype) is None:
            raise _Refused(f"PyTorch's C interface has no {tensor.dtype}")
        place = self._place(tensor.data_ptr())
        return Operand(place, tensor.dtype, tensor.device, (*tensor.shape,), tensor.stride())

    def allocated(self, tensor: Tensor, known: bool = True) -> None:
        """A tensor got memory. known: as a buffer of the pass, else of PyTorch's alone."""
        storage = tensor.untyped_storage()
        if not (size := storage.nbytes()):
            return
        start = storage.data_ptr()
        near = self._near(start, start + size)
        new = [self._new(start, size, tensor.device)] if known else []
        # What had these addresses has them no more.
        self._ranges[near] = [r for r in self._ranges[near] if r[2] <= start] + new

    # -- what is watched --

    def kernel(self, function: int, words: bytes, addresses: Sequence[tuple[int, int]]) -> None:
        """A C++ kernel was called. addresses: of its words, their numbers and values."""
        self._note(lambda: Kernel(function, words, self._places(addresses)))

    def launch(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, words: bytes,
        addresses: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        """A CUDA kernel was launched."""
        self._note(lambda: Launch(function, grid, threads, shared, words, self._places(addresses)))

    def product(
        self, made: Product, addresses: Sequence[int], pointers: Sequence[tuple[int, int]]
    ) -> None:  # fmt: skip
        """cublasLt multiplied. addresses: of b, a, c, the result; pointers: of attributes."""

        def event() -> Event:
            places = [self._place(address) for address in addresses]
            named = tuple((key, self._place(address)) for key, address in pointers)
            if self.buffers[places[3].buffer].argument is not None:
                raise _Refused("a product is written to what the pass was handed")
            room = Place(len(self.buffers), 0) if made.workspace else None
            if room is not None:
                self.buffers.append(Buffer(made.workspace, torch.device("cuda", made.device)))
            return Matmul(made, (*places, room), named)

        self._note(event)

    def in_place(self, made: Tensor, over: Tensor) -> None:
        """Memory was made that may be that of another tensor, as `guards.owned` says."""
        place, other = self.find(made.data_ptr()), self.find(over.data_ptr())
        if place is not None and other is not None:
            argument = self.buffers[other.buffer].argument
            if argument is not None and argument < self.count and argument in self.consumed:
                self.taken[place.buffer] = argument

    def _places(self, addresses: Sequence[tuple[int, int]]) -> tuple[tuple[int, Place], ...]:
        return tuple([(word, self._place(address)) for word, address in addresses if address])

    def _note(self, event: Callable[[], Event]) -> None:
        if self._reason is None:
            try:
                noted = event()
                if isinstance(noted, Kernel | Launch) and len(noted.words) > 8 * MOST_WORDS:
                    raise _Refused(f"a kernel takes more than {MOST_WORDS} words")
                self._events.append(noted)
            except _Refused as refused:
                self.refuse(str(refused))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        try:
            self._see(_name(func), args, kwargs, result)
        except _Refused as refused:
            self.refuse(f"{_name(func)}: {refused}")
        return result

    def _see(self, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if name in _VIEWS:
            return
        if name in _ALLOCATIONS or name.startswith("aten.set_"):
            self.allocated(result)
        elif name in _ZEROS:
            self.allocated(result)
            self._aten("zero", result)
        elif name in _COPIES:
            self.allocated(result)
            self._aten("copy", result, args[0])
        elif name == "aten.copy_.default":
            self._aten("copy", result, args[1])
        elif name == "aten.zero_.default":
            self._aten("zero", result)
        elif name in _PRODUCTS:
            kind, count = _PRODUCTS[name]
            if not name.endswith("out"):
                self.allocated(result)
            scalars = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
            self._aten(kind, result, *args[:count], scalars=scalars)
        elif name in _EXCHANGES:
            self._exchange(_EXCHANGES[name], result, *args)
        elif name == _WAIT:
            self._wait(args[0])
        else:
            read, made = [*_tensors((args, kwargs))], [*_tensors(result)]
            for tensor in (t for t in made if all(t is not one for one in read)):
                self.allocated(tensor, known=False)
            if read or made:  # not so torch.promote_types, which is an operation, too
                raise _Refused("replays do not know it")

    def _aten(self, kind: str, *tensors: Any, scalars: tuple[float, float] = (0.0, 0.0)) -> None:
        if self._reason is None:
            operands = tuple(map(self._operand, tensors))
            self._writes(operands[0])
            self._note(lambda: Aten(kind, operands, scalars))

    def _exchange(self, kind: str, result: Tensor, sent: Tensor, *rest: Any) -> None:
        """rest: of a sum "sum", its name; the size of the group perhaps; its name."""
        if kind != "all_gather" and rest[0] != "sum":
            raise _Refused("only sums are replayed")
        if result.data_ptr() != sent.data_ptr():
            self.allocated(result)
            if kind == "all_reduce":  # of a copy, in place
                self._aten("copy", result, sent)
        into = self._operand(result)
        of = into if kind == "all_reduce" else self._operand(sent)
        self._writes(into)
        assert into is not None
        assert of is not None
        started = Exchange(kind, rest[-1], into, of)
        self._under_way.append(started)
        self._note(lambda: started)

    def _wait(self, result: Tensor) -> None:
        place = self._place(result.data_ptr())
        found = [exchange for exchange in self._under_way if exchange.result.place == place]
        if found:  # else it was waited for before
            self._under_way.remove(found[0])
            self._note(lambda: Wait(found[0]))

    def _writes(self, operand: Operand | None) -> None:
        if operand is None or self.buffers[operand.place.buffer].argument is not None:
            raise _Refused("it writes to what it was handed")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
