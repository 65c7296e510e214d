"""DeepSeek-V4 as published, on the layers of dsv4lab."""

from .cache import Cache
from .config import CSA, HCA, SLIDING, ModelConfig, Yarn
from .transformer import Block, DeepseekV4, count_parameters

__all__ = ["CSA", "HCA", "SLIDING", "Block", "Cache", "DeepseekV4", "ModelConfig", "Yarn", "count_parameters"]
