"""Settings from the environment, and the counter that says when plans may be out of date.

`OPSGRAPH_LOGS=plan,reject,code` prints what was planned, `steps` names each step to profilers,
`OPSGRAPH_BACKENDS=triton,reference` limits the backends, `OPSGRAPH_FUEL=n` admits only the first n
fused claims of a plan (bisect with it), `OPSGRAPH_CHECK=1` compares every fused step with the
reference ops, and `OPSGRAPH_REPLAY=0` runs every step from Python. They are read when a module is
planned for the first time, and again after `touch`, which registering a fuser calls.
"""

import os
import threading
from typing import NamedTuple

lock = threading.RLock()
epoch = 0


def _forked() -> None:
    """A forked child has none of the threads that may have held the lock."""
    global lock
    lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Config(NamedTuple):
    """One reading of the environment; no backends means all there are, in their order."""

    logs: frozenset[str]
    backends: tuple[str, ...]
    fuel: int | None
    check: bool
    replay: bool


def touch() -> None:
    """Make every module look again at the registered fusers and the environment."""
    global epoch
    with lock:
        epoch += 1


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


def read() -> Config:
    """The environment as it is now. Raises ValueError if a variable cannot be understood."""
    logs = frozenset(_names("OPSGRAPH_LOGS"))
    if unknown := logs - {"plan", "reject", "code", "steps"}:
        expected = "plan, reject, code or steps"
        raise ValueError(f"OPSGRAPH_LOGS: got {sorted(unknown)}, expected {expected}")
    fuel = os.environ.get("OPSGRAPH_FUEL", "")
    if fuel and not fuel.isdigit():
        raise ValueError(f"OPSGRAPH_FUEL: got {fuel!r}, expected a whole number")
    check, replay = _flag("OPSGRAPH_CHECK", False), _flag("OPSGRAPH_REPLAY", True)
    return Config(logs, _names("OPSGRAPH_BACKENDS"), int(fuel) if fuel else None, check, replay)


def _flag(variable: str, default: bool) -> bool:
    text = os.environ.get(variable, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"{variable}: got {text!r}, expected 0 or 1")
    return text == "1" if text else default
