"""What the inputs of a model's linears look like: running amax for static scales, and errors per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .formats import AMAX_FLOOR, BLOCK, E2M1_MAX, E4M3_MAX, GLOBAL_DIVISOR, NVFP4Tensor
from .layers import QuantizedInput, quantizable_layers
from .quantize import dequantize_nvfp4, quantize_nvfp4


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable,
    run: Callable[[nn.Module, object], object] | None = None,
    divisor: float = GLOBAL_DIVISOR,
) -> dict[str, Tensor]:
    """Run the model over batches and turn the largest inputs of its linears into static scales.

    Args:
        model: in high precision, or quantized under any policy; its layers' scales are not changed.
        batches: what the model is called with, one after the other.
        run: run(model, batch), by default model(batch).
        divisor: of the amax, 2688 = 6 * 448.

    Returns:
        input_scale by layer name, decode direction, for `quantize_model_` or `set_input_scales_`: float32 (),
        or (G,) for grouped linears; the input of a second product is taken after SwiGLU. Layers that
        no batch reached are missing.

    Raises:
        ValueError: there are no batches, or an input holds NaN or Inf.
    """
    amax: dict[str, Tensor] = {}

    def record(name: str, layer: QuantizedInput, x: Tensor, quantized) -> None:
        seen = layer.amax(x)
        amax[name] = seen if name not in amax else torch.maximum(amax[name], seen)

    count = 0
    with _observed(model, record):
        for count, batch in enumerate(batches, 1):  # noqa: B007
            model(batch) if run is None else run(model, batch)
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none")
    for name, seen in amax.items():
        if not seen.isfinite().all():
            raise ValueError(f"the input of {name} holds NaN or Inf: nothing to calibrate on")
    return {n: a.clamp_min(AMAX_FLOOR) / torch.full_like(a, divisor) for n, a in amax.items()}


def set_input_scales_(model: nn.Module, scales: dict[str, Tensor]) -> None:
    """Set the static scale of each layer named, in place.

    Raises:
        ValueError: a name is no quantizable layer of the model.
    """
    layers = dict(quantizable_layers(model))
    for name, scale in scales.items():
        if name not in layers:
            raise ValueError(f"scales names {name!r}, which is no quantizable layer of the model")
        layers[name].set_input_scale(scale)


@dataclass
class InputStatistics:
    """Running figures of one layer's input.

    Attributes:
        amax: the largest magnitude.
        blocks, clipped: blocks of 16 seen, and those whose amax exceeds what their global scale can hold.
        signal, noise: sums of x^2 and of (x - quantized x)^2.
    """

    amax: float = 0.0
    blocks: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @property
    def clip_rate(self) -> float:
        """Share of blocks that saturated."""
        return self.clipped / self.blocks if self.blocks else 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; inf without noise."""
        if self.noise == 0:
            return float("inf")
        return 10 * torch.tensor(self.signal / self.noise, dtype=torch.float64).log10().item()

    def add(self, x: Tensor, quantized: NVFP4Tensor) -> None:
        """Take in one input (..., K) and what became of it; reads from the device."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        g = _row_scale(quantized, x)
        block_amax = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
        self.amax = max(self.amax, block_amax.max().item())
        self.blocks += block_amax.numel()
        # One part in 2^20 aside: the runtime scale amax / 2688 may itself be rounded down.
        self.clipped += int((block_amax > g * (E2M1_MAX * E4M3_MAX * (1 + 2**-20))).sum())
        error = x.double() - dequantize_nvfp4(quantized, torch.float32).double()
        self.signal += x.double().square().sum().item()
        self.noise += error.square().sum().item()


@contextmanager
def inspect(model: nn.Module) -> Iterator[dict[str, InputStatistics]]:
    """Collect figures on the inputs of all quantizable layers while the context is open.

    In a model in high precision, the figures say what each layer's policy would do to its input.

    Yields:
        {name: InputStatistics}, filled as the model runs.
    """
    figures: dict[str, InputStatistics] = {}

    def record(name: str, layer: QuantizedInput, x: Tensor, quantized: NVFP4Tensor | None) -> None:
        if quantized is None:
            quantized = quantize_nvfp4(x, layer.global_scale_of())
        figures.setdefault(name, InputStatistics()).add(x, quantized)

    with _observed(model, record):
        yield figures


@contextmanager
def _observed(model: nn.Module, record) -> Iterator[None]:
    """Have record(name, layer, x, quantized) called for each input, and put back what was there before."""
    layers = list(quantizable_layers(model))
    before = [layer.observer for _, layer in layers]
    for name, layer in layers:
        layer.observer = lambda *seen, name=name: record(name, *seen)
    try:
        yield
    finally:
        for (_, layer), observer in zip(layers, before, strict=True):
            layer.observer = observer


def _row_scale(quantized: NVFP4Tensor, x: Tensor) -> Tensor:
    """The global scale in a shape that broadcasts against blocks (..., K/16)."""
    g = quantized.global_scale
    if quantized.granularity == "token":
        return g.reshape(*x.shape[:-1], 1)
    return g.reshape(-1, *[1] * (x.dim() - 1)) if quantized.granularity == "group" else g
