"""What the quantizing kernels read: a tensor, or what a norm or an activation makes of it."""

from typing import Any, NamedTuple

from torch import Tensor

from .functions import Kind
from .launch import packed, row_major

PLAIN = Kind(None, False)._asdict()


class Source(NamedTuple):
    """What is quantized, `width` wide: the operands of `quantize_tiles._source`."""

    name: str
    x: Tensor
    width: int
    bias: Tensor | None = None
    weight: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    flags: dict[str, Any] = PLAIN
    zero_centered: int = 0

    def laid_out(self) -> "Source":
        """The same with operands that the kernels can read."""
        return self._replace(
            x=row_major(self.x),
            bias=packed(self.bias),
            weight=packed(self.weight),
            mean=packed(self.mean),
            rstd=packed(self.rstd),
        )

    def operands(self) -> tuple[Tensor | None, ...]:
        """The kernels' first arguments."""
        return self.x, self.bias, self.weight, self.mean, self.rstd

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments that say what is made, and how it rounds."""
        return {
            "SOURCE": self.name,
            "WIDTH": self.width,
            **self.flags,
            "ZERO_CENTERED": int(self.zero_centered),
            "enable_fp_fusion": self.name == "norm",  # as the kernel of each has it
        }
