"""Conversions between number formats, of every value of the small formats and the edges of the large ones."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute

from .case import BLACKWELL, BOTH, Buffer, Case, output
from .scales import E2M1, decode_e2m1

THREADS, WIDTH = 64, 8

_E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@cute.kernel
def _convert(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    here = (None, block * THREADS + thread)
    loaded = cute.make_rmem_tensor(WIDTH, x.element_type)
    result = cute.make_rmem_tensor(WIDTH, y.element_type)
    cute.autovec_copy(cute.zipped_divide(x, (WIDTH,))[here], loaded)
    result.store(loaded.load().to(y.element_type))
    cute.autovec_copy(result, cute.zipped_divide(y, (WIDTH,))[here])


@cute.jit
def convert(x: cute.Pointer, y: cute.Pointer, count: cutlass.Int32):
    """y = x in another format; count is a multiple of 512."""
    layout = cute.make_layout(cute.assume(count, THREADS * WIDTH))
    _convert(cute.make_tensor(x, layout), cute.make_tensor(y, layout)).launch(
        grid=(count // (THREADS * WIDTH), 1, 1), block=(THREADS, 1, 1)
    )


def case(source: torch.dtype, target: torch.dtype) -> Case:
    """Every value of `source` that fits in 16 bits, or those around every edge of `target`."""
    x = _values(source, target)
    count = len(x) * 2 if source is E2M1 else len(x)
    small = {E2M1, torch.float8_e8m0fnu} & {source, target}
    new = source is torch.int8 and target is torch.bfloat16
    architectures = (BLACKWELL,) if small or new else BOTH
    expected = to(source, target, x)
    return Case(convert, (Buffer(x), output(expected), cutlass.Int32(count)), architectures=architectures)


def _values(source: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """A multiple of 512 values."""
    if source is E2M1:
        return torch.arange(256).to(torch.uint8).view(E2M1)
    if source.itemsize == 1:
        return torch.arange(512).to(torch.uint8).view(source)
    if source.itemsize == 2 and target.is_floating_point:
        return torch.arange(2**16).to(torch.int16).view(source)
    if not target.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        limit = 120.0 if target is torch.int8 else 60000.0
        x = (torch.rand(2048, generator=generator) * 2 - 1) * limit
        x[:8] = torch.tensor([0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.99, -0.0])
        return x.to(source)
    if not source.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(0, 31, (1024,), generator=generator)
        x = torch.randint(-(2**31), 2**31, (1024,), generator=generator) >> bits
        return x.to(source)
    return _around_edges(target)


def _around_edges(target: torch.dtype) -> torch.Tensor:
    """float32: values of `target`, midpoints between neighbours, and the float32 numbers beside each."""
    if target is E2M1:
        grid = _E2M1_VALUES
    else:
        width = 8 * target.itemsize
        codes = torch.arange(2 ** (width - 1)) if target is not torch.float8_e8m0fnu else torch.arange(255)
        codes = codes[torch.linspace(0, len(codes) - 1, min(len(codes), 4096)).long()]
        grid = codes.to({8: torch.uint8, 16: torch.int16}[width]).view(target).float()
        grid = grid[grid.isfinite()]
    middle = (grid[1:].double() + grid[:-1].double()).div(2).float()
    x = torch.cat([grid, middle, torch.tensor([1e-45, 1e30, torch.inf, torch.nan, 448.0, 464.0, 465.0, 7.0])])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, torch.tensor(0.0))])
    x = torch.cat([x, -x]) if target is not torch.float8_e8m0fnu else x.abs()
    return torch.cat([x, torch.ones(-len(x) % 512)])


def to(source: torch.dtype, target: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """What the conversion instructions make of x."""
    exact = decode_e2m1(x) if source is E2M1 else x.double() if source.is_floating_point else x
    if target is E2M1:
        return to_e2m1(exact)
    if target is torch.float8_e8m0fnu:
        return to_e8m0(exact)
    if target in (torch.float8_e4m3fn, torch.float8_e5m2):
        # satfinite: what is too large, infinity too, becomes the largest number.
        largest = torch.finfo(target).max
        codes = exact.clamp(-largest, largest).float().to(target).view(torch.uint8)
        # The one NaN that instructions make has no sign.
        return torch.where(exact.isnan(), 0x7F, codes).to(torch.uint8).view(target)
    if not target.is_floating_point:
        return exact.trunc().to(target) if exact.is_floating_point() else exact.to(target)
    return exact.float().to(target) if source.is_floating_point else exact.to(target)


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Bytes of two numbers each: to nearest, ties to the even code, saturated; NaN becomes 6."""
    grid = _E2M1_VALUES.double()
    middle = (grid[1:] + grid[:-1]) / 2
    size = x.abs().nan_to_num(nan=8.0)
    above = torch.searchsorted(middle, size, right=False)
    tie = (above < 7) & (size == middle[above.clamp(max=6)])
    # Codes count up by one, so that the even one of two neighbours is the one without the last bit.
    code = above + (tie & (above % 2 == 1)).long()
    code = code + 8 * (torch.signbit(x) & ~x.isnan()).long()
    return (code[0::2] + 16 * code[1::2]).to(torch.uint8).view(E2M1)


def to_e8m0(x: torch.Tensor) -> torch.Tensor:
    """The power of two at or above x >= 0: ue8m0 rounds up and does not saturate here."""
    fraction, exponent = torch.frexp(x)
    power = exponent.long() - (fraction == 0.5).long()
    code = (power + 127).clamp(min=0)
    code = torch.where(x == 0, 0, code)
    code = torch.where(x.isfinite() & (code < 255), code, 255)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)
