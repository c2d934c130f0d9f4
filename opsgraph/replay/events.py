"""What reached memory in a pass, as the recorder notes it: events, and places that they name."""

from typing import NamedTuple

import torch

from ..kernels.cublaslt.product import Product


class Place(NamedTuple):
    """An address: an offset in bytes from where a buffer begins."""

    buffer: int
    offset: int


class Operand(NamedTuple):
    """A tensor that an op of PyTorch reads or writes, as the op sees it."""

    place: Place
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Kernel(NamedTuple):
    """A call of a C function with one record of 8-byte words, of which some are addresses."""

    function: int
    words: bytes
    places: tuple[tuple[int, Place], ...]


class Launch(NamedTuple):
    """A launch of a CUDA kernel: its parameters as 8-byte words, of which some are addresses."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    words: bytes
    places: tuple[tuple[int, Place], ...]


class Aten(NamedTuple):
    """A call of an op of PyTorch that writes to its first operand."""

    kind: str
    operands: tuple[Operand | None, ...]
    scalars: tuple[float, float] = (0.0, 0.0)


class Matmul(NamedTuple):
    """A product by cublasLt. places: of b, a, c, the result, and the workspace.

    pointers: attributes of the description that are addresses.
    """

    product: Product
    places: tuple[Place | None, ...]
    pointers: tuple[tuple[int, Place], ...] = ()


class Exchange(NamedTuple):
    """An exchange between the ranks of a group is started: what is sent, and where it arrives."""

    kind: str
    group: str
    result: Operand
    sent: Operand


class Wait(NamedTuple):
    """What follows waits for an exchange; until then no one else has its memory."""

    exchange: Exchange


_KERNELS = Kernel, Launch
Event = Kernel | Launch | Aten | Matmul | Exchange | Wait


class Buffer(NamedTuple):
    """Memory of a size in bytes on a device. argument: its number, None for what was allocated."""

    size: int
    device: torch.device
    argument: int | None = None


def used(event: Event) -> list[int]:
    """The buffers that an event reads or writes."""
    if isinstance(event, _KERNELS):
        return [place.buffer for _, place in event.places]
    if isinstance(event, Aten):
        return [operand.place.buffer for operand in event.operands if operand is not None]
    if isinstance(event, Wait):
        event = event.exchange
    if isinstance(event, Exchange):
        return [event.result.place.buffer, event.sent.place.buffer]
    places = [place for place in event.places if place is not None]
    return [place.buffer for place in (*places, *(place for _, place in event.pointers))]
