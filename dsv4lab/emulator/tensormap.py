"""TMA descriptors: what the 128 bytes that host code writes say of a tensor, and those bytes again."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.emulator.tensormap_fields import (
    ELEMENTS,
    FILLS,
    INTERLEAVES,
    L2_PROMOTIONS,
    SWIZZLES,
    TensorMapError,
    pack,
    replace,
    unknown_bits,
    unpack,
)

__all__ = ["TensorMap", "TensorMapError", "decode", "replace"]

LARGE = 128 * 1024
_PADDED = ("b4x16_p64", "b6x16_p32")
_FLOATS = ("f16", "f32", "f32.ftz", "f64", "bf16", "tf32", "tf32.ftz")


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What a tiled TMA descriptor says; dimension 0 is the innermost.

    Attributes:
        address: of the first element in global memory.
        element: type of an element, a key of ELEMENTS.
        shape: elements in each dimension; their number is the rank, 1 to 5.
        strides: bytes from one element to the next in dimensions 1, 2, ...; dimension 0 is dense.
        box: elements of the tile in each dimension, before `element_strides` thins them out.
        element_strides: step in elements within the box; ceil(box / step) are copied. Dimension 0 has
            none unless interleaved.
        swizzle: a key of SWIZZLES.
        interleave: one of INTERLEAVES.
        fill: what a load puts where the box lies outside the tensor, one of FILLS.
        l2_promotion: one of L2_PROMOTIONS, without effect on results.
        large: whether the tensor spans at least 128 KiB, which host code notes for the bounds check of
            Blackwell; None works it out.
    Raises:
        TensorMapError: for a combination that the TMA unit does not take (cuda.h, cuTensorMapEncodeTiled).
    """

    address: int
    element: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...] = ()
    swizzle: str = "none"
    interleave: str = "none"
    fill: str = "zero"
    l2_promotion: str = "128B"
    large: bool | None = None

    def __post_init__(self) -> None:
        if not self.element_strides:
            object.__setattr__(self, "element_strides", (1,) * self.rank)
        _check(self)
        if self.large is None:
            object.__setattr__(self, "large", self.span >= LARGE)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def bits(self) -> int:
        """Bits of an element in global memory."""
        return ELEMENTS[self.element].bits

    @property
    def span(self) -> int:
        """Bytes from the first element to behind the last."""
        steps = (n - 1 for n in self.shape[1:])
        outer = sum(step * stride for step, stride in zip(steps, self.strides, strict=True))
        return outer + -(-self.shape[0] * self.bits // 8)

    @property
    def copied(self) -> tuple[int, ...]:
        """Elements of each dimension that a copy of one box moves, those outside the tensor included."""
        steps = self.element_strides if self.interleave != "none" else (1, *self.element_strides[1:])
        return tuple(-(-size // step) for size, step in zip(self.box, steps, strict=True))

    def encode(self) -> bytes:
        """The 128-byte descriptor, of which the upper half is zero."""
        element = ELEMENTS[self.element]
        _, mode, atom = SWIZZLES[self.swizzle]
        values = {
            "address": self.address,
            "version": 1,
            "rank": self.rank - 1,
            "element": element.code,
            "to_tf32": int(element.to_tf32),
            "interleave": INTERLEAVES.index(self.interleave),
            "swizzle": mode,
            "swizzle_atom": atom,
            "fill": FILLS.index(self.fill),
            "l2_promotion": L2_PROMOTIONS.index(self.l2_promotion),
            "large": int(self.large),
        }
        for i, stride in enumerate(self.strides):
            values[f"stride_high{i}"], values[f"stride{i}"] = divmod(stride // 16, 1 << 32)
        for name, sizes in (
            ("shape", self.shape),
            ("box", self.box),
            ("element_stride", self.element_strides),
        ):
            values.update({f"{name}{i}": size - 1 for i, size in enumerate(sizes)})
        return pack(values)


def decode(descriptor: bytes) -> TensorMap:
    """Decode a descriptor.

    Args:
        descriptor: 128 bytes, or the 64 that count; host code leaves in the others what lay on its stack.
    Returns:
        What it says. Sizes beyond its rank are ignored, as the TMA unit does.
    Raises:
        TensorMapError: for a descriptor that is not tiled, has bits that are not known, or breaks a rule.
    """
    get = unpack(bytes(descriptor))
    if get["version"] != 1:
        raise TensorMapError(f"this is no TMA descriptor: its version is {get['version']}, not 1")
    if get["im2col"]:
        raise TensorMapError("an im2col descriptor: only tiled ones are supported")
    if stray := unknown_bits(descriptor):
        raise TensorMapError(f"the descriptor sets bits that are not known: {stray:#x}")
    if get["swizzle_96B"]:
        raise TensorMapError("swizzle 96B is not supported")
    rank = get["rank"] + 1
    if rank > 5:
        raise TensorMapError(f"rank must be 1 to 5, got {rank}")
    return TensorMap(
        address=get["address"],
        element=_element(get["element"], get["to_tf32"]),
        shape=tuple(get[f"shape{i}"] + 1 for i in range(rank)),
        strides=tuple((get[f"stride_high{i}"] << 32 | get[f"stride{i}"]) * 16 for i in range(rank - 1)),
        box=tuple(get[f"box{i}"] + 1 for i in range(rank)),
        element_strides=tuple(get[f"element_stride{i}"] + 1 for i in range(rank)),
        swizzle=_swizzle(get["swizzle"], get["swizzle_atom"]),
        interleave=_interleave(get["interleave"]),
        fill=FILLS[get["fill"]],
        l2_promotion=L2_PROMOTIONS[get["l2_promotion"]],
        large=bool(get["large"]),
    )


def _element(code: int, to_tf32: int) -> str:
    for name, element in ELEMENTS.items():
        if (element.code, element.to_tf32) == (code, bool(to_tf32)):
            return name
    raise TensorMapError(f"no element type has code {code} with the TF32 bit {to_tf32}")


def _swizzle(mode: int, atom: int) -> str:
    for name, (_, a_mode, an_atom) in SWIZZLES.items():
        if (a_mode, an_atom) == (mode, atom):
            return name
    raise TensorMapError(f"swizzle mode {mode} has no atom {atom}")


def _interleave(code: int) -> str:
    if code >= len(INTERLEAVES):
        raise TensorMapError(f"no interleave has code {code}")
    return INTERLEAVES[code]


def _check(tm: TensorMap) -> None:
    """The rules of cuTensorMapEncodeTiled."""
    _check_names(tm)
    if not 1 <= tm.rank <= 5:
        raise TensorMapError(f"rank must be 1 to 5, got {tm.rank}")
    if tm.interleave != "none" and tm.rank < 3:
        raise TensorMapError(f"an interleaved tensor has at least 3 dimensions, got {tm.rank}")
    for name, sizes, count in (
        ("strides", tm.strides, tm.rank - 1),
        ("box", tm.box, tm.rank),
        ("element_strides", tm.element_strides, tm.rank),
    ):
        if len(sizes) != count:
            raise TensorMapError(f"{name} must have {count} entries for rank {tm.rank}, got {sizes}")
    for name, sizes, most in (
        ("shape", tm.shape, 1 << 32),
        ("box", tm.box, 256),
        ("element_strides", tm.element_strides, 8),
    ):
        if not all(1 <= size <= most for size in sizes):
            raise TensorMapError(f"{name} must be between 1 and {most}, got {sizes}")
    _check_memory(tm)
    _check_box(tm)


def _check_names(tm: TensorMap) -> None:
    for name, value, known in (
        ("element", tm.element, ELEMENTS),
        ("swizzle", tm.swizzle, SWIZZLES),
        ("interleave", tm.interleave, INTERLEAVES),
        ("fill", tm.fill, FILLS),
        ("l2_promotion", tm.l2_promotion, L2_PROMOTIONS),
    ):
        if value not in known:
            raise TensorMapError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_memory(tm: TensorMap) -> None:
    unit = 32 if tm.interleave == "32B" or tm.element in _PADDED else 16
    if tm.address % unit or not 0 <= tm.address < 1 << 64:
        raise TensorMapError(f"address must be a multiple of {unit}, got {tm.address:#x}")
    if any(stride % unit or not 0 <= stride < 1 << 40 for stride in tm.strides):
        raise TensorMapError(f"strides must be multiples of {unit} below 2**40, got {tm.strides}")
    count = 128 if tm.element in _PADDED else 2 if tm.element == "b4x16" else 1
    if tm.shape[0] % count:
        raise TensorMapError(f"shape[0] must be a multiple of {count} for {tm.element}, got {tm.shape[0]}")
    if tm.fill == "nan" and tm.element not in _FLOATS:
        raise TensorMapError(f"fill 'nan' needs a floating-point element, got {tm.element}")


def _check_box(tm: TensorMap) -> None:
    inner = tm.box[0] * tm.bits
    if tm.element in _PADDED and tm.box[0] != 128:
        raise TensorMapError(f"box[0] must be 128 for {tm.element}, got {tm.box[0]}")
    if tm.interleave == "none" and inner % 128:
        raise TensorMapError(f"box[0] must span a multiple of 16 bytes, got {inner / 8:g}")
    span = SWIZZLES[tm.swizzle][0]
    in_shared = tm.box[0] * ELEMENTS[tm.element].shared_bits // 8
    if tm.interleave == "none" and span and in_shared > span:
        raise TensorMapError(
            f"box[0] must span at most {span} bytes for swizzle {tm.swizzle}, got {in_shared}"
        )
    if tm.interleave == "32B" and tm.swizzle != "32B":
        raise TensorMapError(f"interleave 32B needs swizzle 32B, got {tm.swizzle}")
