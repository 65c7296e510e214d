"""Stands between operations and the kernels of a backend, and compares each call with what it should give."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import torch
from torch import Tensor

from dsv4lab.bench.checks import BF16_ULP, U_FP32, decode64
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.layouts import with_scale_layout
from dsv4lab.ops import OPS, Implementation, first_rows, use_backend


class Referee:
    """Checks calls as they happen.

    Every call is compared for the very operands that it got, so that errors, all within their bounds, do not
    add up from one operation to the next.

    Args:
        cases: the module gemm_cases.

    Attributes:
        calls: how often each operation was called.
        layouts: (operation, layouts of the block scales of both operands) of each product.
    """

    def __init__(self, cases: ModuleType) -> None:
        self.cases = cases
        self.calls: Counter[str] = Counter()
        self.layouts: set[tuple[str, str, str]] = set()
        self._real: Tensor | None = None  # rows of the latest product that are no padding

    def watch(self, patch, backend: str) -> None:
        """Look at all operations of a backend for as long as the pytest.MonkeyPatch lasts."""
        for name, op in OPS.items():
            if backend in op.implementations:
                patch.setitem(op.implementations, backend, self._watched(name, op, backend))

    def _watched(self, name: str, op, backend: str) -> Implementation:
        fill = op.implementations[backend].out

        def out(*args) -> None:
            fill(*args)
            self.calls[name] += 1
            with use_backend("reference"):
                self._check(name, args[: -op.returns], args[-op.returns :])

        def function(*args):
            results = op.fake(*args)
            out(*args, *(results if isinstance(results, tuple) else (results,)))
            return results

        return Implementation(function, out)

    def _check(self, name: str, args: tuple, outs: tuple[Tensor, ...]) -> None:
        if name.startswith("grouped_mm"):
            self.layouts.add((name, args[3], args[8]))
            self._product(name, args, outs)
        elif name == "swiglu_quantize":
            self._swiglu_quantize(args, outs)
        else:
            want = OPS[name].implementations["reference"].function(*args)
            for got, exact in zip(outs, want if isinstance(want, tuple) else (want,), strict=True):
                got = first_rows(got, exact.shape)
                assert torch.equal(_bits(got), _bits(exact)), f"{name}: other bits"

    def _product(self, name: str, args: tuple, outs: tuple[Tensor, ...]) -> None:
        a, b, where = self._operands(*args[:12])
        self._real = where.real
        if not a.rows:
            return
        exact = self.cases.product(a, b, where)
        if name == "grouped_mm":
            self.cases.check(outs[0], exact, where)
            return
        h, error = self.cases.swiglu(exact, args[12])
        if name == "grouped_mm_swiglu":
            off = (outs[0][: where.rows].double() - h).abs()
            assert (off <= error)[where.real].all(), f"{name}: off by {off[where.real].max():.3g}"
            return
        g, layout = args[13], args[14]
        q = with_scale_layout(NVFP4Tensor(*outs, g, layout, "tensor"), "linear")
        rows = where.real
        _quantized(q.codes[rows], q.block_scales[rows], g, h[rows], error[rows])
        assert not q.block_scales[~rows].view(torch.uint8).any(), f"{name}: scales in padding"

    def _operands(self, a, a_scales, g_a, a_layout, granularity, b, b_scales, g_b, b_layout, woven, offsets,
                  sizes):  # fmt: skip
        a = NVFP4Tensor(a, a_scales, g_a, a_layout, granularity)
        b = NVFP4Tensor(b, b_scales, g_b, b_layout, "group" if g_b.dim() else "tensor", woven)
        where = self.cases.one_group(a.rows)
        if offsets is not None:
            starts = [0, *offsets.tolist()]
            spans = [(i, starts[i], starts[i] + n) for i, n in enumerate(sizes.tolist())]
            where = self.cases.Groups(offsets, sizes, a.rows, spans)
        return with_scale_layout(a, "linear"), with_scale_layout(b, "linear"), where

    def _swiglu_quantize(self, args: tuple, outs: tuple[Tensor, ...]) -> None:
        gate_up, limit, woven, _, granularity, _, swizzled = args
        codes, scales, g = outs
        layout = "swizzled" if swizzled else "linear"
        q = with_scale_layout(NVFP4Tensor(codes, scales, g, layout, granularity), "linear")
        gate, up = gate_up.double().chunk(2, -1)
        assert not woven, "interleaved halves do not come here"
        if limit is not None:
            gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
        h = gate * torch.sigmoid(gate) * up
        real = self._real  # padding holds anything
        g = g[real] if granularity == "token" else g
        _quantized(q.codes[real], q.block_scales[real], g, h[real], h[real].abs() * BF16_ULP)


def _bits(t: Tensor) -> Tensor:
    """The bytes of a tensor, those of any NaN the same."""
    if t.is_floating_point() and t.dtype.itemsize > 1:
        t = torch.where(t.isnan(), torch.nan, t)
    return t.contiguous().view(-1).view(torch.uint8)


def _quantized(codes: Tensor, scales: Tensor, g: Tensor, h: Tensor, error: Tensor) -> None:
    """Refuse what is not h (rows, K) float64, known up to an error, under the global scale g.

    A block scale s is the nearest E4M3 of amax / 6 g, up to 448. A code is that of the value nearest to
    h / (s g); values are 1/2 apart up to 2, 1 up to 4, 2 up to 6, and beyond it saturates.
    """
    if not h.numel():
        return
    g = g.double().reshape(-1, 1) if g.dim() else g.double()
    amax, slack = (t.unflatten(-1, (-1, 16)).amax(-1) for t in (h.abs(), error))
    wanted, found = (amax / (6 * g)).clamp_max(448.0), scales.double()
    room = wanted * 8 * U_FP32 + slack / (6 * g)
    half = ((wanted + room).log2().floor().clamp_min(-6) - 4).exp2()  # of E4M3's unit in the last place
    assert ((found - wanted).abs() <= half + room).all(), "block scales"
    step = (found * g).repeat_interleave(16, -1)
    x = torch.where(step > 0, h.abs() / step, 0.0)
    gap = torch.where(x <= 2, 0.25, torch.where(x <= 4, 0.5, 1.0))
    off = (decode64(codes, scales) * g - h).abs()
    reach = torch.where(step > 0, step * torch.maximum(gap, x - 6), h.abs()) + error
    assert (off <= reach * (1 + 16 * U_FP32) + h.abs() * 16 * U_FP32).all(), "codes"
