"""Which cases are meant by names of operations, shapes or a model, and a backend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from ..model import ModelConfig
from .cases import KINDS, Case

PRESETS = {"nano": ModelConfig.nano, "flash": ModelConfig.flash, "pro": ModelConfig.pro}
TOKENS = (1, 128)
"""T of the presets: a step of decoding, and a whole tile."""


def select(
    names: Sequence[str] | None, shapes: Sequence[str], backend: str | None, device: torch.device | str
) -> list[Case]:
    """The cases to measure.

    Args:
        names: of KINDS; None takes all that fit the shapes and that the backend has.
        shapes: "nano", "flash" or "pro" for the model's own K and N, also "flash:16" for T = 16; or numbers
            such as 16x4096x2048, for the operations that take as many.
        backend, device: where they shall run; a backend of None stands for the device's default.

    Returns:
        Cases by operation, each once.

    Raises:
        ValueError: an operation, shape or backend that does not exist, or that does not fit the others.
    """
    if unknown := [name for name in names or () if name not in KINDS]:
        raise ValueError(f"op {unknown[0]!r} is unknown; known are {', '.join(KINDS)}")
    given = set().union(*(_of_shape(shape, names or KINDS) for shape in shapes))
    for name in names or ():
        if name not in {case.kind for case in given}:
            raise ValueError(f"op {name} needs a shape {'x'.join(KINDS[name].dims)}, got {', '.join(shapes)}")
    cases = sorted(given, key=lambda case: (list(KINDS).index(case.kind), case.shape))
    can = [case for case in cases if _refusal(case, backend, device) is None]
    if names is None and can:
        return can
    for refusal in filter(None, (_refusal(case, backend, device) for case in cases)):
        raise refusal
    return cases


def _refusal(case: Case, backend: str | None, device: torch.device | str) -> ValueError | None:
    try:
        case.backend(backend, device)
    except ValueError as error:
        return error
    return None


def _of_shape(shape: str, names: Iterable[str]) -> list[Case]:
    """The cases of those names that a shape is for."""
    preset = re.fullmatch(r"(\w+?)(?::([1-9]\d{0,8}))?", shape)
    if preset and preset[1] in PRESETS:
        tokens = TOKENS if preset[2] is None else (int(preset[2]),)
        return [case for t in tokens for case in preset_cases(PRESETS[preset[1]](), t, names)]
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", shape):
        raise ValueError(
            f"shape {shape!r} must be one of {', '.join(PRESETS)}, also with a number of tokens (flash:16), "
            "or numbers such as 16x4096x2048"
        )
    numbers = tuple(map(int, shape.split("x")))
    fitting = [name for name in names if len(KINDS[name].dims) == len(numbers)]
    if not fitting:
        forms = dict.fromkeys("x".join(KINDS[name].dims) for name in names)
        raise ValueError(f"shape {shape} fits no op asked for: they need {' or '.join(forms)}")
    return [Case(name, numbers) for name in fitting]


def preset_cases(config: ModelConfig, tokens: int, names: Iterable[str] = tuple(KINDS)) -> list[Case]:
    """The operations of one layer of a model for T tokens, each K x N once.

    Args:
        config: of the model.
        tokens: T.
        names: of KINDS.
    """
    c, t = config, tokens
    hidden, width = c.hidden_size, c.moe_intermediate_size
    heads, low_rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    linears = dict.fromkeys((
        (hidden, c.q_lora_rank), (c.q_lora_rank, heads), (hidden, c.head_dim), (low_rank, hidden),
        (hidden, 2 * width), (width, hidden),
    ))  # fmt: skip
    experts = (c.n_routed_experts, c.num_experts_per_tok)
    wo_a = (t, heads // c.o_groups, c.o_lora_rank, c.o_groups, c.o_groups)
    shapes = {
        "swiglu_quantize": [(t, width)],
        "linear": [(t, *linear) for linear in linears],
        "grouped_mm": [wo_a, (t, width, hidden, *experts)],
        "grouped_mm_swiglu": [(t, hidden, 2 * width, *experts)],
    }
    return [
        Case(name, shape)
        for name in names
        for shape in shapes.get(name.removesuffix("_w4a16"), [(t, hidden)])
    ]
