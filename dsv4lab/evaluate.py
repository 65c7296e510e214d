"""How well a model predicts held-out text, and what NVFP4 changes: bits per byte, SQNR, agreement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4lab import corpus
from dsv4lab.calibration import calibrate
from dsv4lab.corpus import EvaluationText, LibraryFile
from dsv4lab.layers import quantize_model_, set_activation_scale_

CONTEXT = 2048
CALIBRATION_FILES, CALIBRATION_BYTES = 8, 1024


@dataclass(frozen=True)
class Variant:
    """A way to run a model.

    Args:
        precision: "bf16" or "nvfp4".
        activation_scale: the policy of NVFP4 activations, None for bf16.
        too_small_by: divides the calibrated input scales, to show what that does; static only.
    """

    precision: str
    activation_scale: str | None = None
    too_small_by: float = 1.0

    def __str__(self) -> str:
        smaller = f" / {self.too_small_by:g}" if self.too_small_by != 1 else ""
        return f"{self.precision} {self.activation_scale or ''}{smaller}".strip()


VARIANTS = (
    Variant("bf16"),
    *(Variant("nvfp4", policy) for policy in ("tensor", "token", "static", "bound")),
    Variant("nvfp4", "static", 4.0),
    Variant("nvfp4", "static", 16.0),
)


@dataclass
class Score:
    """What one variant has done so far.

    Args:
        variant: which.
        bits: information of the judged bytes under the model.
        bytes: how many were judged.
        agreed: for how many of them the most likely byte is the one of bf16.
        signal, noise: energy of bf16's residual streams after each layer and of its logits, and of the
            difference.
    """

    variant: Variant
    bits: float = 0.0
    bytes: int = 0
    agreed: int = 0
    signal: Tensor | float = 0.0
    noise: Tensor | float = 0.0

    def add(self, run: Run, reference: Run | None, first: int, targets: Tensor) -> None:
        """Count a window: its logits from `first` on, judged on `targets`, compared with bf16's."""
        logits = run.logits[first:]
        self.bits += F.cross_entropy(logits.double(), targets, reduction="sum").item() / math.log(2)
        self.bytes += len(targets)
        if reference is None:
            return
        self.agreed += int((logits.argmax(-1) == reference.logits[first:].argmax(-1)).sum())
        pairs = zip([*reference.streams, reference.logits], [*run.streams, run.logits], strict=True)
        energies = [(a.double().square().sum(), (a.double() - b.double()).square().sum()) for a, b in pairs]
        self.signal += torch.stack([s for s, _ in energies])
        self.noise += torch.stack([n for _, n in energies])

    def report(self, xz_bits: float, bf16_bits: float | None) -> dict:
        """The score as plain data: see `evaluate`."""
        bits = self.bits / self.bytes
        compared = isinstance(self.noise, Tensor) and self.variant.precision != "bf16"
        ratio = (self.signal / self.noise).log10().mul(10).tolist() if compared else []
        return {
            "name": str(self.variant),
            "precision": self.variant.precision,
            "activation_scale": self.variant.activation_scale,
            "input_scale_too_small_by": self.variant.too_small_by,
            "bits_per_byte": bits,
            "ratio_to_xz": bits / xz_bits,
            "over_bf16": bits / bf16_bits - 1 if bf16_bits else None,
            "token_agreement": self.agreed / self.bytes if compared else None,
            "sqnr_db_per_layer": ratio[:-1] or None,
            "sqnr_db_logits": ratio[-1] if ratio else None,
        }


@dataclass(frozen=True)
class Run:
    """What a model gave for a window: logits (T, V) float32 and the streams after each block."""

    logits: Tensor
    streams: list[Tensor]


def evaluate(
    model: nn.Module,
    text: EvaluationText,
    variants: Sequence[Variant] = VARIANTS,
    *,
    max_bytes: int | None = None,
    context: int = CONTEXT,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Judge a byte-level model on held-out text, run in several ways.

    Windows go through the model one at a time: under the tensor policy a token depends on what else is in its
    batch, and padding would count.

    Args:
        model: a `DeepseekV4` in bf16, or NVFP4 already, in which case nothing is compared with bf16.
        text: `corpus.evaluation_text()`.
        variants: how to run it.
        max_bytes: judges only the first bytes of the text, files in sorted order; None all.
        context: most tokens read at once, bounded by the model's.
        progress: called before each variant of each window.

    Returns:
        "text" (which Python, files and bytes judged, bytes in all, bits per byte of `xz -9` for all of them,
        as it does worse on a part; context) and "variants", a list with for each its name, bits_per_byte,
        ratio_to_xz, over_bf16 (0.02: 2 % more), token_agreement with bf16, sqnr_db_per_layer (of the residual
        streams after each block) and sqnr_db_logits.

    Raises:
        ValueError: max_bytes below 1, a model that does not read bytes, bf16 asked of NVFP4 weights.
        FloatingPointError: logits that hold NaN or Inf.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be 1 or more, got {max_bytes}")
    if model.config.vocab_size != 256:
        raise ValueError(f"model must read bytes, a vocabulary of 256, got one of {model.config.vocab_size}")
    files = first_bytes(text.files, max_bytes)
    context = min(context, model.config.max_position_embeddings)
    scores = _scores(model, list(corpus.windows(files, context)), variants, progress)
    size = sum(len(f.data) for f in files)
    bf16 = next((s.bits / s.bytes for s in scores if s.variant.precision == "bf16"), None)
    xz_bits = text.xz_bits_per_byte
    about = {
        "python": text.python,
        "files": len(files),
        "bytes": size,
        "all_bytes": text.bytes,
        "skipped_files": len(text.skipped),
        "xz_bits_per_byte": xz_bits,
        "context": context,
    }
    return {"text": about, "variants": [score.report(xz_bits, bf16) for score in scores]}


def _scores(model, windows: list, variants: Sequence[Variant], progress) -> list[Score]:
    quantized = is_quantized(model)
    reference = None if quantized else model
    if quantized and any(v.precision == "bf16" for v in variants):
        raise ValueError("model has NVFP4 weights: there is no bf16 to compare with")
    tested = model if quantized else copy.deepcopy(model)
    if any(v.precision == "nvfp4" for v in variants):
        prepare(tested, static=any(v.activation_scale == "static" for v in variants))
    scores = [Score(variant) for variant in variants]
    device = model.embed.weight.device
    steps = len(windows) * len(scores)
    for i, window in enumerate(windows):
        ids = torch.tensor(list(window.ids), device=device)
        base = reference and run(reference, ids[:-1])
        for j, score in enumerate(scores):
            if progress:
                progress(i * len(scores) + j, steps, str(score.variant))
            bf16 = score.variant.precision == "bf16"
            got = base if bf16 else _run_variant(tested, score.variant, ids[:-1])
            score.add(got, base, window.first - 1, ids[window.first :])
    return scores


def _run_variant(model, variant: Variant, ids: Tensor) -> Run:
    set_activation_scale_(model, variant.activation_scale)
    if variant.too_small_by == 1:
        return run(model, ids)
    scales = [m.input_scale for m in model.modules() if isinstance(getattr(m, "input_scale", None), Tensor)]
    original = [scale.clone() for scale in scales]
    for scale in scales:
        scale.div_(variant.too_small_by)
    try:
        return run(model, ids)
    finally:
        for scale, before in zip(scales, original, strict=True):
            scale.copy_(before)


def run(model, ids: Tensor) -> Run:
    """Run a model on ids (T,) and keep what `Run` holds.

    Raises:
        FloatingPointError: logits that hold NaN or Inf.
    """
    streams: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: streams.append(out[0])) for layer in model.layers
    ]
    try:
        with torch.no_grad():
            logits = model(ids[None])[0]
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits hold NaN or Inf")
    return Run(logits, streams)


def first_bytes(files: Iterable[LibraryFile], count: int | None) -> list[LibraryFile]:
    """The first `count` bytes of some files, the last of them cut; all for None."""
    taken = []
    for file in files:
        if count is not None and count <= 0:
            break
        taken.append(file if count is None else LibraryFile(file.path, file.data[:count]))
        count = None if count is None else count - len(file.data)
    return taken


def is_quantized(model: nn.Module) -> bool:
    """Whether any linear of a model is NVFP4."""
    return any(getattr(module, "quantized", False) is True for module in model.modules())


def set_precision(model: nn.Module, precision: str, activation_scale: str = "token") -> None:
    """Make a model run as a variant does, in place.

    Args:
        model: a `DeepseekV4`.
        precision: "bf16" or "nvfp4".
        activation_scale: "tensor", "token", "static" or "bound", for NVFP4.

    Raises:
        ValueError: bf16 asked of NVFP4 weights.
    """
    if precision == "bf16":
        if is_quantized(model):
            raise ValueError("model has NVFP4 weights and cannot run in bf16")
        return
    prepare(model, static=activation_scale == "static")
    set_activation_scale_(model, activation_scale)


def prepare(model: nn.Module, static: bool) -> None:
    """Quantize a model's linears, for static scales with a calibration on `calibration_batches`."""
    if not is_quantized(model):
        scales = calibrate(model, calibration_batches(model)) if static else None
        quantize_model_(model, calibration=scales)


def calibration_batches(model: nn.Module, text: bytes | None = None) -> list[Tensor]:
    """Token ids (1, T) to calibrate a byte-level model on.

    Args:
        model: for its device and its number of positions.
        text: what to use; None takes the beginnings of files of the running Python's library that nano was
            trained on, spread over it.
    """
    device = model.embed.weight.device
    size = min(CALIBRATION_BYTES, model.config.max_position_embeddings - 1)
    if text is None:
        files = [f for f in corpus.training_files(corpus.library_files()) if not f.is_test]
        pieces = [f.data[:size] for f in files[:: max(1, len(files) // CALIBRATION_FILES)]][
            :CALIBRATION_FILES
        ]
    else:
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
    if not any(pieces):
        raise ValueError("text to calibrate on is empty")
    return [torch.tensor([[corpus.BEGIN, *piece]], device=device) for piece in pieces]
