"""Launch configurations of kernels: measured ones where there are some, else the usual ones.

Each family of kernels offers a few for a key, such as a width and a dtype, the usual one first.
`python -m opsgraph tune` measures them; a choice holds for every number of rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from .choices import Choices, gpu, store, working
from .timing import fastest_on_cuda

Config = dict[str, Any]
Where = tuple[Any, ...]
"""A kernel's name and the key."""

_chosen: dict[Where, Config] = {}
"""By where; behind the number of the GPU where there are several kinds of them."""
_asked: dict[Where, Sequence[Config]] | None = None
"""What was asked for and is not known, while that is noted."""


def configured(kernel: str, key: Where, offered: Callable[..., Sequence[Config]]) -> Config:
    """The configuration of a kernel for a key: of those that `offered(*key)` gives.

    It is that for the current GPU.
    """
    where = kernel, *key
    found = _chosen.get(_here(where))
    return found if found is not None else _find(where, offered(*key))


def around(usual: Config, **bounds: tuple[int, int]) -> tuple[Config, ...]:
    """A configuration, and those with a value, or all of them, doubled or halved within bounds.

    Values that it does not have are left out.
    """
    there = [name for name in bounds if name in usual]
    found = [usual]
    for names in (*([name] for name in there), there):
        for more, less in ((2, 1), (1, 2)):
            made = usual | {name: usual[name] * more // less for name in names}
            inside = all(bounds[n][0] <= made[n] <= bounds[n][1] for n in names)
            if inside and made not in found:
                found.append(made)
    return tuple(found)


def _find(where: Where, offered: Sequence[Config]) -> Config:
    kept, asked = choices(), _asked  # which another thread may take away
    if kept is None:
        if asked is not None:
            asked[where] = offered
        return offered[0]
    known = kept.known(text(where))
    for config in offered:
        if text(config.items()) == known:
            _chosen[_here(where)] = config
            return config
    if asked is not None:
        asked[where] = offered
    else:
        _chosen[_here(where)] = offered[0]
    return offered[0]


def _here(where: Where) -> Where:
    if torch.cuda.is_initialized() and _kinds() > 1:
        return torch.cuda.current_device(), *where
    return where


@cache
def _kinds() -> int:
    """How many kinds of GPUs there are."""
    every = range(torch.cuda.device_count())
    return len({gpu(torch.device("cuda", index)) for index in every})


def text(parts: Any) -> str:
    """A key or a configuration as the file of choices has it."""
    flat = [item for part in parts for item in (part if isinstance(part, tuple) else (part,))]
    return " ".join(str(item).removeprefix("torch.") for item in flat)


def choices() -> Choices | None:
    """The choices for the current GPU; None without one."""
    if not torch.cuda.is_initialized():
        return None
    return _on(torch.cuda.current_device())


@cache
def _on(index: int) -> Choices:
    import triton

    machine = gpu(torch.device("cuda", index))
    versions = f"triton {triton.__version__}"
    return store("launch", (*machine, versions), fastest_on_cuda, lambda: _chosen.clear())


@contextmanager
def asked() -> Iterator[dict[Where, Sequence[Config]]]:
    """Note which configurations are asked for, by all threads, and were not measured."""
    global _asked
    _chosen.clear()
    _asked = found = dict[Where, Sequence[Config]]()
    try:
        yield found
    finally:
        _asked = None


def decide(where: Where, offered: Sequence[Config], run: Callable[[], object]) -> None:
    """Measure what runs a kernel with each of the configurations, and keep the best."""
    kept, named = choices(), {text(config.items()): config for config in offered}
    if kept is None:
        return

    def tried(config: Config) -> object:
        _chosen[_here(where)] = config
        return run()

    def runs() -> Mapping[str, Callable[[], object]]:
        return working({name: partial(tried, config) for name, config in named.items()})

    try:
        _chosen[_here(where)] = named[kept.choose(text(where), runs)]
    except BaseException:
        _chosen.pop(_here(where), None)
        raise
