"""XIELU, an activation with two trainable scalars: Apertus' (Huang and Schlag, 2024)."""

from collections.abc import Collection, Iterable
from math import expm1, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor, nn

from ..guards.validation import Checked, number, place
from ..kernels.reference import xielu
from ..op import Op, Spec


def _finite(who: str, name: str, value: Any) -> float:
    return number(who, name, value, "a finite number", isfinite)


class XIELU(Op):
    """`p * x^2 + beta * x` where x > 0, else `n * (exp(min(x, eps)) - 1 - x) + beta * x`.

    p = softplus(alpha_p), n = beta + softplus(alpha_n); alpha_p and alpha_n are parameters `[1]` of
    any float dtype, set so that p and n begin as alpha_p_init and alpha_n_init, which have to be
    above 0 and above beta. Computed in fp32; y has x's dtype. eps: -1e-6, as transformers has it.
    """

    keeps_width = True
    required = as_stored = ("alpha_p", "alpha_n")
    constants = ("beta", "eps")
    beta = Checked(_finite)
    eps = Checked(_finite)

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        eps: float = -1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place("XIELU", device, dtype)
        super().__init__()
        self.beta, self.eps = beta, eps
        above = "a finite number above {}".format
        self.alpha_p_init = number(
            "XIELU", "alpha_p_init", alpha_p_init, above(0), lambda v: 0 < v < inf
        )
        self.alpha_n_init = number(
            "XIELU", "alpha_n_init", alpha_n_init, above(self.beta), lambda v: self.beta < v < inf
        )
        self.alpha_p = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.alpha_n = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to the inverse softplus of what p and n begin as."""
        for parameter, begin in (
            (self.alpha_p, self.alpha_p_init), (self.alpha_n, self.alpha_n_init - self.beta)
        ):  # fmt: skip
            # log(exp(begin) - 1), of whatever size
            nn.init.constant_(parameter, begin + log(-expm1(-begin)))

    def out(self, x: Spec) -> Spec:
        return x

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        return (1,)

    def fwd(
        self, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float
    ) -> tuple[Tensor, tuple[()]]:
        return xielu.xielu_forward(x, alpha_p, alpha_n, beta, eps), ()

    def bwd(
        self, dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float,
        want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
        dx, *sums = xielu.xielu_backward(dy, x, alpha_p, alpha_n, beta, eps, want)
        return dx, (sums[0], sums[1])

    def extra_repr(self) -> str:
        return f"beta={self.beta}, eps={self.eps}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)
