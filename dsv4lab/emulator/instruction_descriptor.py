"""Instruction descriptors of tcgen05.mma: 32 bits that hold types, shape, majors and scale ids."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.emulator.matrix_descriptor import DescriptorError

_FLOAT8 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_PLAIN = {
    "f16": ({0: "f16", 1: "bf16"}, {0: "f16", 1: "f32"}, 16),
    "tf32": ({2: "tf32"}, {1: "f32"}, 8),
    "f8f6f4": (_FLOAT8, {0: "f16", 1: "f32"}, 32),
    "i8": ({0: "u8", 1: "s8"}, {2: "s32"}, 32),
}
_SCALED = {
    "mxf8f6f4": (_FLOAT8, {1: "ue8m0"}),
    "mxf4": ({1: "e2m1"}, {1: "ue8m0"}),
    "mxf4nvf4": ({1: "e2m1"}, {0: "ue4m3", 1: "ue8m0"}),
}
KINDS = (*_PLAIN, *_SCALED)


@dataclass(frozen=True, slots=True)
class InstructionDescriptor:
    """What an instruction descriptor says.

    Attributes:
        kind: "f16", "tf32", "f8f6f4", "i8", "mxf8f6f4", "mxf4" or "mxf4nvf4".
        m, n, k: shape of the MMA, of both CTAs together.
        a, b: types of the elements, "f16", "bf16", "tf32", "e4m3", ..., "u8", "s8".
        d: type of the accumulator, "f16", "f32" or "s32".
        negate_a, negate_b: the operand is negated.
        mn_major_a, mn_major_b: M or N, not K, is contiguous in shared memory.
        saturate: clamp integer results.
        scale: type of the scales, "ue4m3" or "ue8m0"; None for a kind without.
        scale_id_a, scale_id_b: byte of a tensor-memory word at which its scales begin.
    """

    kind: str
    m: int
    n: int
    k: int
    a: str
    b: str
    d: str
    negate_a: bool
    negate_b: bool
    mn_major_a: bool
    mn_major_b: bool
    saturate: bool = False
    scale: str | None = None
    scale_id_a: int = 0
    scale_id_b: int = 0

    @property
    def types(self) -> tuple[str, str]:
        """Types of A and B."""
        return self.a, self.b


def decode(bits: int, kind: str, ctas: int) -> InstructionDescriptor:
    """Read an instruction descriptor, by tables 45 to 47 of PTX ISA 9.3, and check its shape (table 42).

    Args:
        bits: the 32 bits.
        kind: of KINDS.
        ctas: 1 or 2, of .cta_group.
    Raises:
        DescriptorError: for a reserved bit, an unknown type, or a shape that the kind does not have.
    """
    found = _plain(bits, kind) if kind in _PLAIN else _scaled(bits, kind)
    _check(found, bits, ctas)
    return found


def _field(bits: int, low: int, width: int) -> int:
    return bits >> low & (1 << width) - 1


def _of(names: dict[int, str], value: int, what: str, bits: int, kind: str) -> str:
    if value not in names:
        raise _error(bits, kind, f"{what} {value}")
    return names[value]


def _error(bits: int, kind: str, what: str) -> DescriptorError:
    return DescriptorError(f"the instruction descriptor {bits:#010x} of kind {kind} has {what}")


def _common(bits: int, kind: str, types: dict[int, str], b_width: int) -> dict:
    return {
        "kind": kind,
        "n": _field(bits, 17, 6) << 3,
        "a": _of(types, _field(bits, 7, 3), "type of A", bits, kind),
        "b": _of(types, _field(bits, 10, b_width), "type of B", bits, kind),
        "negate_a": bool(_field(bits, 13, 1)),
        "negate_b": bool(_field(bits, 14, 1)),
        "mn_major_a": bool(_field(bits, 15, 1)),
        "mn_major_b": bool(_field(bits, 16, 1)),
    }


def _plain(bits: int, kind: str) -> InstructionDescriptor:
    types, accumulators, k = _PLAIN[kind]
    _reserved(bits, kind, ((0, 2), (6, 1), (23, 1), (29, 1), (30, 2)))
    saturate = bool(_field(bits, 3, 1))
    if saturate and kind != "i8":
        raise _error(bits, kind, "the saturate bit of kind i8")
    return InstructionDescriptor(
        **_common(bits, kind, types, 3),
        m=_field(bits, 24, 5) << 4,
        k=k,
        d=_of(accumulators, _field(bits, 4, 2), "type of D", bits, kind),
        saturate=saturate,
    )


def _scaled(bits: int, kind: str) -> InstructionDescriptor:
    types, scales = _SCALED[kind]
    fp4 = kind != "mxf8f6f4"
    _reserved(bits, kind, ((0, 2), (3, 1), (6, 1), (24, 3), (12, 1) if fp4 else (31, 1)))
    k = (96 if _field(bits, 31, 1) else 64) if fp4 else 32
    return InstructionDescriptor(
        **_common(bits, kind, types, 2 if fp4 else 3),
        m=_field(bits, 27, 2) << 7,
        k=k,
        d="f32",
        scale=_of(scales, _field(bits, 23, 1), "type of scales", bits, kind),
        scale_id_a=_field(bits, 29, 2),
        scale_id_b=_field(bits, 4, 2),
    )


def _reserved(bits: int, kind: str, fields: tuple[tuple[int, int], ...]) -> None:
    if _field(bits, 2, 1):
        raise _error(bits, kind, "the sparsity bit, which tcgen05.mma without .sp does not take")
    for low, width in fields:
        if _field(bits, low, width):
            raise _error(bits, kind, f"reserved bits {low} to {low + width - 1} that are not 0")


def _check(d: InstructionDescriptor, bits: int, ctas: int) -> None:
    rows = ((128,) if d.scale else (64, 128)) if ctas == 1 else (128, 256)
    if d.m not in rows:
        raise _error(bits, d.kind, f"M = {d.m}, and .cta_group::{ctas} has M = {rows}")
    step = _n_step(d, ctas)
    small_integers = d.kind == "i8" and ctas == 1 and d.n in (8, 24)
    if not 0 < d.n <= 256 or (d.n % step and not small_integers):
        raise _error(bits, d.kind, f"N = {d.n}, which must be a multiple of {step} up to 256")
    if d.kind == "f16" and d.d == "f16" and "bf16" in d.types:
        raise _error(bits, d.kind, "an fp16 accumulator of bf16 operands")
    if d.kind == "f16" and d.a != d.b:
        raise _error(bits, d.kind, f"types {d.a} and {d.b}, which must be the same")
    if (d.negate_a or d.negate_b) and d.kind == "i8":
        raise _error(bits, d.kind, "a negate bit, which integers do not take")
    for side, type_, mn_major in (("A", d.a, d.mn_major_a), ("B", d.b, d.mn_major_b)):
        if mn_major and type_ in ("e2m1", "e2m3", "e3m2"):
            raise _error(bits, d.kind, f"a transposed {side} of type {type_}")


def _n_step(d: InstructionDescriptor, ctas: int) -> int:
    if d.kind == "i8":
        return 16 * ctas
    # Table 55: B of 8 bits is transposed in steps of 16 columns for each CTA.
    bytes_transposed = d.mn_major_b and d.b in ("e4m3", "e5m2")
    return (16 if bytes_transposed else 8) * ctas
