"""LoRA layers of peft as ops. The layers keep their parameters, and are asked at each call.

So what peft does to a layer later holds: adapters chosen, switched off, merged and loaded. What the
op cannot follow is an error that says so: an adapter that was added, or another scale.
"""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..base.errors import OpError
from ..ops.linear import Linear
from ..ops.lora import LoRA, LoRALinear

_NAMES = "lora_A", "lora_B"


def is_peft(module: nn.Module) -> bool:
    """Whether that is peft's linear layer with LoRA, or that of a weight that torchao stores.

    Other subclasses may compute anything.
    """
    kinds = {"peft.tuners.lora.layer": "Linear", "peft.tuners.lora.torchao": "TorchaoLoraLinear"}
    return any(
        type(module) is getattr(sys.modules.get(name), kind, None) for name, kind in kinds.items()
    )


class Adapter(nn.Module):
    """lora_A and lora_B of one adapter of a layer; None where the layer computes without it.

    The layer is no child of this. Raises OpError where the layer has an adapter that the op has
    not, or another scale.
    """

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.layer = [layer]
        self.name, self.names, self.scale = name, frozenset(layer.lora_A), layer.scaling[name]

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in _NAMES or "layer" not in self.__dict__:
            return super().__getattr__(attribute)
        return self._read(self.__dict__["layer"][0], attribute)

    def _read(self, layer: Any, attribute: str) -> Tensor | None:
        expected = "the op made anew, by Linear.of(layer)"
        if layer.merged and layer.disable_adapters:
            raise OpError("LoRALinear", "adapters merged and then disabled", "unmerge_adapter()")
        if layer.merged or layer.disable_adapters:
            return None
        active = layer.active_adapters
        if added := [a for a in active if a not in self.names and a in layer.lora_A]:
            raise OpError("LoRALinear", f"adapter {added[0]!r} added to the layer", expected)
        if self.name not in active or self.name not in layer.lora_A:
            return None
        if layer.scaling[self.name] != self.scale:
            got = f"scale {layer.scaling[self.name]} of adapter {self.name!r}, once {self.scale}"
            raise OpError("LoRALinear", got, expected)
        weight: Tensor = getattr(layer, attribute)[self.name].weight
        return weight


def reason_against(layer: Any) -> str | None:
    """Why a layer of peft is no LoRALinear, but for what its base layer says."""
    if layer.lora_variant:
        kind = type(next(iter(layer.lora_variant.values()))).__name__
        return f"its adapter computes in another way ({kind})"
    if any(layer.lora_bias.values()):
        return "its adapter has a bias"
    if any(type(drop) not in (nn.Dropout, nn.Identity) for drop in layer.lora_dropout.values()):
        return "its adapter has another dropout than nn.Dropout"
    return "its weight is transposed" if layer.fan_in_fan_out else None


def adapted(base: Linear, layers: Sequence[Any]) -> LoRALinear:
    """The op of layers that each have adapters; base: of their base layers, one after the other."""
    branches, start = list[LoRA](), 0
    for layer in layers:
        rows = layer.out_features
        for name in layer.lora_A if is_peft(layer) else ():
            branch = LoRA(
                base.in_features or 0,
                rows,
                layer.lora_A[name].weight.shape[0],
                dropout=getattr(layer.lora_dropout[name], "p", 0.0),
                start=start if len(layers) > 1 else None,
                device="meta",
            )
            branch.scale = layer.scaling[name]
            branch.borrow(Adapter(layer, name), lora_A="lora_A", lora_B="lora_B")
            branches.append(branch)
        start += rows
    return LoRALinear(base, *branches).train(layers[0].training)
