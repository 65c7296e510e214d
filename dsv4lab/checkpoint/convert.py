"""From a bf16 checkpoint to an NVFP4 one in ModelOpt's form, holding one tensor at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dsv4lab.formats import BLOCK
from dsv4lab.quantize import quantize_weight

from .files import INDEX, Checkpoint, CheckpointError, Entry, read_json
from .load import Progress, load_config, read_plain
from .match import Stored, match
from .names import is_quantizable, to_deepseek
from .save import DTYPE_BYTES, Spec, write_safetensors

QUANTIZATION = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "group_size": BLOCK,
    "ignore": ["embed*", "head", "*norm*", "*.gate", "*.compressor*", "*.indexer*", "*hc_*", "mtp.*"],
}


def quantize_checkpoint(source: str | Path, destination: str | Path, *,
                        input_scales: dict[str, Tensor] | None = None,
                        progress: Progress | None = None) -> dict[str, int]:  # fmt: skip
    """Write an NVFP4 copy of a checkpoint: the linears of attention, shared and routed experts.

    Files, names and all other tensors stay as they are; a weight gains `weight_scale`, `weight_scale_2` and,
    from a calibration, `input_scale`. The copy is written beside its destination and renamed when complete.

    Args:
        source: a folder in high precision.
        destination: the folder to make; its parent must be there.
        input_scales: name of a linear in the module tree -> float32 (), (E,) for experts, (G,) for wo_a.
        progress: called before each tensor.

    Returns:
        "tensors", "quantized" (how many of them) and "bytes_in", "bytes_out".

    Raises:
        CheckpointError: the source cannot be loaded or is NVFP4 already, the destination exists, cannot be
            written or is being written by another process.
    """
    source, destination = Path(source), Path(destination)
    config = load_config(source)
    opened = Checkpoint(source)
    matches = match(config, opened)
    stored = {s.entries["plain"].name: (m.name, s) for m in matches for s in m.stored if not s.quantized}
    for one in matches:
        if one.quantized:
            raise one.stored[0].entries["codes"].error("is NVFP4 already")
    plan = _Plan(config, opened, stored, input_scales or {})
    try:
        with _renamed_when_complete(destination) as folder:
            plan.write(folder, progress)
            settings = {**read_json(source / "config.json"), "quantization_config": QUANTIZATION}
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{error.filename or destination}: {error.strerror}") from None
    return plan.summary()


class _Plan:
    """What becomes of each stored tensor: specs known beforehand, values made while writing."""

    def __init__(self, config, source: Checkpoint, stored: dict[str, tuple[str, Stored]], input_scales: dict):
        self.config, self.source, self.stored, self.input_scales = config, source, stored, input_scales
        self.specs = {name: self._specs(entry) for name, entry in source.entries.items()}

    def write(self, folder: Path, progress: Progress | None) -> None:
        files: dict[str, list[Entry]] = {}
        for entry in self.source.entries.values():
            files.setdefault(entry.file.name, []).append(entry)
        done = 0
        for name, entries in files.items():
            specs = [spec for entry in entries for spec in self.specs[entry.name]]
            tensors = (t for i, e in enumerate(entries, done) for t in self._make(e, i, progress))
            write_safetensors(folder / name, specs, tensors)
            done += len(entries)
        if (self.source.directory / INDEX).exists():
            self._write_index(folder / INDEX)

    def _write_index(self, file: Path) -> None:
        where = {s.name: e.file.name for e in self.source.entries.values() for s in self.specs[e.name]}
        total = sum(s.bytes for specs in self.specs.values() for s in specs)
        file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")

    def _quantized(self, entry: Entry) -> bool:
        return is_quantizable(to_deepseek(entry.name))

    def _specs(self, entry: Entry) -> list[Spec]:
        if entry.dtype not in DTYPE_BYTES:
            raise entry.error(
                f"is {entry.dtype}, which cannot be copied; take one of {', '.join(DTYPE_BYTES)}"
            )
        plain = Spec(entry.name, entry.dtype, entry.shape)
        if not self._quantized(entry):
            return [plain]
        rows, k = entry.shape
        if k % BLOCK:
            raise entry.error(f"has {k} columns, which do not divide into blocks of {BLOCK}")
        base = entry.name.removesuffix("weight")
        specs = [
            Spec(entry.name, "U8", (rows, k // 2)),
            Spec(f"{base}weight_scale", "F8_E4M3", (rows, k // BLOCK)),
            Spec(f"{base}weight_scale_2", "F32", ()),
        ]
        scale = self._input_scale(entry)
        return specs if scale is None else [*specs, Spec(f"{base}input_scale", "F32", tuple(scale.shape))]

    def _input_scale(self, entry: Entry) -> Tensor | None:
        name, stored = self.stored[entry.name]
        scale = self.input_scales.get(name.removesuffix(".weight"))
        return scale[stored.part.expert] if scale is not None and scale.dim() else scale

    def _make(self, entry: Entry, i: int, progress: Progress | None) -> Iterator[Tensor]:
        if progress:
            progress(i, len(self.source.entries), entry.name)
        if entry.name not in self.stored:  # of a draft layer, which no model here reads
            yield self.source.read(entry)
            return
        tensor = read_plain(self.source, entry, self.config)
        if not self._quantized(entry):
            yield tensor
            return
        packed = quantize_weight(tensor)
        if not torch.isfinite(packed.global_scale):
            raise entry.error(f"holds {float(tensor.abs().max()):g}, too large for an NVFP4 global scale")
        yield from (packed.codes, packed.block_scales, packed.global_scale)
        if (scale := self._input_scale(entry)) is not None:
            yield scale

    def summary(self) -> dict[str, int]:
        entries = self.source.entries.values()
        read = sum(Spec(e.name, e.dtype, e.shape).bytes for e in entries)
        written = sum(s.bytes for specs in self.specs.values() for s in specs)
        quantized = sum(map(self._quantized, entries))
        return {"tensors": len(entries), "quantized": quantized, "bytes_in": read, "bytes_out": written}


@contextmanager
def _renamed_when_complete(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its name at the end, and vanishes when anything goes wrong.

    A killed run leaves the folder behind; the next one takes it over. The lock tells the two cases apart: it
    ends with the process that holds it.
    """
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: exists already")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: no such folder")
    folder = destination.with_name(f".{destination.name}.partial")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{destination}: being written by another process") from None
        try:
            for leftover in folder.iterdir():
                leftover.unlink()
            yield folder
            if os.path.lexists(destination):
                raise CheckpointError(f"{destination}: exists already")
            folder.rename(destination)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)
