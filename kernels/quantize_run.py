"""Host side of the kernel of rows: from the operations' tensors to forms, grids and launches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import cutlass
import torch
from dsv4lab.kernels import quantize_plan as plan
from dsv4lab.kernels.launch import As, launch, target
from dsv4lab.kernels.quantize_form import Form
from dsv4lab.kernels.quantize_rows import make_quantize_rows
from torch import Tensor

from dsv4lab.formats import BLOCK, ceil_to, scales_shape
from dsv4lab.ops import first_rows
from dsv4lab.quantize_ops import scale_shape

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_MAX_ROWS = 2**31 - 2**12  # so that a row's number, past the last one's team too, is an int32
_MAX_COLUMNS = 2**24  # so that a row's swizzled scales are apart by an int32


@dataclass(frozen=True)
class Source:
    """What is quantized: tensors as the operations take them, and the shape (*lead, K) of the result."""

    kind: str
    x: Tensor
    shape: tuple[int, ...]
    mix: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0
    limit: float | None = None
    interleaved: bool = False

    def form(self) -> dict:
        """The fields of Form that depend on it alone."""
        fields = {"arch": target(self.x.device), "source": self.kind, "element": ELEMENTS[self.x.dtype]}
        if self.kind == "mhc":
            fields |= {"streams": self.x.shape[-2], "mix": ELEMENTS[self.mix.dtype]}
        if self.weight is not None:
            fields["weight"] = ELEMENTS[self.weight.dtype]
        if self.kind == "swiglu":
            limit = math.inf if self.limit is None else self.limit
            fields |= {
                "clamped": self.limit is not None,
                "wide": limit > 2.0**64,
                "tame": limit <= 64 and self.x.dtype == torch.bfloat16 and _is_bf16(limit),
                "interleaved": self.interleaved,
            }
        return fields


def _is_bf16(x: float) -> bool:
    return torch.tensor(x, dtype=torch.bfloat16).item() == x


@dataclass(frozen=True)
class Rows:
    """The shape of a result as the kernel has it: matrices of rows of blocks."""

    matrices: int
    rows: int
    columns: int

    @staticmethod
    def of(shape: tuple[int, ...], apart: bool) -> Rows:
        """Of (*lead, K): one matrix of all rows, or one for each index of the first of several dimensions.

        Raises:
            ValueError: rows or columns cannot be counted in 32 bits.
        """
        *lead, k = shape
        matrices = lead[0] if apart and len(lead) > 1 else 1
        rows = math.prod(lead[1:] if apart and len(lead) > 1 else lead)
        if max(rows, matrices) > _MAX_ROWS or k // BLOCK > _MAX_COLUMNS:
            raise ValueError(f"kernels count up to {_MAX_ROWS} rows of {_MAX_COLUMNS} blocks, got {shape}")
        return Rows(matrices, rows, k // BLOCK)


def kernel_input(t: Tensor) -> Tensor:
    """The tensor itself, or a copy as kernels take it: contiguous, from a multiple of 16 bytes on, float32
    for float64."""
    t = t.detach()
    if t.dtype == torch.float64:
        t = t.float()
    t = t.contiguous()
    return t.clone() if t.numel() and t.data_ptr() % 16 else t


class Outputs:
    """The tensors an operation fills: those given, or stand-ins for those that kernels cannot write to."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def take(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What a kernel writes for out[:rows]."""
        wanted = first_rows(out, shape)
        if wanted.is_contiguous() and (not wanted.numel() or wanted.data_ptr() % 16 == 0):
            return wanted
        self._copies.append((wanted, torch.empty(shape, dtype=out.dtype, device=out.device)))
        return self._copies[-1][1]

    def finish(self) -> None:
        """Copy where there are stand-ins."""
        for wanted, made in self._copies:
            wanted.copy_(made)


def quantize_source(
    source: Source,
    g: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
    codes: Tensor,
    scales: Tensor,
    g_out: Tensor,
    rrms: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Quantize what a source gives; the outputs may have more rows.

    Args:
        g, granularity, divisor, swizzled: as of the operations.
        rrms: (*lead) float32, for norms.
        kept: (*lead, K) bf16, the values that are quantized; for tests.
    """
    shape, layout = source.shape, "swizzled" if swizzled else "linear"
    lead = shape[:-1]
    outputs = Outputs()
    codes = outputs.take(codes, (*lead, shape[-1] // 2))
    scales = outputs.take(scales, scales_shape(shape, layout))
    g_out = outputs.take(g_out, scale_shape(g, granularity, shape))
    rrms = None if rrms is None else outputs.take(rrms, lead)
    call = _Call(source, granularity, divisor, swizzled, codes, scales, g_out, rrms, kept)
    if g is not None:
        call.known(kernel_input(g))
    elif granularity == "token":
        call.row()
    else:
        call.shared()
    outputs.finish()


def write_scale(source: Source, granularity: str, divisor: float, g: Tensor) -> None:
    """Only the global scale of a runtime policy."""
    outputs = Outputs()
    out = outputs.take(g, scale_shape(None, granularity, source.shape))
    call = _Call(source, granularity, divisor, False, None, None, out, None, None)
    call.row() if granularity == "token" else call.shared()
    outputs.finish()


class _Call:
    """One call of an operation: the launches of each policy."""

    def __init__(self, source, granularity, divisor, swizzled, codes, scales, g, rrms, kept) -> None:
        shape, device = source.shape, source.x.device
        apart = granularity == "group" or (swizzled and len(shape) == 3)
        self.of = granularity
        self.size = Rows.of(shape, (apart and math.prod(shape[:-1]) > 0) or granularity == "group")
        self.source = dataclasses.replace(source, x=kernel_input(source.x))
        self.fields = self.source.form() | {"swizzled": swizzled, "keeps": kept is not None}
        self.codes, self.scales, self.g, self.rrms, self.kept = codes, scales, g, rrms, kept
        self.granularity, self.divisor = granularity, divisor
        self.output = "scale" if codes is None else "codes"
        self.sm_count = plan.sm_count(device)

    @property
    def kind(self) -> str:
        return self.source.kind

    def known(self, g: Tensor) -> None:
        """One launch with a known scale."""
        of = "halves" if g.dim() == 2 and self.granularity == "group" else self.granularity
        if g.numel():  # else there are no rows or groups
            self._rows_launch("known", of, g, g.numel())

    def row(self) -> None:
        """One launch in which each row makes its scale."""
        self._rows_launch("row", "token", None, 0)

    def shared(self) -> None:
        """A tensor's or group's scale: one launch where a cluster has all that it is of, else two."""
        size = self.size
        alone = self.granularity == "group" or size.matrices == 1
        teams = plan.cluster_teams(self.kind, size.rows, self._covered()) if alone else None
        if teams is not None:
            self._launch(teams, "cluster", self.granularity, None, 0, teams.cluster, self.output)
            return
        parts, count = self._parts()
        if self.output == "scale":
            from dsv4lab.kernels.amax import largest_parts

            largest_parts(parts, count, self.divisor, self.g)
            return
        self._rows_launch("partials", self.granularity, parts, count)

    def _parts(self) -> tuple[Tensor, int]:
        """The amax of each CTA's rows, (matrices, parts) words, by the first of two launches.

        This is the workspace of the policies "tensor" and "group": up to 2 KB a scale, of torch's allocator.
        """
        size = Rows.of(self.source.shape, self.granularity == "group")
        teams = plan.amax_teams(self.kind, size.rows, size.columns)
        count = plan.parts(teams, size.rows, size.matrices, self.sm_count)
        parts = torch.empty((size.matrices, count), dtype=torch.int32, device=self.source.x.device)
        codes, self.codes, whole, self.size = self.codes, parts, self.size, size
        self._launch(teams, "none", self.granularity, None, 0, count, "partials")
        self.codes, self.size = codes, whole
        return parts, count

    def _rows_launch(self, scale: str, of: str, known: Tensor | None, count: int) -> None:
        size = self.size
        teams = plan.row_teams(self.kind, size.rows * size.matrices, self._covered(), self.sm_count)
        pads = plan.pad_chunks(size.rows, size.columns) if self.fields["swizzled"] else 0
        ctas = plan.grid(self.kind, teams, size.rows, pads, self.sm_count)
        self._launch(teams, scale, of, known, count, ctas, self.output)

    def _covered(self) -> int:
        """Blocks of a row for which a thread must stand: also where only a zero scale is written."""
        return ceil_to(self.size.columns, 4) if self.fields["swizzled"] else self.size.columns

    def _launch(self, teams, scale, of, known, count, grid_x, output) -> None:
        size, source = self.size, self.source
        if size.matrices == 0:
            return
        fields = self.fields if output == "codes" else self.fields | {"swizzled": False, "keeps": False}
        many = size.matrices != 1
        form = Form(**fields, **vars_of(teams), scale=scale, of=of, output=output, matrices=many)
        tiles = -(-size.rows // teams.teams)
        pads = plan.pad_chunks(size.rows, size.columns) if form.swizzled else 0
        scales = None if self.scales is None else As(self.scales, cutlass.Uint8)
        limit = 0.0 if source.limit is None else float(source.limit)
        launch(make_quantize_rows, (form,), [
            _words(source.x), source.mix, _words(source.weight),
            _words(known) if scale == "partials" else known,
            _words(self.codes), scales, self.g, self.rrms, _words(self.kept),
            size.matrices, size.rows, size.columns, tiles, count, pads, grid_x,
            min(size.matrices, plan.MAX_GRID_Y), float(self.divisor), float(source.eps), limit,
        ])  # fmt: skip


def vars_of(teams: plan.Teams) -> dict:
    """The fields of a dataclass, by name."""
    return {field.name: getattr(teams, field.name) for field in dataclasses.fields(teams)}


def _words(t: Tensor | None) -> As | None:
    return None if t is None else As(t, cutlass.Uint32)
