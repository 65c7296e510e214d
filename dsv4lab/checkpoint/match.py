"""A checkpoint held against the model its config describes, from the files' headers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from dsv4lab.formats import BLOCK

from .files import Checkpoint, CheckpointError, Entry
from .names import Part, is_ignored, is_quantizable, parts, to_deepseek

FLOATS = ("BF16", "F32")
# Role -> suffix of the tensor's name: ModelOpt's, and compressed-tensors' with reciprocal globals.
DECODE = {"codes": "weight", "scales": "weight_scale", "global": "weight_scale_2", "input": "input_scale"}
RECIPROCAL = {
    "codes": "weight_packed",
    "scales": "weight_scale",
    "global": "weight_global_scale",
    "input": "input_global_scale",
}
_DTYPES = {"codes": ("U8",), "scales": ("F8_E4M3",), "global": ("F32",), "input": ("F32",)}


@dataclass(frozen=True)
class Stored:
    """How one part of a weight lies on disk.

    Args:
        part: its name, shape and place.
        entries: role -> entry; "plain" in high precision, else "codes", "scales", "global", perhaps "input".
        reciprocal: whether the global scales are encode-direction.
    """

    part: Part
    entries: dict[str, Entry]
    reciprocal: bool = False

    @property
    def quantized(self) -> bool:
        return "codes" in self.entries


@dataclass(frozen=True)
class Match:
    """One tensor of the module tree, and the stored tensors it is made of."""

    name: str
    shape: tuple[int, ...]
    stored: list[Stored]

    @property
    def quantized(self) -> bool:
        return self.stored[0].quantized


def match(config, source: Checkpoint) -> list[Match]:
    """Find every tensor of the model on disk, and a use for every tensor on disk.

    Args:
        config: the `ModelConfig`.
        source: the opened folder.

    Returns:
        One `Match` for each tensor of the model's state_dict.

    Raises:
        CheckpointError: a missing or unknown tensor, a wrong dtype or shape, a weight that is NVFP4 in part.
    """
    try:
        shapes = model_shapes(config)
    except (RuntimeError, TypeError, ValueError) as error:  # sizes good one by one, their product is not
        what = str(error).splitlines()[0]
        raise CheckpointError(
            f"{source.directory / 'config.json'}: no such model can be built: {what}"
        ) from None
    table = _Table(source)
    found = [
        Match(name, shape, [table.find(part, is_quantizable(name)) for part in parts(name, shape)])
        for name, shape in shapes.items()
    ]
    table.check_all_used()
    for one in found:
        _check_uniform(one)
    return found


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in high precision, without allocating it."""
    from dsv4lab.model import DeepseekV4

    with WithoutDraws():
        return {name: tuple(t.shape) for name, t in DeepseekV4(config, device="meta").state_dict().items()}


_DRAWS = (torch.nn.init.normal_, torch.nn.init.uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)


class WithoutDraws(TorchFunctionMode):
    """Leaves out the drawing of random weights that will be overwritten, or have no storage to begin with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DRAWS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


class _Table:
    """Stored tensors by DeepSeek's names, remembering which were asked for."""

    def __init__(self, source: Checkpoint):
        self.source = source
        self.unused = {}
        for name, entry in source.entries.items():
            if is_ignored(name):
                continue
            if (key := to_deepseek(name)) in self.unused:
                raise entry.error(f"means the same as {self.unused[key].name}")
            self.unused[key] = entry

    def find(self, part: Part, quantizable: bool) -> Stored:
        base = part.name.removesuffix("weight")
        for roles in (DECODE, RECIPROCAL) if part.name.endswith(".weight") else ():
            codes = self.unused.get(base + roles["codes"])
            if codes and (codes.dtype == "U8" or base + roles["global"] in self.unused):
                return self._find_nvfp4(part, base, roles, quantizable)
        entry = self._take(part.name)
        _check_plain(entry, part)
        return Stored(part, {"plain": entry})

    def _find_nvfp4(self, part: Part, base: str, roles: dict[str, str], quantizable: bool) -> Stored:
        names = {role: base + suffix for role, suffix in roles.items()}
        if names["input"] not in self.unused:
            del names["input"]
        entries = {role: self._take(name) for role, name in names.items()}
        if not quantizable:
            raise entries["codes"].error("is NVFP4, but this part of the model is kept in high precision")
        _check_nvfp4(entries, part)
        return Stored(part, entries, roles is RECIPROCAL)

    def _take(self, name: str) -> Entry:
        if name not in self.unused:
            raise CheckpointError(f"{self.source.directory}: tensor {name} is missing")
        return self.unused.pop(name)

    def check_all_used(self) -> None:
        if self.unused:
            more = f", nor are {len(self.unused) - 1} others" if len(self.unused) > 1 else ""
            first = next(iter(self.unused.values()))
            raise first.error(f"is not one of the model that config.json describes{more}")


def _check_plain(entry: Entry, part: Part) -> None:
    wanted = ("I64", "I32") if part.name.endswith("tid2eid") else FLOATS
    if entry.dtype not in wanted:
        also = (
            " (FP8 and MXFP4 weights must be converted to BF16 first)"
            if entry.dtype[:2] in ("F8", "I8", "U8")
            else ""
        )
        raise entry.error(f"is {entry.dtype}, but must be {' or '.join(wanted)}{also}")
    _check_shape(entry, [part.shape])


def _check_nvfp4(entries: dict[str, Entry], part: Part) -> None:
    *lead, k = part.shape
    if k % BLOCK:
        raise entries["codes"].error(f"is NVFP4, but its {k} columns do not divide into blocks of {BLOCK}")
    scalars = [(), (1,)]
    shapes = {
        "codes": [(*lead, k // 2)],
        "scales": [(*lead, k // BLOCK)],
        "global": scalars,
        "input": scalars,
    }
    for role, entry in entries.items():
        if entry.dtype not in _DTYPES[role]:
            raise entry.error(f"is {entry.dtype}, but must be {' or '.join(_DTYPES[role])}")
        per_group = role == "input" and ".wo_a." in part.name and len(entry.shape) == 1
        if not per_group:
            _check_shape(entry, shapes[role])


def _check_shape(entry: Entry, allowed: list[tuple[int, ...]]) -> None:
    if entry.shape not in allowed:
        raise entry.error(f"has shape {entry.shape}, but config.json asks for {allowed[0]}")


def _check_uniform(one: Match) -> None:
    first = one.stored[0]
    for other in one.stored[1:]:
        if other.quantized != first.quantized:
            entry = next(iter(other.entries.values()))
            raise entry.error(f"and {first.part.name} must be both NVFP4 or both not")
        if ("input" in other.entries) != ("input" in first.entries):
            owner = first if "input" in first.entries else other
            raise owner.entries["input"].error("has no counterpart for the other experts or projections")
