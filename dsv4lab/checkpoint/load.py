"""A checkpoint's tensors under the module tree's names, checked one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv4lab.formats import GLOBAL_MAX, GLOBAL_MIN

from .files import Checkpoint, CheckpointError, Entry, read_json
from .match import Match, Stored, WithoutDraws, match

NANO = Path(__file__).resolve().parents[2] / "data" / "nano"
"""The model that ships with the repository."""

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and the name at hand."""


def load_config(directory: str | Path):
    """The `ModelConfig` in a folder's config.json.

    Raises:
        CheckpointError: no such file, no JSON, or sizes that make no model.
    """
    from dsv4lab.model import ModelConfig

    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such folder")
    file = Path(directory) / "config.json"
    values = read_json(file)
    try:
        return ModelConfig.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file}: {what}") from None


def load(directory: str | Path, *, progress: Progress | None = None) -> tuple:
    """Read a checkpoint.

    Args:
        directory: config.json and safetensors, single or sharded, in any of the dialects, bf16 or float32;
            linears may be NVFP4, their global scales in ModelOpt's direction or in compressed-tensors'.
        progress: called before each tensor.

    Returns:
        The `ModelConfig`, and the state: module tree name -> tensor. High-precision tensors keep their dtype,
        experts are stacked. An NVFP4 weight X gives X.weight uint8 (..., N, K/2), X.weight_scale uint8 (E4M3
        bytes, linear) (..., N, K/16), X.weight_scale_2 float32: () for a linear, (2,) for the shared
        expert's gate and up, (E, 2) and (E,) for the experts', and, where the checkpoint has it, an
        X.input_scale float32: (), (E,) for experts (the larger of gate's and up's), () or
        (G,) for wo_a.

    Raises:
        CheckpointError: one line naming the file and the tensor.
    """
    config = load_config(directory)
    source = Checkpoint(directory)
    matches = match(config, source)
    state = {}
    for i, one in enumerate(matches):
        if progress:
            progress(i, len(matches), one.name)
        state.update(
            _read_nvfp4(source, one, config) if one.quantized else {one.name: _read(source, one, config)}
        )
    return config, state


def _read(source: Checkpoint, one: Match, config) -> Tensor:
    pieces = [(stored.part, read_plain(source, stored.entries["plain"], config)) for stored in one.stored]
    if len(pieces) == 1:
        only = pieces[0][1]
        return only if only.is_floating_point() else only.long()
    dtypes = {piece.dtype for _, piece in pieces}
    stacked = torch.empty(one.shape, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
    for part, piece in pieces:
        stacked[part.rows] = piece
    return stacked


def read_plain(source: Checkpoint, entry: Entry, config) -> Tensor:
    """Read one tensor of the model in high precision, or its table of expert ids.

    Raises:
        CheckpointError: NaN, Inf, or an expert that the config does not have.
    """
    tensor = source.read(entry)
    if not tensor.is_floating_point():
        experts = config.n_routed_experts
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
            raise entry.error(f"holds an expert id outside 0 to {experts - 1}")
        return tensor
    if not torch.isfinite(tensor).all():
        raise entry.error("holds NaN or Inf")
    return tensor


def _read_nvfp4(source: Checkpoint, one: Match, config) -> dict[str, Tensor]:
    base = one.name.removesuffix("weight")
    *lead, k = one.shape
    codes = torch.empty(*lead, k // 2, dtype=torch.uint8)
    scales = torch.empty(*lead, k // 16, dtype=torch.uint8)
    for stored in one.stored:
        codes[stored.part.rows] = source.read(stored.entries["codes"])
        scales[stored.part.rows] = _block_scales(source, stored.entries["scales"])
    state = {base + "weight": codes, base + "weight_scale": scales}
    state[base + "weight_scale_2"] = _stack([_global(source, s, "global") for s in one.stored], one)
    if "input" in one.stored[0].entries:
        state[base + "input_scale"] = _input_scales(source, one, config)
    return state


def _block_scales(source: Checkpoint, entry: Entry) -> Tensor:
    scales = source.read(entry).view(torch.uint8)
    if (scales & 0x7F == 0x7F).any():
        raise entry.error("holds a NaN scale")
    if (scales & 0x80).any():
        raise entry.error("holds a negative scale")
    return scales


def _global(source: Checkpoint, stored: Stored, role: str) -> Tensor:
    """A global scale in decode direction, () or for wo_a's inputs (G,)."""
    entry = stored.entries[role]
    scale = source.read(entry)
    scale = scale.reshape(()) if scale.numel() == 1 else scale
    scale = 1.0 / scale if stored.reciprocal else scale
    usable = torch.isfinite(scale) & ((scale == 0) | (scale >= GLOBAL_MIN) & (scale <= GLOBAL_MAX))
    if not usable.all():
        raise entry.error(f"holds {scale.flatten()[~usable.flatten()][0]:g}, which is no global scale")
    if role == "input" and (scale == 0).any():
        raise entry.error("is zero, which would turn every activation to zero")
    return scale


def _stack(scales: list[Tensor], one: Match) -> Tensor:
    """Global scales of the parts in the shape of the stacked weight: (), (2,), (E,) or (E, 2)."""
    places = torch.tensor([stored.part.scale for stored in one.stored], dtype=torch.long)
    if places.shape[1] == 0:
        return scales[0]
    stacked = torch.empty(*(places.amax(0) + 1).tolist(), dtype=torch.float32)
    for place, scale in zip(places.tolist(), scales, strict=True):
        stacked[tuple(place)] = scale
    return stacked


def _input_scales(source: Checkpoint, one: Match, config) -> Tensor:
    """One scale for what a linear reads: gate and up share it, and the larger saturates neither."""
    scales = [_global(source, stored, "input") for stored in one.stored]
    if len(scales) == 1:
        if scales[0].dim() and len(scales[0]) != config.o_groups:
            entry = one.stored[0].entries["input"]
            raise entry.error(f"has {len(scales[0])} scales, but config.json has {config.o_groups} groups")
        return scales[0]
    stacked = _stack(scales, one)
    return stacked if one.name.endswith("w2.weight") else stacked.amax(-1)


def load_model(directory: str | Path, *, device=None, dtype: torch.dtype | None = None,
               progress: Progress | None = None):  # fmt: skip
    """Build the model a checkpoint holds.

    Args:
        directory: see `load`.
        device: to put it on.
        dtype: of the high-precision linears and the activations; None takes the embedding's on disk.
        progress: called before each tensor.

    Returns:
        A `DeepseekV4` in evaluation mode; linears that are NVFP4 on disk are NVFP4 in it.

    Raises:
        CheckpointError: one line naming the file and the tensor.
    """
    from dsv4lab.model import DeepseekV4

    config, state = load(directory, progress=progress)
    with WithoutDraws():
        model = DeepseekV4(config, device=device, dtype=dtype or state["embed.weight"].dtype)
    model.load_state_dict(state)
    return model.eval()
