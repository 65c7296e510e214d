"""Safetensors files written one tensor at a time, and nothing half-written under a final name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import INDEX, CheckpointError
from .names import is_quantizable, parts, to_transformers

_WORDS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
DTYPE_BYTES = {
    "F32": 4,
    "BF16": 2,
    "I64": 8,
    "U8": 1,
    "F8_E4M3": 1,
    "F16": 2,
    "I32": 4,
    "I8": 1,
    "F8_E8M0": 1,
}


@dataclass(frozen=True)
class Spec:
    """A tensor about to be written: its name, safetensors' word for its dtype, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPE_BYTES[self.dtype]


def write_safetensors(file: Path, specs: list[Spec], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file while its tensors are being made, holding one of them at a time.

    Args:
        file: to write, overwritten.
        specs: what comes, in order.
        tensors: the same number, each as its spec says.

    Raises:
        ValueError: a tensor has another size than its spec says.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for spec in specs:
        start, end = end, end + spec.bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
            if data.size != spec.bytes:
                raise ValueError(
                    f"{file}: tensor {spec.name} has {data.size} bytes, announced were {spec.bytes}"
                )
            out.write(data)
        out.flush()
        os.fsync(out.fileno())


def save(config, state: dict[str, Tensor], directory: str | Path, *, replace: bool = False,
         dialect: str = "transformers") -> None:  # fmt: skip
    """Write a model as model.safetensors and config.json, each under a temporary name first.

    Args:
        config: the `ModelConfig`.
        state: the model's state_dict, bf16 or float32; experts are written one by one.
        directory: made if it is not there; other files in it stay.
        replace: whether an existing model may be overwritten.
        dialect: "transformers", which every reader takes, or "deepseek".

    Raises:
        ValueError: an unknown dialect, or a dtype safetensors has no word for here.
        CheckpointError: the folder holds a model and `replace` is false, or cannot be written.
    """
    if dialect not in ("transformers", "deepseek"):
        raise ValueError(f'dialect must be "transformers" or "deepseek", got {dialect!r}')
    directory = Path(directory)
    model, settings = directory / "model.safetensors", directory / "config.json"
    if not replace and (model.exists() or settings.exists() or (directory / INDEX).exists()):
        raise CheckpointError(f"{directory}: holds a model already")
    rename = to_transformers if dialect == "transformers" else str
    pieces = [(rename(name), tensor) for name, tensor in split(state)]
    specs = [Spec(name, _word(name, tensor), tuple(tensor.shape)) for name, tensor in pieces]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_then_rename(model, lambda file: write_safetensors(file, specs, (t for _, t in pieces)))
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        _write_then_rename(settings, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {error.strerror}") from None


def split(state: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a module tree as a checkpoint names them: one for each expert and projection."""
    for name, tensor in state.items():
        if is_quantizable(name) and tensor.dtype == torch.uint8:
            raise ValueError(
                f"state holds {name} in NVFP4; save in high precision, then quantize the checkpoint"
            )
        for part in parts(name, tuple(tensor.shape)):
            yield part.name, tensor[part.rows]


def _write_then_rename(file: Path, write) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _word(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _WORDS:
        raise ValueError(f"state[{name!r}] is {tensor.dtype}, which a checkpoint does not hold")
    return _WORDS[tensor.dtype]
