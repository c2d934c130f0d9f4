"""The backends, and the devices that each is for; an absent one has a reason."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Backend:
    """A way to run fused steps: its name, what it is, and for which kinds of device it is."""

    name: str
    about: str
    devices: tuple[str, ...] | None = None
    probe: Callable[[], str | None] = lambda: None
    emulated: Callable[[], bool] = lambda: False
    """Whether an interpreter runs it on any device."""

    @cache  # noqa: B019  backends live as long as the process
    def why_not(self) -> str | None:
        """Why the backend is absent here, or None when it is there."""
        return self.probe()

    def why_not_on(self, device: torch.device) -> str | None:
        """Why it cannot run on that device, or None when it can."""
        reason = self.why_not()
        if reason is None and self.devices and device.type not in self.devices:
            if not self.emulated():
                return f"runs on {' or '.join(self.devices)}, not on {device.type}"
        return reason


_BACKENDS = {"reference": Backend("reference", "plain PyTorch, one op at a time")}


def backends() -> dict[str, Backend]:
    """Every backend by name, in order of preference."""
    return dict(_BACKENDS)


def add_backend(backend: Backend, before: str = "reference") -> None:
    """Make a backend known, so that fusers may name it, and prefer it to the one called `before`.

    Raises ValueError for a name that is no word or known already, and if none is called `before`.
    """
    global _BACKENDS
    if backend.name in _BACKENDS or not backend.name.isidentifier():
        raise ValueError(f"backend {backend.name!r} is known already, or no word")
    if before not in _BACKENDS:
        raise ValueError(f"got before={before!r}, expected one of {', '.join(_BACKENDS)}")
    found: dict[str, Backend] = {}
    for name, known in _BACKENDS.items():
        found |= {backend.name: backend, name: known} if name == before else {name: known}
    _BACKENDS = found
