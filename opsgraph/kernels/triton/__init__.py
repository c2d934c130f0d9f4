"""Triton kernels: functions on `[rows, width]` tensors, fp32, fp16 or bf16; arithmetic in fp32."""
