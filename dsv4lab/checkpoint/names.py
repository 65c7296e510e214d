"""What tensors are called: on disk in each dialect, and in the module tree.

On disk every expert and projection is a tensor of its own (`layers.0.ffn.experts.3.w1.weight`); the module
tree stacks them (`layers.0.ffn.experts.w13.weight`, (E, 2I, H), the gate's rows before up's). All other names
of the module tree are DeepSeek's own. transformers' `save_pretrained` writes these with a prefix and a few
renamings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_RENAMED = (  # transformers, after its prefix "model." is taken off; DeepSeek
    ("embed_tokens.weight", "embed.weight"),
    ("lm_head.weight", "head.weight"),
    ("hc_head.hc_", "hc_head_"),
    (".attn.norm.weight", ".attn.kv_norm.weight"),
)
_QUANTIZABLE = re.compile(
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.(experts\.(\d+\.)?|shared_experts\.)(w1|w2|w3|w13))\.weight"
)
_STACK = re.compile(r"(?P<prefix>.*\.ffn\.experts)\.(?P<leaf>w13|w2)\.weight")
_SHARED = re.compile(r"(?P<prefix>.*\.ffn\.shared_experts)\.w13\.weight")
_MTP = re.compile(r"(model\.)?mtp\.")


@dataclass(frozen=True)
class Part:
    """One tensor on disk and its place in a tensor of the module tree.

    Args:
        name: DeepSeek's name.
        shape: of the tensor on disk, in values.
        rows: index into the stacked tensor's leading dimensions.
        scale: index of its global scale in the stacked weight's.
        expert: index of its expert, () where there is none.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple = ()
    scale: tuple[int, ...] = ()
    expert: tuple[int, ...] = ()


def to_deepseek(name: str) -> str:
    """DeepSeek's name of a tensor, from DeepSeek's or transformers'."""
    name = name.removeprefix("model.")
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def to_transformers(name: str) -> str:
    """The name transformers' `save_pretrained` gives a tensor, from DeepSeek's."""
    if name == "head.weight":
        return name
    for theirs, ours in _RENAMED:
        name = name.replace(ours, theirs)
    return f"model.{name}"


def is_ignored(name: str) -> bool:
    """Whether a tensor on disk is known and not needed: the multi-token-prediction block."""
    return _MTP.match(name) is not None


def is_quantizable(name: str) -> bool:
    """Whether a weight, by DeepSeek's or the module tree's name, is one that NVFP4 covers."""
    return _QUANTIZABLE.fullmatch(name) is not None


def parts(name: str, shape: tuple[int, ...]) -> list[Part]:
    """The tensors on disk that make up one tensor of the module tree.

    Args:
        name: in the module tree.
        shape: in values.
    """
    if stack := _STACK.fullmatch(name):
        experts, rows, columns = shape
        prefix = stack["prefix"]
        if stack["leaf"] == "w2":
            return [
                Part(f"{prefix}.{e}.w2.weight", (rows, columns), (e,), (e,), (e,)) for e in range(experts)
            ]
        return [part for e in range(experts) for part in _gate_up(f"{prefix}.{e}", rows, columns, (e,))]
    if shared := _SHARED.fullmatch(name):
        return _gate_up(shared["prefix"], *shape, ())
    return [Part(name, tuple(shape))]


def _gate_up(prefix: str, rows: int, columns: int, expert: tuple[int, ...]) -> list[Part]:
    half = rows // 2
    gate = Part(f"{prefix}.w1.weight", (half, columns), (*expert, slice(0, half)), (*expert, 0), expert)
    up = Part(f"{prefix}.w3.weight", (half, columns), (*expert, slice(half, rows)), (*expert, 1), expert)
    return [gate, up]
