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
from .adaptive import AdaptiveLayerNorm, AdaptiveRMSNorm, Modulate
from .collectives import AllGather, AllReduce, AllReduceGrad, ReduceScatter
from .elementwise import ConstantScale, Dropout, Identity, Reshape
from .grouped import GroupedLinear
from .linear import BasicLinear, Bias, Linear
from .norms import L2Normalization, LayerNorm, RMSNorm
from .quantize import Quantize, QuantizeGrad
from .residual import Add, AddExtraInput, MakeExtraOutput, Residual, Tee
from .scaled import (
    ScaledClampedSwiGLU,
    ScaledGEGLU,
    ScaledQGEGLU,
    ScaledReGLU,
    ScaledSReLU,
    ScaledSwiGLU,
)

__all__ = [
    "GEGLU",
    "GELU",
    "GLU",
    "QGEGLU",
    "QGELU",
    "AdaptiveLayerNorm",
    "AdaptiveRMSNorm",
    "Add",
    "AddExtraInput",
    "AllGather",
    "AllReduce",
    "AllReduceGrad",
    "BasicLinear",
    "Bias",
    "ClampedSwiGLU",
    "ConstantScale",
    "Dropout",
    "GroupedLinear",
    "Identity",
    "L2Normalization",
    "LayerNorm",
    "Linear",
    "MakeExtraOutput",
    "Modulate",
    "Quantize",
    "QuantizeGrad",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ReduceScatter",
    "Reshape",
    "Residual",
    "SReGLU",
    "SReLU",
    "ScaledClampedSwiGLU",
    "ScaledGEGLU",
    "ScaledQGEGLU",
    "ScaledReGLU",
    "ScaledSReLU",
    "ScaledSwiGLU",
    "SiLU",
    "SiTUGLU",
    "SwiGLU",
    "Tee",
]
