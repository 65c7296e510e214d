"""Weights decoded to float32, kept for as long as their codes live unchanged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import reference, workspace
from .formats import BLOCK


class Stack(NamedTuple):
    """The weights of all groups, (G, N, K), or of one, (N, K)."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    layout: str
    interleaved: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, N, K)."""
        *groups, n, half = self.codes.shape
        return (*(groups or [1]), n, half * 2)


class _Kept(NamedTuple):
    """A decoded weight, and what it was decoded from.

    The scales are held, so that their address stays theirs: codes may meet other scales later, and a new
    tensor would stand where the old one was.
    """

    values: Tensor
    mark: tuple
    scales: Tensor
    scales_version: int | None


_kept = WeakIdKeyDictionary()


def decoded_weight(b: Stack) -> Tensor:
    """The weights (G, N, K) in float32 without their global scale.

    They are decoded once and then found by the identity of their codes. Tensors made in inference mode do not
    count their changes, so they are decoded anew each time; so is everything under capture, whose memory
    belongs to the graph.
    """
    if b.codes.is_inference() or workspace.is_capturing():
        return _decode(b)
    mark = (b.codes._version, b.codes.data_ptr(), b.scales.data_ptr(), b.scales.stride(), b.layout)
    # A view of scales that inference mode made counts nothing; who changes weights changes codes as well.
    version = None if b.scales.is_inference() else b.scales._version
    kept = _kept.get(b.codes)
    if kept is None or kept.mark != mark or version not in (None, kept.scales_version):
        with torch.inference_mode(False):
            kept = _kept[b.codes] = _Kept(_decode(b), mark, b.scales, version)
    return kept.values


def _decode(b: Stack) -> Tensor:
    scales = b.scales
    if b.layout == "swizzled":
        scales = reference.unswizzle(scales, b.shape[1], b.shape[2] // BLOCK)
    return reference.decode(b.codes, scales).view(b.shape)
