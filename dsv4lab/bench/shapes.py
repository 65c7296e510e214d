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
ALL = "deepseek-v4"
LINEAR_TOKENS, EXPERT_TOKENS = (1, 8, 16, 64, 128, 4096), (1, 4, 16, 64, 256)
WO_A_TOKENS, ROW_TOKENS = (1, 8, 16, 64, 128), (1, 16, 8192)
LINEARS = (
    (7168, 6144), (3072, 7168), (7168, 16384), (16384, 7168), (4096, 4096), (4096, 8192), (8192, 1024)
)  # fmt: skip
"""K x N of Flash and Pro, and of which there are figures of other packages."""


def select(
    names: Sequence[str] | None, shapes: Sequence[str], backend: str | None, device: torch.device | str
) -> list[Case]:
    """The cases to measure.

    Args:
        names: of KINDS; None takes all that fit the shapes and that the backend has.
        shapes: "nano", "flash" or "pro" for the model's own K and N, also "flash:16" for T = 16;
            "deepseek-v4" for `all_cases`; or numbers such as 16x4096x2048, for operations that take as many.
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
    if shape == ALL:
        return [case for case in all_cases() if case.kind in names]
    preset = re.fullmatch(r"(\w+?)(?::([1-9]\d{0,8}))?", shape)
    if preset and preset[1] in PRESETS:
        tokens = TOKENS if preset[2] is None else (int(preset[2]),)
        return [case for t in tokens for case in preset_cases(PRESETS[preset[1]](), t, names)]
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", shape):
        raise ValueError(
            f"shape {shape!r} must be one of {', '.join(PRESETS)}, also with a number of tokens (flash:16), "
            f"{ALL}, or numbers such as 16x4096x2048"
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
        "grouped_mm_swiglu_quantize": [(t, hidden, 2 * width, *experts)],
    }
    return [
        Case(name, shape)
        for name in names
        for shape in shapes.get(name.removesuffix("_w4a16"), [(t, hidden)])
    ]


def all_cases() -> list[Case]:
    """What data/benchmarks.csv has: the shapes of Flash and Pro from one token to many."""
    cases = [
        Case(name, (t, 7168))
        for name, kind in KINDS.items()
        if len(kind.dims) == 2
        for t in ROW_TOKENS
    ]  # fmt: skip
    for suffix in ("", "_w4a16"):
        cases += [Case(f"linear{suffix}", (t, *linear)) for linear in LINEARS for t in LINEAR_TOKENS]
        groups = [(4096, 1024, groups, groups) for groups in (8, 16)]
        cases += [Case(f"grouped_mm{suffix}", (t, *wo_a)) for wo_a in groups for t in WO_A_TOKENS]
        for preset in ("flash", "pro"):
            c = PRESETS[preset]()
            hidden, width = c.hidden_size, c.moe_intermediate_size
            experts = (c.n_routed_experts, c.num_experts_per_tok)
            fused = f"grouped_mm_swiglu_quantize{suffix}"
            for t in EXPERT_TOKENS:
                cases.append(Case(f"grouped_mm{suffix}", (t, width, hidden, *experts)))
                cases.append(Case(fused, (t, hidden, 2 * width, *experts)))
            # As one group: the shared expert.
            cases += [Case(fused, (t, hidden, 2 * width, 1, 1)) for t in LINEAR_TOKENS]
    return cases
