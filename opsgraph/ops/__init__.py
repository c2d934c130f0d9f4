"""The basic ops; each is a torch module and may also be called alone."""

from .activations import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    QGELU,
    ClampedSwiGLU,
    ReGLU,
    ReLU,
    SiLU,
    SiTUGLU,
    SReGLU,
    SReLU,
    SwiGLU,
)
from .elementwise import ConstantScale, Dropout, Identity, Reshape
from .linear import BasicLinear, Bias, Linear
from .norms import L2Normalization, LayerNorm, RMSNorm
from .residual import Add, AddExtraInput, MakeExtraOutput, Residual, Tee

__all__ = [
    "GEGLU",
    "GELU",
    "GLU",
    "QGEGLU",
    "QGELU",
    "Add",
    "AddExtraInput",
    "BasicLinear",
    "Bias",
    "ClampedSwiGLU",
    "ConstantScale",
    "Dropout",
    "Identity",
    "L2Normalization",
    "LayerNorm",
    "Linear",
    "MakeExtraOutput",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "Reshape",
    "Residual",
    "SReGLU",
    "SReLU",
    "SiLU",
    "SiTUGLU",
    "SwiGLU",
    "Tee",
]
