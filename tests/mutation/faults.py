"""Planted faults: what a slip of a hand would leave, in each part of the product."""

from .form import Fault, fault

KERNELS = (
    fault(
        "norm-epsilon", "A norm on the CPU ignores its epsilon.",
        "kernels/cpu/source/norms.h", "__builtin_sqrt(square + n.eps)", "__builtin_sqrt(square)",
        "kernels/test_cpu_kernels.py",
    ),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = KERNELS
