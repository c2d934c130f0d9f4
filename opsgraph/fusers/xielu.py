"""XIELU by the kernels of a backend."""

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from ..fuser import Fuser
from ..ops import XIELU


class XIELUFuser(Fuser):
    """xIELU, and its three gradients, each in one pass. kernels: `xielu_forward`, `_backward`."""

    kernels: ClassVar[Any]
    pattern = dict(act=XIELU)
    wants = dict(act_alpha_p="alpha_p", act_alpha_n="alpha_n")

    def fwd(
        self, x: Tensor, act_alpha_p: Tensor, act_alpha_n: Tensor, act_beta: float, act_eps: float
    ) -> Any:
        return self.kernels.xielu_forward(x, act_alpha_p, act_alpha_n, act_beta, act_eps), ()

    def bwd(
        self, dy: Tensor, act_x: Tensor, act_alpha_p: Tensor, act_alpha_n: Tensor,
        act_beta: float, act_eps: float, want: Collection[str],
    ) -> Any:  # fmt: skip
        alphas = act_alpha_p, act_alpha_n
        dx, *sums = self.kernels.xielu_backward(dy, act_x, *alphas, act_beta, act_eps, want)
        return dx, tuple(sums)
