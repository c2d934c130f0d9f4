"""Triton kernels: functions on `[rows, width]` tensors, fp32, fp16 or bf16; arithmetic in fp32."""

import os


def interpreting() -> bool:
    """Whether Triton was told to run its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
