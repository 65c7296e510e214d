"""NVFP4 as frozen data: the constants of E2M1 and E4M3, and the operand that carries codes and scales."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

BLOCK = 16  # consecutive values along K that share one scale
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # index = code without its sign bit 3
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest subnormal
E4M3_MIN_NORMAL = 2.0**-6
GLOBAL_DIVISOR = E2M1_MAX * E4M3_MAX  # amax / 2688 is the global scale that just does not saturate
FOUR_OVER_SIX_DIVISOR = E2M1_MAX * 256.0
AMAX_FLOOR = 1e-8  # keeps the runtime global scale of all-zero data away from 0
GLOBAL_MIN, GLOBAL_MAX = 2.0**-100, 2.0**115  # inside, no product or reciprocal of the recipe is subnormal
SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4  # tile of the swizzled block scales
CODE_DTYPE, SCALE_DTYPE, GLOBAL_DTYPE = torch.uint8, torch.float8_e4m3fn, torch.float32
SCALE_LAYOUTS = ("linear", "swizzled")
GRANULARITIES = ("tensor", "token", "group")


def ceil_to(n: int, multiple: int) -> int:
    """Round n up to a multiple (works on symbolic sizes)."""
    return (n + multiple - 1) // multiple * multiple


def scales_shape(shape: tuple[int, ...], scale_layout: str) -> tuple[int, ...]:
    """Shape of the block scales of a logical (..., K) tensor: (..., K/16), or padded to 128 x 4 tiles."""
    *lead, k = shape
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"scale_layout must be 'linear' or 'swizzled', got {scale_layout!r}")
    if scale_layout == "linear":
        return (*lead, k // BLOCK)
    if len(lead) not in (1, 2):
        raise ValueError(
            f"scale_layout='swizzled' needs a tensor (R, K) or (G, R, K), got {len(shape)} dimensions"
        )
    return (*lead[:-1], ceil_to(lead[-1], SWIZZLE_ROWS), ceil_to(k // BLOCK, SWIZZLE_COLUMNS))


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A tensor (..., K) held as 4-bit codes, a scale for each 16 of them, and a global scale.

    Args:
        codes: uint8 (..., K/2), the even k in the low nibble; K % 16 == 0.
        block_scales: float8_e4m3fn (..., K/16) when linear; (R, K) and (G, R, K) tensors may have them
            swizzled, padded to (..., ceil128(R), ceil4(K/16)).
        global_scale: float32 in decode direction, `x ~ code * block_scale * global_scale`: () for the tensor,
            (...) or (..., 1) for each token, (G,) for each group, (G, 2) for the gate and up rows of a group.
        scale_layout: "linear" or "swizzled".
        granularity: "tensor", "token" or "group"; None infers it from the shapes, taking a (R,) that fits the
            rows for tokens.
        interleaved: gate and up rows alternate in runs of 8.

    Raises:
        TypeError: a part is no tensor or has another dtype.
        ValueError: shapes, devices, layout or granularity do not fit together.
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor
    scale_layout: str = "linear"
    granularity: str | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        _check_parts(self.codes, self.block_scales, self.global_scale)
        _check_scales_shape(self.codes, self.block_scales, self.scale_layout)
        lead, g = tuple(self.codes.shape[:-1]), tuple(self.global_scale.shape)
        object.__setattr__(self, "granularity", scale_granularity(lead, g, self.granularity))

    @property
    def K(self) -> int:
        """Length of the contraction dimension, in values."""
        return self.codes.shape[-1] * 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., K)."""
        return (*self.codes.shape[:-1], self.K)

    @property
    def rows(self) -> int:
        """Number of rows of K values, over all leading dimensions."""
        return math.prod(self.codes.shape[:-1])

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales and global scale together."""
        return self.codes.nbytes + self.block_scales.nbytes + self.global_scale.nbytes

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        """The same tensor on another device; dtypes are the format's and never change."""
        parts = {name: getattr(self, name).to(device) for name in _PARTS}
        return self.with_(**parts)

    def with_(self, **changes) -> NVFP4Tensor:
        """A copy with some fields replaced, checked again."""
        return dataclasses.replace(self, **changes)

    def __reduce__(self):
        # plain pickle cannot hold float8 storage
        meta = tuple(getattr(self, name) for name in _META)
        return _unpickle, (self.codes, self.block_scales.view(torch.uint8), self.global_scale, *meta)


_PARTS = ("codes", "block_scales", "global_scale")
_META = ("scale_layout", "granularity", "interleaved")


def _unpickle(codes: Tensor, scale_bytes: Tensor, global_scale: Tensor, *meta) -> NVFP4Tensor:
    return NVFP4Tensor(codes, scale_bytes.view(SCALE_DTYPE), global_scale, *meta)


def _check_parts(codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> None:
    parts = (codes, block_scales, global_scale)
    for name, part, dtype in zip(_PARTS, parts, (CODE_DTYPE, SCALE_DTYPE, GLOBAL_DTYPE), strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(part).__name__}")
        if part.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {part.dtype}")
        if part.device != codes.device:
            raise ValueError(f"{name} is on {part.device}, but codes is on {codes.device}")


def _check_scales_shape(codes: Tensor, block_scales: Tensor, scale_layout: str) -> None:
    if codes.dim() == 0 or codes.shape[-1] % (BLOCK // 2):
        raise ValueError(f"codes must be (..., K/2) with K % 16 == 0, got shape {tuple(codes.shape)}")
    want = scales_shape((*codes.shape[:-1], codes.shape[-1] * 2), scale_layout)
    if tuple(block_scales.shape) != want:
        raise ValueError(
            f"block_scales must be {want} ({scale_layout}) for codes {tuple(codes.shape)}, "
            f"got {tuple(block_scales.shape)}"
        )


def scale_granularity(lead: tuple[int, ...], g: tuple[int, ...], granularity: str | None = None) -> str:
    """What a global scale of shape g is for, given rows of shape lead; checked against a stated one."""
    fits = {
        "tensor": g == (),
        "token": g in (lead, (*lead, 1)),
        # a matrix may be the padded rows of any number of groups; otherwise groups are the first dimension
        "group": len(g) in (1, 2) and (len(g) == 1 or g[1] == 2) and (len(lead) == 1 or g[:1] == lead[:1]),
    }
    if granularity is not None and granularity not in fits:
        raise ValueError(f"granularity must be 'tensor', 'token' or 'group', got {granularity!r}")
    for name in fits if granularity is None else (granularity,):
        if fits[name]:
            return name
    wanted = f"granularity {granularity!r}" if granularity else "any granularity"
    raise ValueError(f"global_scale of shape {g} does not fit {wanted} of rows {lead}")


def _flatten(t: NVFP4Tensor):
    return [getattr(t, name) for name in _PARTS], tuple(getattr(t, name) for name in _META)


def _unflatten(parts, meta) -> NVFP4Tensor:
    # Unchecked: tree_map may put anything into the leaves.
    t = object.__new__(NVFP4Tensor)
    for name, value in zip((*_PARTS, *_META), (*parts, *meta), strict=True):
        object.__setattr__(t, name, value)
    return t


_pytree.register_pytree_node(NVFP4Tensor, _flatten, _unflatten, serialized_type_name="dsv4lab.NVFP4Tensor")


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, 10 log10(sum x^2 / sum (x - y)^2), summed in float64.

    Args:
        reference: x, any floating dtype and shape.
        approximation: y of the same shape.

    Returns:
        dB as a Python float (so it waits for the device): inf when equal, nan when either holds a NaN or Inf.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"approximation must have the reference's shape {tuple(reference.shape)}, "
            f"got {tuple(approximation.shape)}"
        )
    x, y = reference.detach().double(), approximation.detach().double()
    signal, noise = x.square().sum().item(), (x - y).square().sum().item()
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
