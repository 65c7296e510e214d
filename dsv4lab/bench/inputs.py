"""Random inputs of the measured operations, on the device of the generator that they are drawn from.

Each is the tuple of positional arguments of a public function, activations first.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..formats import BLOCK, SCALE_DTYPE, NVFP4Tensor
from ..layouts import group_offsets, max_group_rows
from ..quantize import quantize_nvfp4

EPS, LIMIT, STREAMS = 1e-6, 10.0, 4


def normal(r: Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=r, device=r.device, dtype=dtype)


def scales(r: Generator, *shape: int) -> Tensor:
    """Block scales from 0.5 to 2."""
    return torch.randint(0x30, 0x41, shape, generator=r, device=r.device, dtype=torch.uint8).view(SCALE_DTYPE)


def by_token(x: Tensor) -> NVFP4Tensor:
    return quantize_nvfp4(x, "token", backend="reference")


def rmsnorm(r: Generator, t: int, k: int) -> tuple:
    return normal(r, t, k), normal(r, k), EPS, "token"


def mhc(r: Generator, t: int, k: int) -> tuple:
    mix = torch.rand(t, STREAMS, generator=r, device=r.device)
    return normal(r, t, STREAMS, k), mix, normal(r, k), EPS, "token"


def swiglu(r: Generator, t: int, k: int) -> tuple:
    return normal(r, t, 2 * k) * 4, LIMIT, "token"  # some reach the clamp


def linear(r: Generator, t: int, k: int, n: int, *, w4a16: bool) -> tuple:
    x = normal(r, t, k)
    return x if w4a16 else by_token(x), weight(r, n, k)


def grouped(
    r: Generator, t: int, k: int, n: int, groups: int, top_k: int, *, w4a16: bool, interleaved: bool = False
) -> tuple:
    """Every token goes to `top_k` groups that chance chooses."""
    chosen = torch.rand(t, groups, generator=r, device=r.device).topk(top_k).indices
    sizes = torch.bincount(chosen.flatten(), minlength=groups).int()
    offsets = group_offsets(sizes)
    x = torch.zeros(max_group_rows(t, top_k, groups), k, device=r.device, dtype=torch.bfloat16)
    for _, start, stop in spans(x, None, offsets, sizes):
        x[start:stop] = normal(r, stop - start, k)
    b = weight(r, groups, n, k, interleaved=interleaved)
    return x if w4a16 else by_token(x), b, offsets, sizes


def weight(r: Generator, *shape: int, interleaved: bool = False) -> NVFP4Tensor:
    """Any codes; the global scale makes outputs of a few units, so that some reach the clamp of SwiGLU."""
    *rows, k = shape
    codes = torch.randint(256, (*rows, k // 2), generator=r, device=r.device, dtype=torch.uint8)
    g = torch.full((), k**-0.5, device=r.device)
    return NVFP4Tensor(codes, scales(r, *rows, k // BLOCK), g, interleaved=interleaved)


def spans(a, b, offsets: Tensor | None = None, sizes: Tensor | None = None) -> list[tuple[int, int, int]]:
    """(group, first row, end) of the groups that hold tokens, on the host."""
    if offsets is None:
        return [(0, 0, a.shape[0])]
    starts = (0, *offsets.tolist())
    return [(g, starts[g], starts[g] + n) for g, n in enumerate(sizes.tolist()) if n]
