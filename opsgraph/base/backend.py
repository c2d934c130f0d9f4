"""The backends, and the devices that each is for; an absent one has a reason."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


def _always() -> None:
    return None


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def _overlap() -> str | None:
    return None if torch.distributed.is_available() else "this PyTorch has no torch.distributed"


def _symmetric() -> str | None:
    if torch.distributed.is_available() and torch.cuda.is_available():
        return None
    return _overlap() or "no CUDA device, whose memory other ranks could read"


def _cublaslt() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device; recipes are emulated exactly"
    if torch.cuda.get_device_capability() < (8, 9):
        return "the device has no FP8 units (sm_89 has); recipes are emulated exactly"
    return None


def interpreting() -> bool:
    """Whether Triton was told to run its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Backend:
    """A way to run fused steps: its name, what it is, and for which kinds of device it is."""

    name: str
    about: str
    devices: tuple[str, ...] | None = None
    probe: Callable[[], str | None] = _always

    @cache  # noqa: B019  backends live as long as the process
    def why_not(self) -> str | None:
        """Why the backend is absent here, or None when it is there."""
        return self.probe()

    def why_not_on(self, device: torch.device) -> str | None:
        """Why it cannot run on that device, or None when it can."""
        reason = self.why_not()
        if reason is None and self.devices and device.type not in self.devices:
            if self.name == "triton" and interpreting():
                return None
            return f"runs on {' or '.join(self.devices)}, not on {device.type}"
        return reason


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("symmetric", "PyTorch's symmetric memory over NVLink", ("cuda",), _symmetric),
        Backend("overlap", "collectives in pieces, behind matrix products", None, _overlap),
        Backend("triton", "Triton kernels", ("cuda",), _triton),
        Backend("cublaslt", "scaled GEMMs of cuBLASLt, under recipes", ("cuda",), _cublaslt),
        Backend("aten", "PyTorch's own fused calls (cublasLt, oneDNN)"),
        Backend("reference", "plain PyTorch, one op at a time"),
    )
}


def backends() -> dict[str, Backend]:
    """Every backend by name."""
    return dict(_BACKENDS)


def add_backend(backend: Backend, before: str = "reference") -> None:
    """Make a backend known, so that fusers may name it, and prefer it to the one called `before`.

    Raises ValueError if it is known already, or if no backend is called `before`.
    """
    global _BACKENDS
    if backend.name in _BACKENDS:
        raise ValueError(f"backend {backend.name!r} is known already")
    if before not in _BACKENDS:
        raise ValueError(f"got before={before!r}, expected one of {', '.join(_BACKENDS)}")
    found: dict[str, Backend] = {}
    for name, known in _BACKENDS.items():
        found |= {backend.name: backend, name: known} if name == before else {name: known}
    _BACKENDS = found
