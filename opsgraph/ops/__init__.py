"""The basic ops; each is a torch module and may also be called alone."""

from .activations import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    QGELU,
    ClampedSwiGLU,
    ClippedGELU,
    Gated,
    Hardswish,
    LeakyReLU,
    Mish,
    ReGLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    SiTUGLU,
    SReGLU,
    SReLU,
    SwiGLU,
    Tanh,
)
from .adaptive import AdaptiveLayerNorm, AdaptiveRMSNorm, Modulate
from .bias import Bias
from .collectives import AllGather, AllReduce, AllReduceGrad, ReduceScatter
from .elementwise import ConstantScale, Dropout, Identity, Reshape
from .grouped import GroupedLinear
from .l2 import L2Normalization
from .layer_scale import LayerScale
from .linear import BasicLinear, Linear
from .lora import LoRA, LoRALinear
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
from .scaled_add import ScaledAdd, WeightedAdd
from .transposed import TransposedGroupedLinear, TransposedLinear
from .xielu import XIELU

__all__ = [
    "GEGLU",
    "GELU",
    "GLU",
    "QGEGLU",
    "QGELU",
    "XIELU",
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
    "ClippedGELU",
    "ConstantScale",
    "Dropout",
    "Gated",
    "GroupedLinear",
    "Hardswish",
    "Identity",
    "L2Normalization",
    "LayerNorm",
    "LayerScale",
    "LeakyReLU",
    "Linear",
    "LoRA",
    "LoRALinear",
    "MakeExtraOutput",
    "Mish",
    "Modulate",
    "Quantize",
    "QuantizeGrad",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ReLU6",
    "ReduceScatter",
    "Reshape",
    "Residual",
    "SReGLU",
    "SReLU",
    "ScaledAdd",
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
    "Sigmoid",
    "SwiGLU",
    "Tanh",
    "Tee",
    "TransposedGroupedLinear",
    "TransposedLinear",
    "WeightedAdd",
]
