"""Checkpoints in and out: safetensors folders in transformers', DeepSeek's and ModelOpt's dialects."""

from .convert import quantize_checkpoint
from .files import Checkpoint, CheckpointError
from .load import NANO, load, load_config, load_model
from .save import save

__all__ = [
    "NANO",
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_config",
    "load_model",
    "quantize_checkpoint",
    "save",
]
