"""The layers of DeepSeek-V4 that NVFP4 touches, and the router between them."""

from .experts import Experts
from .fake_quant import fake_quantize, fake_quantize_model_
from .linear import GroupedLinear, Linear
from .moe import MoE
from .router import Router
from .shared_expert import SharedExpert, swiglu
from .weights import Weight

__all__ = [
    "Experts",
    "GroupedLinear",
    "Linear",
    "MoE",
    "Router",
    "SharedExpert",
    "Weight",
    "fake_quantize",
    "fake_quantize_model_",
    "swiglu",
]
