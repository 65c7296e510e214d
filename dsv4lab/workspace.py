"""Scratch memory that the layers of a model share, so that a step allocates nothing of its own.

Layers run one after the other on a stream, so what one of them leaves in its scratch nobody needs: one set of
buffers, sized by the largest layer, serves all. A CUDA graph keeps the addresses it was captured with, so
while one holds the memory it must not grow, and it cannot grow during a capture.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Whether the current CUDA stream records a graph; False without a GPU, and while a compiler traces."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


class Workspace:
    """Named buffers that grow to the largest size asked for, on one device and one stream.

    Args:
        device: where the buffers are.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.holders = 0
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the buffer of that name, contents undefined, valid until the name is asked for again.

        Raises:
            RuntimeError: the buffer is too small while a capture runs or a graph holds it.
        """
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            self._check_growth(name, size)
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return buffer[:size].view(dtype).view(shape)

    def _check_growth(self, name: str, size: int) -> None:
        if is_capturing():
            why = "a capture runs"
        elif self.holders:
            why = f"{self.holders} graph(s) hold it"
        else:
            return
        raise RuntimeError(
            f"workspace buffer {name!r} cannot grow to {size} bytes while {why}; "
            "call warmup(model, max_tokens) with the largest number of tokens before capturing"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(b.numel() for b in self._buffers.values())

    @contextmanager
    def hold(self):
        """Forbid growth: enter it for as long as a graph captured on this memory lives."""
        self.holders += 1
        try:
            yield self
        finally:
            self.holders -= 1


class Workspaces:
    """The workspaces of one model, one for each device and stream; copies and pickles of it start empty."""

    def __init__(self):
        self._by_stream: dict[tuple[torch.device, int], Workspace] = {}

    def on(self, device: torch.device) -> Workspace:
        """The workspace of the device's current stream."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream)
        if key not in self._by_stream:
            self._by_stream[key] = Workspace(device)
        return self._by_stream[key]

    def __deepcopy__(self, memo) -> Workspaces:
        return memo.setdefault(id(self), Workspaces())

    def __reduce__(self):
        return Workspaces, ()
