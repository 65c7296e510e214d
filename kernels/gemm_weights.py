"""Weights as the GEMM kernels take them, kept for as long as the tensors they were made of live unchanged.

Kernels want block scales swizzled and rows of codes of whole 16 bytes. Weights that have both are taken as
they are; of others a copy is made once, of linear scales one ninth of the weight's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dsv4lab import reference, workspace
from dsv4lab.formats import CODE_DTYPE

ROW_CODES = 32  # codes of 16 bytes


class _Kept(NamedTuple):
    made: Tensor
    mark: tuple


_kept = WeakIdKeyDictionary()


def swizzled_scales(scales: Tensor) -> Tensor:
    """Linear block scales (..., N, K/16) swizzled."""
    return _made(scales, reference.swizzle)


def whole_rows(codes: Tensor) -> Tensor:
    """Codes (..., K/2) with zeros behind each row, so that K % 32 == 0; themselves where it is so."""
    rest = codes.shape[-1] % (ROW_CODES // 2)
    return codes if not rest else _made(codes, padded_rows)


def padded_rows(codes: Tensor) -> Tensor:
    """A copy of codes (..., K/2) with zeros behind each row, so that K % 32 == 0."""
    assert codes.dtype == CODE_DTYPE
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (ROW_CODES // 2)))


def _made(source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of a tensor, found again by its identity.

    Tensors of inference mode do not count their changes, so theirs is made anew each time. Under capture too,
    if there is none yet: its memory belongs to the graph.
    """
    if source.is_inference():
        return make(source)
    mark = (source._version, source.data_ptr(), source.shape, source.stride())
    kept = _kept.get(source)
    if kept is not None and kept.mark == mark:
        return kept.made
    if workspace.is_capturing():
        return make(source)
    with torch.inference_mode(False):
        kept = _kept[source] = _Kept(make(source.detach()), mark)
    return kept.made
