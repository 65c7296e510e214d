"""Figures of the notebook on swizzled scales draw at their sliders' ends and say what is true."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from dsv4lab import plots
from dsv4lab.layouts import unswizzle_scales


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 4), (300, 10), (129, 5), (300, 256)])
def test_order_is_the_formulas(rows, columns):
    order = plots.scale_order(rows, columns)
    wide = -(-columns // 4) * 4
    assert len(order) == -(-rows // 128) * 128 * wide
    assert int((order >= 0).sum()) == rows * columns
    for r, c in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        offset = ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4
        assert int(order[offset]) == r * columns + c


def test_order_brings_back_what_was_swizzled():
    scales = torch.randint(0, 127, (200, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = plots.scale_order(200, 12)
    swizzled = torch.where(order >= 0, scales.flatten()[order], 0).to(torch.uint8).view(256, 12)
    assert torch.equal(unswizzle_scales(swizzled, 200, 12), scales)


def test_bits_of_one_chunk_are_turned_by_two():
    assert plots.scale_bits(128, 4) == [0, 1, 4, 5, 6, 7, 8, 2, 3]
    assert plots.scale_bits(256, 8) == [0, 1, 9, 4, 5, 6, 7, 8, 2, 3, 10]
    for rows, columns in ((96, 4), (128, 6), (64, 64), (128, 2)):
        with pytest.raises(ValueError, match="powers of two"):
            plots.scale_bits(rows, columns)


@pytest.mark.parametrize("rows, columns", [(128, 4), (512, 64), (256, 256)])
def test_address_bits_have_a_box_and_an_arrow_each(rows, columns):
    (axes,) = drawn(plots.address_bits(rows, columns)).axes
    bits = (rows * columns).bit_length() - 1
    assert len(axes.patches) == 2 * bits
    names = [text.get_text() for text in axes.texts if text.get_text()]
    assert sorted(names) == sorted(2 * [f"r{i}" for i in range(rows.bit_length() - 1)]
                                   + 2 * [f"c{i}" for i in range(columns.bit_length() - 1)])  # fmt: skip


@pytest.mark.parametrize("row", [0, 77, 299])
@pytest.mark.parametrize("column", [0, 6, 9])
def test_a_cells_offset_leads_back_to_it(row, column):
    there = drawn(plots.scale_cell(row, column))
    offset = int(re.search(r"= (\d+)\.", there.caption)[1])
    back = drawn(plots.scale_byte(offset))
    assert f"row {row}, column {column} is byte" in back.caption
    for picture in (there, back):
        matrix, _, memory = picture.axes
        assert [float(v[0]) for v in matrix.lines[-1].get_data()] == [column + 0.5, row + 0.5]
        frame = max(memory.patches, key=lambda p: p.get_zorder())
        assert (frame.get_x(), frame.get_y()) == (offset % 16, offset % 512 // 16)


@pytest.mark.parametrize(
    "offset, padding", [(0, False), (2 * 512 + 1, False), (2 * 512 + 2, True), (4607, True)]
)
def test_padding_is_called_so(offset, padding):
    assert ("It is padding" in drawn(plots.scale_byte(offset)).caption) is padding


def test_tile_and_stations_draw():
    drawn(plots.scale_tile())
    order = plots.scale_order(128, 4).view(32, 16)
    places = {"matrix": torch.arange(512).view(128, 4), "memory": order, "tensor memory": order.repeat(4, 1)}
    for row in (0, 77, 127):
        *panels, _ = drawn(plots.scale_stations(places, row)).axes
        frames = [panel.patches for panel in panels]
        assert [len(f) for f in frames] == [2, 2, 8]  # light and dark, and four copies
        for name, panel in zip(places, panels, strict=True):
            x, y = panel.patches[0].get_xy()
            found = torch.as_tensor(places[name])[round(y + 0.5), round(x + 0.5) : round(x + 0.5) + 4]
            assert found.tolist() == [4 * row + i for i in range(4)]


def test_reads_by_hand():
    rows = plots.scale_reads(256).rows
    assert rows[0] == (64, 512, 128, 128 * 32, 1, 512)
    assert rows[-1] == (512, 4096, 128, 4096, 1, 4096)
    assert plots.scale_reads(4, (64,)).rows == [(64, 512, 1, 512, 1, 512)]  # K = 64: the rows touch


@pytest.mark.parametrize("tokens, times", [(1, "128"), (128, "1"), (129, "1.98"), (4096, "1")])
@pytest.mark.parametrize("k", [64, 7168])
def test_padding_at_the_sliders_ends(tokens, times, k):
    picture = drawn(plots.scale_padding(tokens, k))
    assert f"columns, {times} times as many" in picture.caption
    bars, curve = picture.axes
    widths = [patch.get_width() * 1e3 for patch in bars.patches]
    assert widths[:2] == pytest.approx([tokens * k / 2, tokens * k / 16])
    assert float(curve.lines[1].get_ydata()[0]) == pytest.approx(8 * sum(widths) / (tokens * k))
