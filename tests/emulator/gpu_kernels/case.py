"""A kernel as a test needs it: the host function, its arguments, and what they must hold afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack, make_ptr

HOPPER, BLACKWELL = "sm_90a", "sm_100a"
BOTH = (HOPPER, BLACKWELL)

ELEMENTS = {
    torch.float32: cutlass.Float32,
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.int64: cutlass.Int64,
    torch.int32: cutlass.Int32,
    torch.int8: cutlass.Int8,
    torch.uint8: cutlass.Uint8,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
    torch.float8_e5m2: cutlass.Float8E5M2,
    torch.float8_e8m0fnu: cutlass.Float8E8M0FNU,
    torch.float4_e2m1fn_x2: cutlass.Float4E2M1FN,
}


@dataclass(frozen=True)
class Buffer:
    """A tensor that a kernel reads or writes.

    Args:
        data: what it holds before, on the CPU.
        expected: what it must hold afterwards; None: just what it held before.
        bound: how far each element may be off, like `expected`; None: not a bit.
        passed: "pointer", "tensor" (static shape) or "dynamic" (shape and strides known at run time).
        element: element type in the kernel, if not the one of `data`.
        align: bytes that the kernel may assume.
        changes: whether it may hold anything afterwards.
    """

    data: torch.Tensor
    expected: torch.Tensor | None = None
    bound: torch.Tensor | None = None
    passed: str = "pointer"
    element: type[cutlass.Numeric] | None = None
    align: int = 16
    changes: bool = False

    def argument(self, tensor: torch.Tensor) -> Any:
        """What the host function gets for a placed copy of `data`."""
        if self.passed == "pointer":
            element = self.element or ELEMENTS[tensor.dtype]
            return make_ptr(element, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=self.align)
        lent = from_dlpack(tensor, assumed_align=self.align)
        return lent if self.passed == "tensor" else lent.mark_layout_dynamic()


def output(expected: torch.Tensor, bound: torch.Tensor | None = None, **how: Any) -> Buffer:
    """A buffer that the kernel fills: it begins as bytes of 0xFF."""
    data = torch.empty_like(expected)
    data.view(torch.uint8).fill_(0xFF)
    return Buffer(data, expected, bound, **how)


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments and its results.

    Args:
        host: a @cute.jit function.
        arguments: Buffers and numbers, in the order of the host function.
        options: its compile-time arguments, by name.
        architectures: what it compiles for.
        printed: what it prints.
    """

    host: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[str, ...] = BOTH
    printed: str = ""

    def run(self, place: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Compile and launch it, on copies of the buffers that `place` makes; return them afterwards."""
        buffers = [a for a in self.arguments if isinstance(a, Buffer)]
        placed = [place(buffer.data) for buffer in buffers]
        lent = iter([b.argument(t) for b, t in zip(buffers, placed, strict=True)])
        arguments = [next(lent) if isinstance(a, Buffer) else a for a in self.arguments]
        cute.compile(self.host, *arguments, **self.options)(*arguments)
        return placed

    def check(self, placed: list[torch.Tensor]) -> None:
        """Raise AssertionError if a buffer does not hold what it must."""
        buffers = [a for a in self.arguments if isinstance(a, Buffer)]
        for number, (buffer, tensor) in enumerate(zip(buffers, placed, strict=True)):
            if buffer.changes:
                continue
            expected = buffer.data if buffer.expected is None else buffer.expected
            compare(tensor.cpu(), expected, buffer.bound, f"buffer {number}")


def compare(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | None, name: str) -> None:
    """Raise AssertionError where they differ by more than the bound, or if there is none in any bit."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    if bound is None:
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
        wrong = found.contiguous().view(width) != expected.contiguous().view(width)
        if expected.is_floating_point() and expected.element_size() > 1:
            # Which NaN is not defined everywhere.
            wrong &= ~(found.isnan() & expected.isnan())
    else:
        # Written so that a NaN is wrong.
        wrong = ~((found.double() - expected.double()).abs() <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        shown = (found, expected) if found.element_size() > 1 else (_bytes(found), _bytes(expected))
        limit = "" if bound is None else f" within {bound[at].item():.3g}"
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, first {at}: "
            f"{shown[0][at].item()!r}, expected {shown[1][at].item()!r}{limit}"
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random whole numbers in [low, high), which sums in fp32 keep exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def gemm_bound(a: torch.Tensor, b: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """How far a @ b.T with fp32 accumulation may be from the exact product, both rounded to `target`.

    Tensor cores truncate: each of K additions costs up to 2**-23 of a sum that is at most sum(|a| |b|). Then
    both round by up to half a unit in the last place.

    Args:
        a, b: (M, K) and (N, K), float64.
    """
    accumulation = a.shape[1] * 2.0**-23 * (a.abs() @ b.abs().T)
    unit = torch.finfo(target).eps if target is not torch.float32 else 0.0
    return accumulation + unit * ((a @ b.T).abs() + accumulation)


def hopper_fp8_bound(a: torch.Tensor, b: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Like `gemm_bound`, for the 8-bit products of Hopper.

    Each instruction aligns 32 products and the sum so far to the largest of them and cuts each after 13
    fractional bits, so that each loses less than 2**-13 of the largest.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    lost = torch.zeros_like(total)
    for left, right in zip(a.split(32, 1), b.split(32, 1), strict=True):
        products = left[:, None] * right[None]
        lost += 33 * 2.0**-13 * torch.maximum(products.abs().amax(2), total.abs() + lost)
        total += products.sum(2)
    unit = torch.finfo(target).eps
    return lost + unit * (total.abs() + lost)


def gemm_operands(
    m: int, n: int, k: int, dtype: torch.dtype, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """a (m, k) and b (n, k): random, or whole numbers so small that no sum of their products is rounded."""
    if exact:
        return integers((m, k), -2, 3, dtype), integers((n, k), -2, 3, dtype, seed=1)
    return normal((m, k), dtype), normal((n, k), dtype, seed=1)


def gemm_output(
    a: torch.Tensor,
    b: torch.Tensor,
    target: torch.dtype,
    exact: bool,
    bound: Callable = gemm_bound,
    **how: Any,
) -> Buffer:
    """What a @ b.T must be: to the last bit if `exact`, else within a bound."""
    a, b = a.double(), b.double()
    return output((a @ b.T).float().to(target), None if exact else bound(a, b, target), **how)


def gemm_buffers(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    target: torch.dtype,
    exact: bool,
    majors: str = "kk",
    bound: Callable = gemm_bound,
    **how: Any,
) -> tuple[Buffer, Buffer, Buffer]:
    """a (m, k), b (n, k) and c (m, n) = a @ b.T.

    Args:
        exact: see `gemm_operands`.
        majors: of a and of b: "k", K contiguous, or "m", the other dimension.
        bound: of c, if not exact.
        how: of each Buffer.
    """
    a, b = gemm_operands(m, n, k, dtype, exact)
    c = gemm_output(a, b, target, exact, bound, **how)
    a, b = (t if major == "k" else t.t().contiguous() for t, major in zip((a, b), majors, strict=True))
    return Buffer(a, **how), Buffer(b, **how), c
