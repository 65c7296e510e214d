"""The layers of DeepSeek-V4 that NVFP4 touches, and the router between them."""

from .activation import QuantizedInput
from .experts import Experts
from .fake_quant import fake_quantize, fake_quantize_model_
from .grouped_linear import GroupedLinear
from .linear import Linear
from .moe import MoE
from .router import Router
from .shared_expert import SharedExpert, swiglu
from .weights import Weight
from .whole_model import quantizable_layers, quantize_model_, set_activation_scale_, warmup

__all__ = [
    "Experts",
    "GroupedLinear",
    "Linear",
    "MoE",
    "QuantizedInput",
    "Router",
    "SharedExpert",
    "Weight",
    "fake_quantize",
    "fake_quantize_model_",
    "quantizable_layers",
    "quantize_model_",
    "set_activation_scale_",
    "swiglu",
    "warmup",
]
