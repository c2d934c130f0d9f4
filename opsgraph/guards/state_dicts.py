"""State dicts: parameters whose sizes are not known yet, and what other libraries save beside."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from .watched import Watched


def without_extra_state(state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The state dict for a module at that prefix, which keeps nothing that is pickled."""
    extra = f"{prefix}_extra_state"
    if extra not in state_dict:
        return state_dict
    return {key: value for key, value in state_dict.items() if key != extra}


class StateDicts(Watched):
    """A module whose parameters may be uninitialized when it is saved and loaded."""

    def _own_keys(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """A state dict without the pickled `_extra_state` that TransformerEngine's ops save."""
        return without_extra_state(state_dict, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict = self._own_keys(state_dict, prefix)
        for name, parameter in self._parameters.items():
            loaded = state_dict.get(prefix + name)
            if isinstance(parameter, UninitializedParameter) and isinstance(loaded, Tensor):
                parameter.materialize(loaded.shape)
                self.sizes_from(name, loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, True)
        for name in self._parameters:
            value = destination.get(prefix + name)
            if (
                value is not None
                and not keep_vars
                and not isinstance(value, UninitializedParameter)
            ):
                destination[prefix + name] = value.detach()
