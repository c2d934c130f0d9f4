"""A weight `[in, out]` of another layer as one `[out, in]`, without a copy: Conv1D."""

from typing import Any

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, `y = x @ weight + bias`."""
    kind = type(module)
    theirs = kind.__module__.partition(".")[0].startswith("transformers")
    return theirs and kind.__name__ == "Conv1D" and {*module._parameters} == {"weight", "bias"}


class TransposedLayer(nn.Module):
    """The weight of a layer by its transposed view, and its bias; the layer keeps the parameters.

    Gradients arrive at the layer's own parameters, and what is put in their place counts.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no child of this

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", "bias") or "layer" not in self.__dict__:
            return super().__getattr__(name)
        value = getattr(self.__dict__["layer"], name)
        return value if value is None or name == "bias" else value.t()
