"""Where bytes stand: 128x4 scale swizzle, gate/up interleave, padded groups, and imports of other layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab import formats, reference
from dsv4lab.formats import BLOCK, SCALE_DTYPE, NVFP4Tensor, ceil_to
from dsv4lab.ops import first_rows, register_op

GATE_UP_ROWS = 8  # g0..7, u0..7, g8..15, ...: one MMA core matrix of each
GROUP_ROWS = 128  # every group of tokens is padded to whole MMA tiles


def swizzle_scales(scales: Tensor, *, backend: str | None = None, out: Tensor | None = None) -> Tensor:
    """Put block scales into the 128x4 order that block-scaled MMAs read.

    The byte of scale (r, c) of a padded (R, C) matrix is at
    `((r // 128) * (C // 4) + c // 4) * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4`.

    Args:
        scales: (R, C) or (G, R, C), float8_e4m3fn or uint8; each matrix is swizzled by itself.
        backend: see `ops.resolve_backend`.
        out: filled in place when given; may be larger in dimension 0.

    Returns:
        (..., ceil128(R), ceil4(C)) of the same dtype, padding zero.
    """
    _check_scales("scales", scales)
    return _with_out(_swizzle, (scales,), _swizzled_shape(scales.shape), out, backend)


def unswizzle_scales(
    swizzled: Tensor, rows: int, columns: int, *, backend: str | None = None, out: Tensor | None = None
) -> Tensor:
    """The inverse of `swizzle_scales`.

    Args:
        swizzled: ([G,] ceil128(rows), ceil4(columns)), float8_e4m3fn or uint8.
        rows, columns: size of one matrix without padding.
        backend, out: as in `swizzle_scales`.

    Returns:
        (rows, columns) or (G, rows, columns) of the same dtype.
    """
    _check_scales("swizzled", swizzled)
    shape = (*swizzled.shape[:-2], rows, columns)
    if tuple(swizzled.shape) != _swizzled_shape(shape):
        raise ValueError(
            f"swizzled must be {_swizzled_shape(shape)} for {rows} rows and {columns} columns, "
            f"got {tuple(swizzled.shape)}"
        )
    return _with_out(_unswizzle, (swizzled, rows, columns), shape, out, backend)


def with_scale_layout(t: NVFP4Tensor, scale_layout: str, *, backend: str | None = None) -> NVFP4Tensor:
    """The same tensor with its block scales "linear" or "swizzled"; itself if it has them so already."""
    if scale_layout not in formats.SCALE_LAYOUTS:
        raise ValueError(f"scale_layout must be 'linear' or 'swizzled', got {scale_layout!r}")
    if t.scale_layout == scale_layout:
        return t
    if scale_layout == "swizzled":
        scales = swizzle_scales(t.block_scales, backend=backend)
    else:
        scales = unswizzle_scales(t.block_scales, t.shape[-2], t.K // BLOCK, backend=backend)
    return t.with_(block_scales=scales, scale_layout=scale_layout)


def interleave_gate_up(t: Tensor | NVFP4Tensor, dim: int = -2) -> Tensor | NVFP4Tensor:
    """From gate rows followed by up rows to g0..7, u0..7, g8..15, ...

    Args:
        t: 2 I along dim, I % 8 == 0: a plain tensor (weights, scales, biases), or an NVFP4Tensor (2 I, K) or
            (G, 2 I, K), whose codes, block scales and token scales all move; dim must then be -2.

    Returns:
        The same shape; an NVFP4Tensor is marked as interleaved.
    """
    return _move_gate_up(t, dim, interleave=True)


def deinterleave_gate_up(t: Tensor | NVFP4Tensor, dim: int = -2) -> Tensor | NVFP4Tensor:
    """The inverse of `interleave_gate_up`."""
    return _move_gate_up(t, dim, interleave=False)


def from_k_packed(codes: Tensor, scales: Tensor, global_scale: Tensor) -> NVFP4Tensor:
    """Import a weight packed along its outer dimension; the bytes equal those of the K-major original.

    Args:
        codes: uint8 (K/2, N) or (G, K/2, N), the even k in the low nibble.
        scales: float8_e4m3fn (K/16, N) or (G, K/16, N).
        global_scale: float32 (), (G,) or (G, 2), decode direction.

    Returns:
        NVFP4Tensor (N, K) or (G, N, K), linear scales.
    """
    for name, part in (("codes", codes), ("scales", scales), ("global_scale", global_scale)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(part).__name__}")
    for name, part in (("codes", codes), ("scales", scales)):
        if part.dim() not in (2, 3):
            raise ValueError(f"{name} must have 2 or 3 dimensions, got shape {tuple(part.shape)}")
    granularity = None if global_scale.dim() == 0 else "group"
    return NVFP4Tensor(
        codes.transpose(-1, -2).contiguous(),
        scales.view(torch.uint8).transpose(-1, -2).contiguous().view(scales.dtype),
        global_scale,
        granularity=granularity,
    )


def group_offsets(sizes: Tensor) -> Tensor:
    """Cumulative ends of groups padded to 128 rows: (G,) int32 tokens -> (G,) int32, on the device."""
    _check_groups("sizes", sizes)
    padded = (sizes + (GROUP_ROWS - 1)).bitwise_and(-GROUP_ROWS)
    return padded.cumsum(0, dtype=torch.int32)


def max_group_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows that hold any routing of T tokens to k of E experts, ceil((T k + 127 min(E, T k)) / 128) * 128."""
    routed = tokens * top_k
    return ceil_to(routed + (GROUP_ROWS - 1) * min(experts, routed), GROUP_ROWS)


def from_torch_offsets(ends: Tensor) -> tuple[Tensor, Tensor]:
    """From torch's grouped-mm convention, where groups stand without padding, to (offsets, sizes).

    Args:
        ends: (G,) int32, cumulative ends of the real rows, as `torch.nn.functional.grouped_mm` takes them.

    Returns:
        offsets (G,) int32, cumulative padded ends, and sizes (G,) int32. Row i of the unpadded buffer goes to
        row `padded_rows(sizes, rows)[i]` of the padded one.
    """
    _check_groups("ends", ends)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    return group_offsets(sizes), sizes


def padded_rows(sizes: Tensor, rows: int) -> Tensor:
    """Where each row of an unpadded buffer of groups stands in the padded one.

    Args:
        sizes: (G,) int32, real rows of each group.
        rows: rows of the unpadded buffer; rows past the last group are counted on from it.

    Returns:
        (rows,) int64, on the device and without waiting for it.
    """
    _check_groups("sizes", sizes)
    ends = sizes.cumsum(0, dtype=torch.int32)
    # padding before a group is the padding after all groups before it
    shift = torch.nn.functional.pad(group_offsets(sizes) - ends, (1, 0))
    row = torch.arange(rows, device=sizes.device)
    group = torch.bucketize(row, ends, right=True)
    return row + shift[group]


def _move_gate_up(t, dim: int, interleave: bool):
    if not isinstance(t, NVFP4Tensor):
        return _move_rows(t, dim, interleave)
    if dim != -2:
        raise ValueError(f"dim must be -2 for an NVFP4Tensor, whose rows are gate and up, got {dim}")
    if t.interleaved == interleave:
        raise ValueError(f"t is {'already' if interleave else 'not'} interleaved")
    linear = with_scale_layout(t, "linear")
    g = t.global_scale
    if t.granularity == "token":
        g = _move_rows(g.reshape(t.shape[:-1]), -1, interleave)
    moved = linear.with_(
        codes=_move_rows(linear.codes, -2, interleave),
        block_scales=_move_rows(linear.block_scales.view(torch.uint8), -2, interleave).view(SCALE_DTYPE),
        global_scale=g,
        interleaved=interleave,
    )
    return with_scale_layout(moved, t.scale_layout)


def _move_rows(t: Tensor, dim: int, interleave: bool) -> Tensor:
    """Swap the two inner factors of 2 I = 2 x (I/8) x 8 or (I/8) x 2 x 8."""
    if not -t.dim() <= dim < t.dim():
        raise ValueError(f"dim {dim} is out of range for shape {tuple(t.shape)}")
    dim %= t.dim()
    if t.shape[dim] % (2 * GATE_UP_ROWS):
        raise ValueError(
            f"gate and up must have a multiple of {GATE_UP_ROWS} rows each, got {t.shape[dim]} rows together"
        )
    runs = t.shape[dim] // (2 * GATE_UP_ROWS)
    factors = (2, runs, GATE_UP_ROWS) if interleave else (runs, 2, GATE_UP_ROWS)
    return t.unflatten(dim, factors).transpose(dim, dim + 1).flatten(dim, dim + 2)


def _swizzled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return formats.scales_shape((*shape[:-1], shape[-1] * BLOCK), "swizzled")


def _check_scales(name: str, scales: Tensor) -> None:
    if not isinstance(scales, Tensor) or scales.dtype not in (SCALE_DTYPE, torch.uint8):
        raise TypeError(
            f"{name} must be float8_e4m3fn or uint8, got {getattr(scales, 'dtype', type(scales))}"
        )
    if scales.dim() not in (2, 3):
        raise ValueError(f"{name} must have 2 or 3 dimensions, got shape {tuple(scales.shape)}")


def _check_groups(name: str, counts: Tensor) -> None:
    if not isinstance(counts, Tensor) or counts.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {getattr(counts, 'dtype', type(counts))}")
    if counts.dim() != 1:
        raise ValueError(f"{name} must be (G,), got shape {tuple(counts.shape)}")


def _with_out(op, args, shape, out, backend):
    if out is None:
        return op(*args, backend=backend)
    if not isinstance(out, Tensor) or out.dtype != args[0].dtype:
        raise TypeError(f"out must be a {args[0].dtype} tensor, got {getattr(out, 'dtype', type(out))}")
    if out.device != args[0].device:
        raise ValueError(f"out must be on {args[0].device} like the scales, got {out.device}")
    result = first_rows(out, shape)
    op.out(*args, outs=(out,), backend=backend)
    return result


_swizzle = register_op(
    "swizzle_scales(Tensor scales) -> Tensor",
    reference.swizzle,
    lambda scales: scales.new_empty(_swizzled_shape(scales.shape)),
)
_unswizzle = register_op(
    "unswizzle_scales(Tensor swizzled, int rows, int columns) -> Tensor",
    reference.unswizzle,
    lambda swizzled, rows, columns: swizzled.new_empty((*swizzled.shape[:-2], rows, columns)),
)
