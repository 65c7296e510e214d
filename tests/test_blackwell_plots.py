"""Figures about a Blackwell kernel's data: what is drawn is where it is."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from dsv4lab import plots


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    for axes in picture.axes:
        assert axes.get_xlabel() or axes.get_title("left") or axes.get_ylabel()
    return picture


def load(start, at, address, shape, box, cta=0):
    detail = {"map": SimpleNamespace(address=address, shape=shape, box=box), "at": at}
    return SimpleNamespace(kind="tma", cta=cta, start=start, line=start, detail=detail)


@pytest.fixture
def loads():
    """Two steps of two CTAs: codes 40 x 96 by boxes of 32 x 64, scales of 2 x 3 chunks by boxes of 1 x 2."""
    codes, scales = ((96, 40), (64, 32)), ((256, 3, 2), (256, 2, 1))
    return [
        load(1, (0, 0), 0xA, *codes),
        load(2, (0, 0, 0), 0xB, *scales),
        load(3, (64, 0), 0xA, *codes),
        load(4, (0, 2, 0), 0xB, *scales),
        load(5, (0, 32), 0xA, *codes, cta=1),
        SimpleNamespace(kind="mma", cta=0, start=0),
    ]


def frames(axes) -> list[tuple[float, ...]]:
    """x, y, width and height of each rectangle."""
    found = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [(*p.get_xy(), p.get_width(), p.get_height()) for p in found]


def test_boxes_lie_at_their_coordinates(loads):
    codes, scales = (axes for axes in drawn(plots.tma_boxes(loads, ["codes", "scales"], (0, 1))).axes)
    tensor, *boxes = frames(codes)
    assert tensor == (0, 0, 96, 40)
    for (x, y, w, h), (left, top) in zip(boxes, [(0, 0), (64, 0), (0, 32)], strict=True):
        assert left < x and x + w < left + 64 and top < y and y + h < top + 32
        assert w > 0.9 * 64 - 2 and h > 0.9 * 32 - 2
    assert codes.get_title("left") == "codes: box of 32 x 64 in 40 x 96"
    assert codes.get_ylim()[0] > 64, "the box of CTA 1 reaches beyond the tensor"
    assert [text.get_text() for text in codes.texts] == ["0", "1", "0"]
    assert frames(scales)[0] == (0, 0, 3, 2)
    legend = [text.get_text() for text in codes.figure.legends[0].get_texts()]
    assert legend == ["CTA 0", "CTA 1"]


def test_boxes_of_one_cta(loads):
    codes, _ = drawn(plots.tma_boxes(loads, ["codes", "scales"])).axes
    assert len(frames(codes)) == 3


def test_a_name_for_each_tensor(loads):
    with pytest.raises(ValueError, match="zip"):
        plots.tma_boxes(loads, ["codes"])


def test_chunks_stand_in_their_banks():
    place = np.arange(8) ^ np.arange(4)[:, None]
    plain, swizzled = drawn(plots.shared_lines({"plain": [range(8)] * 4, "swizzled": place}, marked=2)).axes
    cells = {tuple(round(v - 0.5) for v in t.get_position()): t.get_text() for t in swizzled.texts}
    assert cells[2, 0] == "64" and cells[3, 1] == "64" and cells[0, 2] == "64" and cells[1, 3] == "64"
    marked = [(x, y) for x, y, *_ in frames(swizzled)[0:] if frames(swizzled).count((x, y, 1, 1)) == 2]
    assert sorted(set(marked)) == [(0, 2), (1, 3), (2, 0), (3, 1)]
    assert {t.get_position()[0] for t in plain.texts if t.get_text() == "64"} == {2.5}


def test_tensor_memory_shows_each_region():
    scales = np.arange(512.0).reshape(32, 16)
    picture = drawn(plots.tensor_memory({"sums": (0, 128), "scales": (128, 16)}, scales))
    whole, close = picture.axes[:2]
    assert frames(whole) == [(0, 0, 256, 128), (0, 0, 128, 128), (128, 0, 16, 128)]
    assert np.array_equal(close.images[0].get_array(), scales)
    assert [t.get_text().split("\n")[1] for t in close.get_xticklabels()] == [
        "rows 0–31", "rows 32–63", "rows 64–95", "rows 96–127"
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_matrices_share_a_scale(count):
    states = {f"m{i}": np.full((6, 8), float(i)) for i in range(count)}
    picture = drawn(plots.matrices(states, "A caption."))
    images = [axes.images[0] for axes in picture.axes if axes.images]
    assert [axes.get_title("left") for axes in picture.axes if axes.images] == list(states)
    assert {image.get_clim() for image in images} == {(-max(count - 1.0, 1e-30), max(count - 1.0, 1e-30))}
