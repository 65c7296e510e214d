"""Buffers that stay float32 in a module of another dtype."""

from __future__ import annotations

from torch import nn


class KeepsFloat32(nn.Module):
    """A module whose named buffers stay float32 when the module is moved to another dtype.

    Global scales and the router's bias lose their meaning in half precision: 2^-30 is zero there.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {n: self._buffers[n] for n in self.float32_names if self._buffers.get(n) is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self
