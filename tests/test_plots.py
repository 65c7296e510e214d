"""Figures draw at the extremes that notebooks can pass, say what they show, and can be read in any theme."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from dsv4lab import plots
from dsv4lab.plots import style
from dsv4lab.quantize import quantize_nvfp4

BLOCK = torch.tensor([0.1, -0.4, 0.9, 1.7, -2.6, 0.03, 5.3, -1.2, 0.6, 3.1, -0.22, 0.0, 2.1, -4.4, 1.3, 0.45])


@pytest.fixture(scope="module")
def rows():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def some_logits():
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


def drawn(picture: plots.Picture) -> plots.Picture:
    """Renders with warnings (missing glyphs, layouts that do not fit) as errors, and checks the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    for axes in picture.axes:
        assert axes.get_xlabel() or axes.get_title("left")
    return picture


def lines(axes) -> dict[str, list[float]]:
    """The y values of each line that has a name of its own."""
    return {
        line.get_label(): list(line.get_ydata())
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_number_lines_show_every_value():
    codes, scales = drawn(plots.number_lines()).axes
    points = {float(x) for line in codes.lines[:2] for x in line.get_xdata()}
    assert sorted(points) == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert {text.get_text() for text in codes.texts} == set("0123456789ABCDEF") - {"8"}
    values = sorted(float(x) for line in scales.lines for x in line.get_xdata())
    assert len(values) == 126 and values[0] == 2.0**-9 and values[-1] == 448


@pytest.mark.parametrize("value", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize("outlier", [3.0, 200.0])
@pytest.mark.parametrize("scale", [1 / 16, 1.0, 65536.0])
def test_edited_block_at_the_sliders_ends(value, outlier, scale):
    drawn(plots.edited_block(BLOCK, value, outlier, scale))


def test_block_shows_what_the_library_decodes():
    (axes,) = drawn(plots.block(BLOCK, 0.01)).axes
    decoded = dict(lines(axes))["decoded"]
    assert decoded[6] == pytest.approx(6 * 88 * 0.01) and decoded[5] == 0
    assert "4 of 16 codes are zero" in axes.get_title("left")


@pytest.mark.parametrize("x", [torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), 3e38)])
def test_block_of_extreme_values(x):
    drawn(plots.block(x))


def test_edited_block_leaves_its_input_alone():
    before = BLOCK.clone()
    plots.edited_block(BLOCK, 9.0, 9.0, 1.0)
    assert torch.equal(BLOCK, before)


def test_block_codes_are_in_order_of_k():
    x = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6])
    assert plots.block_codes(quantize_nvfp4(x, 1.0)) == [*range(8), *range(9, 16), 7]


def test_sqnr_against_known_values():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert plots.sqnr_db(x, x * 0.9).item() == pytest.approx(20, abs=1e-5)
    assert plots.sqnr_db(x, x * 0, dim=-1).tolist() == [0, 0]
    assert plots.sqnr_db(x, x).item() == float("inf")


def test_sqnr_against_scale_clips_left_and_holds_right(rows):
    (axes,) = drawn(plots.sqnr_against_scale({"normal": rows, "constant": torch.ones(1, 16)})).axes
    level = lines(axes)["normal"]
    assert level[0] < 2 and level[-1] == 0  # a hundred times too small; ten million times too large
    flat = level[14:34]  # 1.3 to 1260 times amax / 2688
    assert max(flat) - min(flat) < 1 and min(flat) > 19


@pytest.mark.parametrize("factor", [1 / 64, 0.5, 4.0, 64.0])
def test_saturation_at_the_sliders_ends(rows, factor):
    curve, bars = drawn(plots.saturation(rows, (1.0, 0.25, factor))).axes
    top = max(lines(curve)["1/4"])
    assert top == pytest.approx(float(rows.abs().max()) / 4, rel=1e-3)
    assert len(bars.patches) == 3


def test_policies_draw_one_point_a_token(rows):
    (axes,) = drawn(
        plots.policies(rows, {"tensor": "tensor", "token": "token", "callable": lambda x: torch.tensor(0.01)})
    ).axes
    assert [len(y) for y in lines(axes).values()] == [8, 8, 8]


def test_staircase_shades_the_difference():
    def shaded(second) -> list[tuple[float, float]]:
        (axes,) = drawn(plots.staircase({"a": torch.round, "b": second})).axes
        parts = [p.vertices[:, 0] for c in axes.collections for p in c.get_paths() if len(p.vertices)]
        return [(float(x.min()), float(x.max())) for x in parts]

    assert shaded(torch.round) == []
    found = torch.tensor(shaded(torch.floor))
    assert torch.allclose(found, torch.tensor([(n + 0.5, n + 1.0) for n in range(6)]), atol=2e-3)


@pytest.mark.parametrize("values", [[20.0], [30.0, 20.0, -5.0], [0.0, 0.0]])
def test_sqnr_by_layer(values):
    (axes,) = drawn(plots.sqnr_by_layer({"all": values, "one": values}, ["csa"] * len(values))).axes
    assert lines(axes)["all"] == values


def test_agreement_by_margin(some_logits):
    other = some_logits.flip(-1)
    (axes,) = drawn(plots.agreement_by_margin(some_logits, some_logits)).axes
    assert [bar.get_height() for bar in axes.patches] == [100] * 8
    (axes,) = drawn(plots.agreement_by_margin(some_logits, other)).axes
    assert max(bar.get_height() for bar in axes.patches) < 100
    drawn(plots.agreement_by_margin(some_logits[:3], other[:3]))  # fewer tokens than bins


def test_logits_slope(some_logits):
    picture = drawn(plots.logits(some_logits, {"same": some_logits, "half": some_logits / 2 + 3}))
    assert [axes.get_title("left") for axes in picture.axes] == ["same\nslope 1.00", "half\nslope 0.50"]
    drawn(plots.logits(some_logits, {"zero": some_logits * 0}, points=1))


def test_code_use_counts_codes(rows):
    left, right = drawn(plots.code_use(quantize_nvfp4(rows, "tensor"), "x")).axes
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(100, abs=1e-3)
    assert sum(bar.get_height() for bar in right.patches) == 8 * 64 / 16
    drawn(plots.code_use(quantize_nvfp4(torch.zeros(2, 32), "tensor")))
    swizzled = quantize_nvfp4(rows, "tensor", scale_layout="swizzled")
    assert sum(bar.get_height() for bar in drawn(plots.code_use(swizzled)).axes[1].patches) == 32


def test_bars(rows):
    (axes,) = drawn(plots.bars({"a": 1.0, "b": 0.0}, "dB", "A caption.", ("all", 2.0))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    drawn(plots.bars({"a": -1.0}, "dB", "A caption."))


def test_figures_carry_their_caption_and_escape_it():
    picture = plots.bars({"a": 1.0}, "dB", 'a < b & "c".')
    bundle = picture._repr_mimebundle_()
    assert "<figcaption><em>a &lt; b &amp; &quot;c&quot;.</em></figcaption>" in bundle["text/html"]
    assert bundle["text/plain"] == '[figure] a < b & "c".'


def test_figures_leave_no_global_state():
    # reading rcParams["backend"] would import pyplot by itself
    code = (
        "import sys, matplotlib as m; keep = [k for k in m.rcParams.keys() if k != 'backend'];"
        "before = [m.rcParams[k] for k in keep]; from dsv4lab import plots; plots.number_lines().png;"
        "assert 'matplotlib.pyplot' not in sys.modules; assert before == [m.rcParams[k] for k in keep]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_can_be_read():
    """WCAG 2.1: 7:1 and 4.5:1 for text, 3:1 for graphics. The card is opaque, so the theme is no matter."""
    assert contrast(style.INK, style.CARD) >= 7 and contrast(style.MUTED, style.CARD) >= 4.5
    assert all(contrast(colour, style.CARD) >= 3 for colour, *_ in style.SERIES)
    assert plots.number_lines().figure.get_facecolor()[3] == 1


def test_series_differ_without_colour():
    markers, styles = [s[1] for s in style.SERIES], [s[2] for s in style.SERIES]
    assert len(set(markers)) == len(set(styles)) == len(style.SERIES)


def test_table_as_text_and_html():
    table = plots.Table(["name", "dB"], [("a<b", 20.1234), ("c", 12345.6)], "A caption.")
    assert repr(table).splitlines() == ["name  dB    ", "a<b   20.1  ", "c     12,346", "A caption."]
    assert '<td style="text-align:left">a&lt;b</td>' in table._repr_html_()
    with pytest.raises(ValueError, match="each row needs 2 values"):
        plots.Table(["a", "b"], [(1,)])


def test_backends_say_why_not():
    rows = {row[0]: row[1:] for row in plots.backends().rows}
    assert rows["reference"] == ("yes", "")
    assert all(runs == "yes" or reason for runs, reason in rows.values())


def test_conventions_of_the_presets(rows):
    table = plots.conventions(torch.cat([rows, rows * 1e-6]))
    found = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert found["dsv4lab"]["bytes unlike ours (%)"] == "0.0"
    assert float(found["original"]["bytes unlike ours (%)"]) > 1
    assert found["flashinfer"]["g is"] == "encode"
    assert [found[n]["least scale"] for n in ("dsv4lab", "original", "torchao")] == [
        "2^-9, rounded",
        "2^-9, lower become 0",
        "2^-6, lower are raised",
    ]


def test_texts_mark_where_they_part():
    texts = plots.Texts("def ", {"bf16": "f(x): <1>", "nvfp4": "f(y): <1>", "short": "f("})
    assert [texts.same(name) for name in texts.texts] == [9, 2, 2]
    assert "f(<u>y): &lt;1&gt;</u>" in texts._repr_html_()
    assert "--- bf16\n" in repr(texts) and "--- nvfp4: 2 of 9 characters as the first\n" in repr(texts)
    plots.Texts("", {"empty": ""})._repr_html_()
