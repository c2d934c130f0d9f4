"""Kernels: functions on tensors, one folder per backend."""
