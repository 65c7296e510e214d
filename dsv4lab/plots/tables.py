"""Tables: what runs here, what quantization saves, and what other libraries do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsv4lab.device import BACKENDS, supports
from dsv4lab.formats import E4M3_MIN
from dsv4lab.layers import quantizable_layers
from dsv4lab.presets import PRESETS, Preset, quantize_preset
from dsv4lab.quantize import dequantize_nvfp4

from .quantization import sqnr_db
from .style import Table

_COLUMNS = (
    "preset",
    "g is",
    "block scale",
    "before rounding to a code",
    "least scale",
    "scale of zeros",
    "rounding",
    "bytes unlike ours (%)",
    "median SQNR (dB)",
)


def backends() -> Table:
    """Returns which backends this machine can run, and why not the others."""
    rows = [(name, "yes" if (status := supports(name)) else "no", status.reason) for name in BACKENDS]
    return Table(["backend", "runs here", "if not, why"], rows)


def weight_bytes(model: nn.Module, quantized: nn.Module) -> Table:
    """Returns the size of each kind of weight in a model and in its quantized copy, and of all the rest.

    Args:
        model, quantized: a `DeepseekV4` in high precision, and the same after `quantize_model_`.
    """
    before, after = _bytes_by_kind(model), _bytes_by_kind(quantized)
    rows = [(kind, size / 1e3, after[kind] / 1e3, 16 * after[kind] / size) for kind, size in before.items()]
    total, small = sum(before.values()), sum(after.values())
    rows.append(("all", total / 1e3, small / 1e3, 16 * small / total))
    return Table(["weights", "bf16 (kB)", "NVFP4 (kB)", "bits a weight"], rows)


def _bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of the quantizable weights, all layers of a kind together, and of everything else."""
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    kinds: dict[str, int] = {}
    for name, layer in quantizable_layers(model):
        kind = name.split(".", 2)[-1]
        size = sum(t.nbytes for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
        kinds[kind] = kinds.get(kind, 0) + size
    return {**kinds, "embedding, head, norms, router, compressors, mHC": total - sum(kinds.values())}


def conventions(x: Tensor) -> Table:
    """Returns what each preset does, how many bytes of x's codes differ from ours, and the median row's SQNR.

    Args:
        x: (T, K) finite, K % 16 == 0.
    """
    ours = quantize_preset(x, "dsv4lab").codes
    rows = []
    for p in PRESETS.values():
        q = quantize_preset(x, p)
        unlike = (q.codes != ours).float().mean().item() * 100
        level = sqnr_db(x, dequantize_nvfp4(q, torch.float32), dim=-1).median().item()
        rule = (p.name, p.global_scale, p.block_scale, p.element, _least(p), p.zero_block, p.rounding)
        rows.append((*rule, f"{unlike:.1f}", level))
    return Table(
        _COLUMNS,
        rows,
        "a: largest |x| of a block; g: global scale, decode direction; e = 1 / g; s: block scale.",
    )


def _least(preset: Preset) -> str:
    exponent = math.log2(max(preset.min_scale, preset.flush_below, E4M3_MIN))
    end = "lower become 0" if preset.flush_below else "lower are raised" if preset.min_scale else "rounded"
    return f"2^{exponent:.0f}, {end}"
