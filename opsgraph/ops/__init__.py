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
from .bias import Bias
from .collectives import AllGather, AllReduce, AllReduceGrad, ReduceScatter
from .elementwise import ConstantScale, Dropout, Identity, Reshape
from .grouped import GroupedLinear
from .l2 import L2Normalization
from .linear import BasicLinear, Linear
from .norms import LayerNorm, RMSNorm
from .quantize import Quantize, QuantizeGrad
from .residual import Add, AddExtraInput, MakeExtraOutput, Residual, Tee
from .scaled import (
    ScaledClampedQGeGLU,
    ScaledClampedSwiGLU,
    ScaledGEGLU,
    ScaledQGEGLU,
    ScaledReGLU,
    ScaledSiTUGLU,
    ScaledSReLU,
    ScaledSwiGLU,
    ScaledTanhSReLU,
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
    "ScaledClampedQGeGLU",
    "ScaledClampedSwiGLU",
    "ScaledGEGLU",
    "ScaledQGEGLU",
    "ScaledReGLU",
    "ScaledSReLU",
    "ScaledSiTUGLU",
    "ScaledSwiGLU",
    "ScaledTanhSReLU",
    "SiLU",
    "SiTUGLU",
    "SwiGLU",
    "Tee",
]
