"""How other libraries quantize to NVFP4: each as frozen data, and one function that follows it bit for bit.

A formula is named by its own text, as `table` prints it: a is a block's largest magnitude, g the global scale
in decode direction, e = 1 / g the one in encode direction, s the block scale after its E4M3 cast. Every
operation is one fp32 rounding. Presets describe finite data; they exist to compare, the pipeline uses none.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dsv4lab import formats, reference
from dsv4lab.formats import BLOCK, E2M1_MAX, E4M3_MAX, FOUR_OVER_SIX_DIVISOR, GLOBAL_DIVISOR, NVFP4Tensor
from dsv4lab.policies import known_scale

_BLOCK_SCALE = {
    "a / (6 g)": lambda a, g, e, m: a / (g * m),
    "(a / 6) / g": lambda a, g, e, m: a / _like(m, a) / g,
    "e (a (1/6))": lambda a, g, e, m: e * (a * (1 / _like(m, a))),
    "a (e (1/6))": lambda a, g, e, m: a * (e * (1 / _like(m, a))),
}
_ELEMENT = {
    "x (1 / (s g))": lambda x, s, g, e: x * (1 / (s * g)),
    "x / (s g)": lambda x, s, g, e: x / (s * g),
    "(x / g) / s": lambda x, s, g, e: x / g / s,
    "x (1 / (s (1/e)))": lambda x, s, g, e: x * (1 / (s * (1 / e))).clamp_max(torch.finfo(torch.float32).max),
}


@dataclass(frozen=True)
class Preset:
    """One library's conventions.

    Fields:
        global_scale: "decode" (amax / divisor) or "encode" (divisor / amax).
        divisor: largest code times largest block scale that the global scale aims at.
        block_scale, element: formulas, see above.
        block_maxima: codes that a block's largest value may map to; of several the least squared error wins.
        min_scale: lower clamp of the block scale; scales below `flush_below` become 0 instead.
        zero_block: block scale of a block of zeros.
        zero_scale_code: what nonzero values become where the block scale is 0, "0" or "6".
        rounding: "nearest even", or "half steps" (to multiples of 1/2 first, then down at ties).
        negative_zero: -0 keeps its sign.
    """

    name: str
    library: str
    global_scale: str = "decode"
    divisor: float = GLOBAL_DIVISOR
    block_scale: str = "a / (6 g)"
    element: str = "x (1 / (s g))"
    block_maxima: tuple[float, ...] = (E2M1_MAX,)
    min_scale: float = 0.0
    flush_below: float = 0.0
    zero_block: float = 0.0
    zero_scale_code: str = "0"
    rounding: str = "nearest even"
    negative_zero: bool = True
    note: str = ""


_LOW, _TINY = formats.E4M3_MIN, formats.E4M3_MIN_NORMAL
PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("dsv4lab", "this package", note="max(amax, 1e-8), so that zeros have a scale too"),
        Preset(
            "original",
            "the pipeline this package follows",
            block_scale="(a / 6) / g",
            element="x / (s g)",
            flush_below=_LOW,
            rounding="half steps",
            note="kept for comparison: rounds twice and drops scales that E4M3 can hold",
        ),
        Preset(
            "modelopt",
            "NVIDIA ModelOpt NVFP4QTensor",
            element="x / (s g)",
            min_scale=_LOW,
            zero_block=1.0,
            negative_zero=False,
            note="a tiny block keeps the smallest scale",
        ),
        Preset(
            "torchao",
            "torchao nvfp4_quantize",
            block_scale="(a / 6) / g",
            element="x / (s g)",
            min_scale=_TINY,
            zero_block=_TINY,
            note="no subnormal block scales: blocks below global amax / 28672 lose resolution",
        ),
        Preset(
            "flashinfer",
            "FlashInfer, TensorRT-LLM, vLLM",
            global_scale="encode",
            block_scale="e (a (1/6))",
            element="x (1 / (s (1/e)))",
            note="its approximate reciprocals are taken as correctly rounded here",
        ),
        Preset(
            "flashinfer_exact",
            "FlashInfer without fast math",
            global_scale="encode",
            block_scale="a (e (1/6))",
            element="x (1 / (s (1/e)))",
            note="the order of Transformer Engine",
        ),
        Preset(
            "transformer_engine",
            "Transformer Engine NVFP4",
            global_scale="encode",
            block_scale="a (e (1/6))",
            element="x (1 / (s (1/e)))",
            zero_scale_code="6",
            note="codes of a block whose scale is 0 saturate; they still decode to 0",
        ),
        Preset(
            "four_over_six",
            "four over six",
            divisor=FOUR_OVER_SIX_DIVISOR,
            block_maxima=(6.0, 4.0),
            note="a block may end at 4 instead of 6, whichever is nearer; 256 leaves room for that scale",
        ),
    )
}


def table() -> list[dict]:
    """The conventions side by side, one dict of plain values a preset, for printing."""
    return [asdict(p) for p in PRESETS.values()]


def quantize_preset(x: Tensor, preset: str | Preset, global_scale: float | None = None) -> NVFP4Tensor:
    """Quantize as a library would, with one global scale for the tensor.

    Args:
        x: (..., K) bf16, fp16 or fp32, finite, K % 16 == 0.
        preset: a Preset or the name of one in PRESETS.
        global_scale: decode direction; None takes the preset's own from the data.

    Returns:
        NVFP4Tensor, linear scales, global_scale in decode direction whatever the library's.

    Raises:
        ValueError: unknown preset, NaN or Inf in x, K not a multiple of 16, or a global scale out of range.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"x must be (..., K) with K % 16 == 0, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x holds NaN or Inf, which the presets do not describe")
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    a = blocks.abs().amax(-1)
    g, e = _global_scales(a, preset, global_scale)
    codes, scales = _choose(blocks, [_encode(blocks, a, g, e, preset, m) for m in preset.block_maxima], g)
    return NVFP4Tensor(reference.pack(codes.flatten(-2)), scales, g, granularity="tensor")


def from_reciprocal(encode: float | Tensor) -> float | Tensor:
    """Our global scale from one in encode direction (FlashInfer, vLLM, compressed-tensors): g = 1 / encode.

    Raises:
        ValueError: a float that is 0 or whose reciprocal is out of range; a tensor gets NaN there instead.
    """
    return _reciprocal(encode)


def to_reciprocal(decode: float | Tensor) -> float | Tensor:
    """A global scale for libraries that take the encode direction: 1 / decode."""
    return _reciprocal(decode)


def _reciprocal(scale: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor):
        return reference.checked_scale(scale.float().reciprocal())
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"a global scale must be positive and finite to have a reciprocal, got {scale!r}")
    return known_scale(1 / scale)


def _like(value: float, t: Tensor) -> Tensor:
    return t.new_full((), value)


def _global_scales(a: Tensor, preset: Preset, g: float | None) -> tuple[Tensor, Tensor]:
    """The global scale in both directions, each rounded as the library holds it."""
    if g is not None:
        g = _like(known_scale(g), a)
        return g, 1 / g
    amax = a.amax() if a.numel() else a.new_zeros(())
    divisor = _like(preset.divisor, a)
    if preset.global_scale == "encode":
        e = torch.where(amax == 0, 1.0, divisor / amax).clamp_max(torch.finfo(torch.float32).max)
        return 1 / e, e
    g = amax.clamp_min(formats.AMAX_FLOOR) / divisor
    return g, 1 / g


def _encode(blocks, a, g, e, preset: Preset, largest: float) -> tuple[Tensor, Tensor]:
    """Codes (fp32 numbers 0 to 15) and E4M3 scales when a block's largest value maps to `largest`."""
    s = _BLOCK_SCALE[preset.block_scale](a, g, e, largest).clamp(preset.min_scale, E4M3_MAX)
    s = torch.where(s < preset.flush_below, 0.0, s)
    scales = torch.where(a == 0, preset.zero_block, s).to(formats.SCALE_DTYPE)
    held = scales.float().unsqueeze(-1)
    y = _ELEMENT[preset.element](blocks, held, g, e)
    if preset.zero_scale_code == "0":
        y = torch.where(held == 0, blocks * 0, y)
    y = y.nan_to_num(0.0)
    if preset.rounding == "half steps":
        y = _half_steps(y)
    codes = reference.encode_e2m1(y)
    return (codes if preset.negative_zero else torch.where(blocks == 0, 0.0, codes)), scales


def _half_steps(y: Tensor) -> Tensor:
    """Round to multiples of 1/2, then to E2M1 with ties towards zero: 2.6 -> 2.5 -> 2."""
    halves = (y * 2).round() / 2
    # a tie is now a multiple of 1/2 exactly; anything nearer to zero settles it
    return torch.where(halves.abs() > 2, halves * (1 - 2**-10), halves)


def _choose(blocks: Tensor, candidates: list[tuple[Tensor, Tensor]], g: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate with the least squared error in each block; the first one at ties."""
    (codes, scales), *others = candidates
    for other_codes, other_scales in others:
        better = _error(blocks, other_codes, other_scales, g) < _error(blocks, codes, scales, g)
        codes = torch.where(better.unsqueeze(-1), other_codes, codes)
        scales = torch.where(better, other_scales.float(), scales.float()).to(formats.SCALE_DTYPE)
    return codes, scales


def _error(blocks: Tensor, codes: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    decoded = reference.decode(reference.pack(codes.flatten(-2)), scales) * g
    return (decoded.unflatten(-1, (-1, BLOCK)) - blocks).square().sum(-1)
