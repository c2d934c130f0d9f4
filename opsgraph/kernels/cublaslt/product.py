"""Products `a @ b` by cublasLt's C interface, each by the library's fastest algorithm for it.

PyTorch takes 15 to 30 microseconds of the host for a product and the first algorithm that the
library names, which is seldom the fastest of the about eight that it has. Here what a call takes
besides addresses is made once for each class of calls (`Product`), and so is the choice of the
algorithm (`choose`): measured on the operands of the first call and remembered on disk. Algorithms
may split the depth; parts are added up in fp32 and in the same order in each run, so that results
are repeatable. Other algorithms round differently: results belong to the choice.
"""

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...guards.cached import cached_property
from ...guards.watching import watching
from .. import choices
from ..timing import fastest_on_cuda
from . import library as lt

TRIED = 16
"""Algorithms to ask for."""
SMALL = 2**27
"""Multiplications up to which a product is by the library's first algorithm: it takes a few
microseconds by any."""


def stored(x: Tensor) -> tuple[bool, int] | None:
    """Whether a matrix is stored by columns, and how far they or its rows are apart; or None."""
    (rows, cols), (down, across) = x.shape, x.stride()
    if (across == 1 or cols == 1) and (down >= cols or rows == 1):
        return False, max(down if rows > 1 else cols, cols)
    if (down == 1 or rows == 1) and (across >= rows or cols == 1):
        return True, max(across if cols > 1 else rows, rows)
    return None


def _layout(x: Tensor) -> tuple[int, bool]:
    """A matrix as the library sees it, all stored by columns, and whether x is."""
    found = stored(x)
    if found is None:
        raise lt.CublasError("a matrix is stored neither by rows nor by columns")
    rows, cols = x.shape if found[0] else x.shape[::-1]
    return lt.made("MatrixLayout", lt.TYPES[x.dtype], rows, cols, found[1]), found[0]


class Product:
    """What the library's call takes besides addresses, for one class of operands.

    It computes the transpose of out, which it sees stored by columns: `b.T @ a.T`. So b is the
    library's first operand. Descriptions and layouts live as long as the process.
    """

    def __init__(
        self, out: Tensor, a: Tensor, b: Tensor, modes: tuple[int, int], pointers: dict[int, int],
        c: Tensor | None, fast: bool, epilogue: int, bias: Tensor | None, alignment: int,
        alpha: float,
    ) -> None:  # fmt: skip
        """pointers: attributes of the description that are addresses. Raises CublasError."""
        self.device = out.device.index
        self.handle = lt.handle(self.device)
        (self.first, turned_b), (self.second, turned_a) = _layout(b), _layout(a)
        self.result, wrong = _layout(out)
        self.added = self.result
        if c is not None:
            self.added, turned = _layout(c)
            wrong |= turned
        if wrong:
            raise lt.CublasError("a result is stored by columns")
        self.words = lt.description()
        self.description = ctypes.addressof(self.words)
        values: dict[int, Any] = {
            lt.TRANSPOSE_A: ctypes.c_int32(turned_b), lt.TRANSPOSE_B: ctypes.c_int32(turned_a),
        }  # fmt: skip
        if lt.SCALE_A in pointers:
            values[lt.MODE_A], values[lt.MODE_B] = map(ctypes.c_int32, reversed(modes))
            values[lt.FAST_ACCUM] = ctypes.c_int8(fast)
        if epilogue != lt.PLAIN:
            values[lt.EPILOGUE] = ctypes.c_uint32(epilogue)
        if bias is not None:
            values[lt.BIAS_TYPE] = ctypes.c_int32(lt.TYPES[bias.dtype])
        for attribute, value in values.items():
            if attribute in (lt.MODE_A, lt.MODE_B) and not value.value:
                continue  # libraries before 12.8 do not know it
            lt.assign("MatmulDesc", self.description, attribute, value)
        self.pointers = [(attribute, ctypes.c_uint64()) for attribute in pointers]
        self._places = [ctypes.addressof(word) for _, word in self.pointers]
        self.factors = ctypes.c_float(alpha), ctypes.c_float(c is not None)
        self.alpha, self.beta = map(ctypes.addressof, self.factors)
        self.alignment = alignment
        self.lock = threading.Lock()
        self._point(list(pointers.values()))

    def use(self, algorithm: lt.Algorithm) -> None:
        """Compute it by an algorithm from now on."""
        self.algorithm = algorithm
        self.workspace, self.address = algorithm.workspace, ctypes.addressof(algorithm)

    def _point(self, addresses: Sequence[int]) -> None:
        put = lt.library().cublasLtMatmulDescSetAttribute
        for (attribute, word), place, address in zip(
            self.pointers, self._places, addresses, strict=True
        ):
            if word.value != address:
                word.value = address
                if status := put(self.description, attribute, place, 8):
                    raise lt.CublasError.of(f"address of attribute {attribute}", status)

    @cached_property
    def algorithms(self) -> list[lt.Algorithm]:
        """The library's algorithms for it, the one that it expects to be fastest first.

        Raises CublasError.
        """
        preference = lt.made("MatmulPreference")
        try:
            most = ctypes.c_uint64(lt.WORKSPACE)
            lt.assign("MatmulPreference", preference, lt.MOST_WORKSPACE, most)
            limits = dict.fromkeys(lt.ALIGNMENTS, self.alignment) | {lt.REDUCTIONS: lt.IN_FP32}
            for attribute, limit in limits.items():
                lt.assign("MatmulPreference", preference, attribute, ctypes.c_uint32(limit))
            found, count = (lt.Algorithm * TRIED)(), ctypes.c_int()
            lt.call(
                "cublasLtMatmulAlgoGetHeuristic", self.handle, self.description, self.first,
                self.second, self.added, self.result, preference, TRIED, ctypes.addressof(found),
                ctypes.byref(count),
            )  # fmt: skip
        finally:
            lt.library().cublasLtMatmulPreferenceDestroy(preference)
        there = [each for each in found[: count.value] if not each.state]
        if not there:
            raise lt.CublasError("the library has no algorithm")
        return there

    def checked(self, algorithm: lt.Algorithm) -> lt.Algorithm:
        """It, if the library computes this product by it. Raises CublasError."""
        found = lt.Algorithm()
        lt.call(
            "cublasLtMatmulAlgoCheck", self.handle, self.description, self.first, self.second,
            self.added, self.result, ctypes.addressof(algorithm), ctypes.addressof(found),
        )  # fmt: skip
        if found.workspace > algorithm.workspace:
            needs = f"{found.workspace} bytes of workspace, not {algorithm.workspace}"
            raise lt.CublasError(f"an algorithm takes {needs}")
        return algorithm

    def run(
        self, out: Tensor, a: int, b: int, c: int, addresses: Sequence[int], by: int | None = None
    ) -> None:
        """Compute it, of operands at addresses; by: the number of another algorithm."""
        if by is None:
            address, size = self.address, self.workspace
        else:
            address, size = ctypes.addressof(self.algorithms[by]), self.algorithms[by].workspace
        room, space = None, 0
        if size:  # of PyTorch's allocator: it belongs to the stream
            room = torch.empty(size, dtype=torch.uint8, device=out.device)
            space = room.data_ptr()
        result, stream = out.data_ptr(), torch._C._cuda_getCurrentRawStream(self.device)
        with self.lock:
            if addresses:
                self._point(addresses)
            status = lt.library().cublasLtMatmul(
                self.handle, self.description, self.alpha, b, self.first, a, self.second,
                self.beta, c, self.added, result, self.result, address, space, size, stream,
            )  # fmt: skip
        if status:
            raise lt.CublasError.of("cublasLtMatmul", status)


Operands = tuple[Tensor, int, int, int, Sequence[int]]
"""What `Product.run` takes."""
_products: dict[Any, Product | str] = {}
"""By class; of those that the library has no algorithm for, why."""
_lock = threading.RLock()


def product(
    out: Tensor, a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor] | None = None,
    modes: tuple[int, int] = (lt.TENSOR, lt.TENSOR), bias: Tensor | None = None,
    c: Tensor | None = None, alpha: float = 1.0, fast: bool = False, epilogue: int = lt.PLAIN,
) -> Tensor:  # fmt: skip
    """`alpha * a @ b (+ c) (+ bias)`, written to out, which c may be. Raises CublasError.

    a: `[m, k]`, b: `[k, n]`, by rows or by columns; of FP8 a is by rows, b by columns. out:
    `[m, n]`, by rows. scales: fp32, which values are multiplied with, and if not of tensors at
    multiples of 16 bytes; modes: what each covers (`library.TENSOR` and its like). bias: `[n]`.
    fast: sum FP8 products in the tensor cores' shorter accumulators. epilogue: besides a bias.
    """
    device = out.device.index
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return product(out, a, b, scales, modes, bias, c, alpha, fast, epilogue)
    addresses = []
    if scales is not None:
        addresses = [scales[1].data_ptr(), scales[0].data_ptr()]
        if modes != (lt.TENSOR, lt.TENSOR) and (addresses[0] | addresses[1]) & 15:
            raise lt.CublasError("scales begin at no multiple of 16 bytes", lasting=False)
    if bias is not None:
        addresses.append(bias.data_ptr())
    first, second, third = a.data_ptr(), b.data_ptr(), out.data_ptr()
    fourth = third if c is None else c.data_ptr()
    together = first | second | third | fourth
    key = (
        device, a.dtype, a.shape, a.stride(), b.dtype, b.shape, b.stride(), out.dtype,
        out.stride(), scales is None, modes, None if c is None else (c.dtype, c.stride()), alpha,
        fast, epilogue, None if bias is None else bias.dtype, together & 15,
    )  # fmt: skip
    made = _products.get(key)
    if made is None:
        attributes = []
        if scales is not None:
            attributes += [lt.SCALE_A, lt.SCALE_B]
        if bias is not None:
            attributes.append(lt.BIAS)
            epilogue = lt.WITH_BIAS | (epilogue if epilogue != lt.PLAIN else 0)
        pointers = dict(zip(attributes, addresses, strict=True))
        low = (together | 16) & 31
        # A result that is added to must not be computed twice. Rows are as far apart as out's.
        scratch = out if c is None else out.new_empty_strided(out.shape, out.stride())
        with _lock:
            made = _products.get(key) or _made(
                key,
                lambda: Product(
                    out, a, b, modes, pointers, c, fast, epilogue, bias, low & -low, alpha
                ),
                (scratch, first, second, fourth, addresses),
                a.size(0) * b.numel() <= SMALL,
            )
    if isinstance(made, str):
        raise lt.CublasError(f"{a.dtype} [*, {a.size(1)}] by {b.dtype} {[*b.shape]}: {made}")
    made.run(out, first, second, fourth, addresses)
    if watching.recorder is not None and key not in _products:  # it dies, and is chosen anew
        watching.recorder.refuse("what runs fastest is not known yet")
    elif watching.recorder is not None:
        keys = (attribute for attribute, _ in made.pointers)
        named = [*zip(keys, addresses, strict=True)]
        watching.recorder.product(made, (second, first, fourth, third), named)
    return out


def _made(
    key: Any, make: Callable[[], Product], operands: Operands, small: bool
) -> Product | str:  # fmt: skip
    """The product of a class, or why there is none.

    It is known from now on, unless its algorithm could not be measured now and may be later.
    Raises CublasError where the next call may fare better.
    """
    try:
        made = make()
        made.use(made.algorithms[0] if small else _chosen(repr(key[1:]), made, operands))
    except lt.CublasError as error:
        if not error.lasting:
            raise
        _products[key] = str(error)
        return str(error)
    if small or choices.measurable() or len(made.__dict__.get("algorithms", ())) < 2:
        _products[key] = made
    return made


def _chosen(key: str, made: Product, operands: Operands) -> lt.Algorithm:
    """The algorithm for a class: remembered, or measured now."""
    kept = _choices(made.device)
    known = kept.known(key)
    if known is not None:
        # What is on disk may be no name, or that of no algorithm for this: it is measured again.
        with suppress(ValueError, lt.CublasError):
            return made.checked(lt.Algorithm.of(known))  # asking for algorithms takes its time
    names = [each.name for each in made.algorithms]
    if len(names) == 1:
        return made.algorithms[0]
    runs = {name: partial(made.run, *operands, k) for k, name in enumerate(names)}
    try:
        return lt.Algorithm.of(kept.choose(key, lambda: runs))
    except torch.OutOfMemoryError:  # measuring takes memory of its own
        return made.algorithms[0]


@cache
def _choices(device: int) -> choices.Choices:
    return choices_of("product", device, lambda: _products.clear())


def choices_of(
    kind: str, device: int, forgotten: Callable[[], object], *versions: str
) -> choices.Choices:
    """Those of a kind of device, of these versions of the library, of PyTorch and of others."""
    version = f"cublasLt {lt.library().cublasLtGetVersion()}"
    machine = choices.gpu(torch.device("cuda", device))
    return choices.store(kind, (*machine, version, *versions), _measured, forgotten)


def _measured(runs: Mapping[str, choices.Run]) -> choices.Choice:
    return fastest_on_cuda(choices.working(runs))
