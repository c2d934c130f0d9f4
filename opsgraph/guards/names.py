"""What values are called in generated source: no two share a variable, whatever users call them.

A value of op 3 that its class calls `rstd` is `rstd3`, and `rstd1_3` if the class calls it `rstd1`.
The source decorates such a name: `d`, `q` and `ref_` stand before it, `_stored`, `_more`, `_row0`
and `_col0` after it. `root` takes all decorations off. A name is taken only if its root is free, so
no decorated name is another's. That a root is the same with more decorations follows from their
shapes: those in front have no digit and start with three letters that differ, while names end in
their number; those behind have one underscore, at their start.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain, count
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

from .arguments import STORED

WORDS = frozenset({"_", "ops", "saved", "torch", "inf", "nan", "check", "check_ranks"}) | frozenset(
    {"run_reference", "forward", "backward", "delayed", "part", "note", "__builtins__"}
)
"""Names that generated source uses for itself."""

_BEFORE = re.compile("(?:ref_|d|q)*")
_AFTER = re.compile(rf"(?:{STORED}|_more|_(?:row|col)[0-9]+)*$")
_OWN = re.compile("xq[0-9]+_[0-9]+|(?:scales|seen)_[0-9]+")
"""Parts of a quantized value that is kept; what joined passes take for each layer."""


@lru_cache(maxsize=4096)
def root(text: str) -> str:
    """A variable's name without all that the source puts before and behind it."""
    behind = _AFTER.search(text)
    assert behind is not None
    start = _BEFORE.match(text).end()  # type: ignore[union-attr]
    return text[start : max(start, behind.start())]


def variable(name: str, number: str, taken: Iterable[str] | Mapping[str, object]) -> str:
    """What is called `name` by op `number`: the first spelling whose root is not taken."""
    stem = name if name.isascii() else normalize("NFKC", name)  # as Python reads it
    stem += "_" * stem[-1].isdigit()
    while root(text := f"{stem}{number}") in taken or _OWN.fullmatch(text):
        stem += "_"
    return text


@lru_cache(maxsize=1024)
def _identifier(name: str) -> str:
    base = re.sub(r"\W", "_", normalize("NFKC", name)) or "_"
    return f"_{base}_" if iskeyword(base) or base in WORDS or not base.isidentifier() else base


def free(name: str, taken: Iterable[str]) -> Iterable[str]:
    """Spellings of a function's or an object's name that are no variable's, the nicest first."""
    base = _identifier(name)
    between = "_" * base[-1].isdigit()
    spelled = chain([base], (f"{base}{between}{k}" for k in count(2)))
    right = (text for text in spelled if text not in WORDS and not _OWN.fullmatch(text))
    return (text for text in right if root(text) not in taken)


def of_opsgraph(target: Any) -> bool:
    """Whether a function, a class, or an object by its class, is opsgraph's own and no user's."""
    kind = target if hasattr(target, "__module__") else type(target)
    return str(kind.__module__).startswith("opsgraph.")
