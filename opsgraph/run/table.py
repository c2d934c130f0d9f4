"""Where plans are kept, by structure, so that equal layers plan, and compile, once.

A table holds skeletons of the ops, without parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

from ..base import config
from ..features.compiled import retire
from ..fuser import registered
from ..guards.constants import key as plan_key
from ..guards.watched import mutable
from ..ops.delayed import Queue
from ..plan import Plan
from ..plan.basic_ops import BasicOps
from ..precision.delayed import Scaling
from .key import PlainKey
from .options import Options

MOST = 1024
"""Plans of one table: beyond that the oldest is made again if it is needed again."""


class Plans(dict[PlainKey, Plan]):
    """Plans by key, of which the oldest go where there are many: some ops have any width."""

    changes = 0

    def __setitem__(self, key: PlainKey, plan: Plan) -> None:
        super().__setitem__(key, plan)
        self.changes += 1
        if len(self) > MOST:
            del self[next(iter(self))]


class PlanTable:
    """Plans by key, for all modules whose ops have the same classes, settings and channels."""

    def __init__(self, run: BasicOps, options: Options) -> None:
        self.run, self.options = run, options
        self.plans: dict[PlainKey, Plan] = Plans()
        self.exposed = SimpleNamespace()
        """Plans by handle, as attributes: a dict that a trace has read once is not read again."""
        weakref.finalize(self, retire, self.exposed.__dict__).atexit = False


_tables: weakref.WeakValueDictionary[Any, PlanTable] = weakref.WeakValueDictionary()


def table_for(run: BasicOps, options: Options, shapes: Sequence[Any]) -> PlanTable:
    """The table of a structure and its parameters' shapes; its own if a setting is no key."""
    options = replace(options, config=config.read(), queue=Queue())  # what waits is the module's
    try:
        parts = list[Any]()
        for kind, op in zip(run.kinds, run.ops, strict=True):
            if op._buffers or any(not isinstance(m, Scaling) for m in op._modules.values()):
                raise TypeError
            settings = op.settings()
            if any(map(mutable, settings.values())):
                raise TypeError  # a skeleton would share what others change
            keys = chain.from_iterable(map(plan_key, settings.values()))
            parts += kind, type(op), *settings, *keys  # a type first says how many belong to it
        wiring = (tuple(run.sources.items()), tuple(i[:2] for i in run.inputs), tuple(run.outputs))
        fusers = tuple(fuser.serial for fuser in registered())
        recipe = (tuple(run.quantizers.items()), tuple(run.overrides.items()))
        own = (tuple(parts), tuple(shapes), tuple(run.labels))
        key = (*own, wiring, recipe, options, options.order, fusers)
    except TypeError:
        proxies: list[Any] = [weakref.proxy(op) for op in run.ops]
        return PlanTable(run.with_ops(proxies), options)
    table = _tables.get(key)
    if table is None:
        bare = {id(op): op.skeleton() for op in run.ops}
        ops = [bare[id(op)] for op in run.ops]
        table = _tables[key] = PlanTable(run.with_ops(ops), options)
    return table
