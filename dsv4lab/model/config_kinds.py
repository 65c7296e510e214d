"""What kind of value each entry of a config.json must be, before anything is computed from it."""

from __future__ import annotations

_NAMED = ("layer_types", "mlp_layer_types")
_RATIOS = ("compress_ratios",)
_OBJECTS = ("compress_rates", "rope_parameters", "rope_scaling")
_ROPES = ("main", "compress")
TOKENS = ("bos_token_id", "eos_token_id")
_ROPE_NUMBERS = (
    "rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
)  # fmt: skip


def check_kinds(values: dict, numbers: tuple[str, ...]) -> None:
    """Refuse what is no number, list or object where one must stand; null stands for "not given".

    Args:
        values: a parsed config.json.
        numbers: the names that must be finite numbers, within 64 bits.

    Raises:
        ValueError: one sentence that names the entry.
    """
    for name in numbers:
        _check(values, name, _is_number, "a number")
    for name in TOKENS:
        _check(values, name, _is_token, "a token id or a list of them")
    for name in _NAMED:
        _check(values, name, lambda v: _is_list(v, lambda item: isinstance(item, str)), "a list of names")
    for name in _RATIOS:
        _check(values, name, lambda v: _is_list(v, _is_number), "a list of numbers")
    for name in _OBJECTS:
        _check(values, name, lambda v: isinstance(v, dict), "an object")
    rates = values.get("compress_rates") or {}
    for name in rates:
        _check(rates, name, _is_number, "a number", "compress_rates")
    _check_rope(values, "rope_scaling")
    _check_rope(values, "rope_parameters")


def _check_rope(values: dict, group: str) -> None:
    """The numbers of a rotation, and of its two parts where it has parts."""
    rope = values.get(group) or {}
    for name in _ROPE_NUMBERS:
        _check(rope, name, _is_number, "a number", group)
    present = [part for part in _ROPES if rope.get(part) is not None]
    for part in _ROPES if present else ():
        if not isinstance(rope.get(part), dict):
            raise ValueError(f"config: {group}.{part} must be an object, got {rope.get(part)!r}")
        for name in _ROPE_NUMBERS:
            _check(rope[part], name, _is_number, "a number", f"{group}.{part}")


def _check(values: dict, name: str, good, kind: str, group: str = "") -> None:
    value = values.get(name)
    if value is not None and not good(value):
        where = f"{group}.{name}" if group else name
        raise ValueError(f"config: {where} must be {kind}, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_token(value) -> bool:
    return _is_id(value) or _is_list(value, _is_id)


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value, good) -> bool:
    return isinstance(value, list | tuple) and all(map(good, value))
