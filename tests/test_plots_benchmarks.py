"""Figures of measured times: what is drawn is in a row, and a model says that it is one."""

from __future__ import annotations

import csv

import pytest

from dsv4lab import plots
from dsv4lab.bench import rows as written
from dsv4lab.plots import benchmarks
from dsv4lab.roofline import RATES, floor_seconds

H200, B200 = "NVIDIA H200", "NVIDIA B200"


def row(shape="1x64x32", backend="hopper", us=10.0, op="linear_w4a16", baseline=20.0, **more):
    tokens, k, n = (*map(int, shape.split("x")), 1)[:3]
    moved, flops = plots.linear_work(tokens, k, n)
    return {
        "op": op, "shape": shape, "backend": backend, "p50_us": us, "baseline_us": baseline, "bytes": moved,
        "flops": flops, "tflops": flops / us / 1e6, "tb_per_s": moved / us / 1e6, "share_of_floor": 0.5,
        "rotated_bytes": 2e8, "device": H200, "driver": "1.2", "date": "2026-11-21", **more,
    }  # fmt: skip


ROWS = [row(), row(backend="quack", us=15.0), row(backend="humming", us=12.0), row("16x64x32", us=11.0)]


def test_rows_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, written.HEADER, restval="")
        writer.writeheader()
        for us in (3.5, 4.5):  # the later one counts
            writer.writerow(
                {"op": "linear", "shape": "1x2x3", "backend": "a", "p50_us": us, "date": "2026-01-01"}
            )
    (found,) = plots.benchmark_rows(file)
    assert found["p50_us"] == 4.5 and found["p20_us"] is None and found["date"] == "2026-01-01"


def test_published_rows_say_where_and_when():
    found = plots.benchmark_rows()
    assert len(found) > 80
    for measured in found:
        assert measured["device"] and measured["driver"] and measured["date"] and measured["p50_us"] > 0
        assert measured["peer"] or measured["commit"], "neither a package's version nor a commit"
        floor = floor_seconds(measured["device"], measured["bytes"], measured["flops"] or 0) * 1e6
        assert measured["share_of_floor"] == pytest.approx(floor / measured["p50_us"], rel=2e-3)


def test_work_is_counted():
    assert plots.linear_work(2, 32, 16, 4.5, 16) == (
        16 * 32 * 4.5 / 8 + 2 * 32 * 2 + 2 * 2 * 16,
        2 * 2 * 32 * 16,
    )
    by_bytes, by_flops = plots.limits(2, 32, 16)
    moved, flops = plots.linear_work(2, 32, 16)
    assert (by_bytes, by_flops) == (moved / RATES[H200].copy * 1e6, flops / RATES[H200].bf16 * 1e6)
    assert plots.limits(2, 32, 16, B200, True)[1] == flops / RATES[B200].fp4 * 1e6
    assert plots.ridge(B200, True) == RATES[B200].fp4 / RATES[B200].copy


def test_series_and_speedups():
    series = plots.linear_series(ROWS, 64, 32)
    assert series == {
        "hopper": {1: 10, 16: 11},
        plots.BF16: {1: 20, 16: 20},
        "quack": {1: 15},
        "humming": {1: 12},
    }
    assert plots.speedup_table(ROWS, 1) == [("64 x 32", 2.0, 1.2)]
    assert plots.speedup_table(ROWS, 16) == [("64 x 32", 20 / 11, None)]  # of peers nothing is known
    assert plots.speedup_table(ROWS, 4) == []


def labels(picture) -> list[str]:
    return [text.get_text() for axes in picture.axes for text in axes.get_legend().get_texts()]


def test_what_is_a_model_says_so():
    roof = plots.roofline(ROWS)
    assert labels(roof) == ["H200", "B200, FP4, model", "hopper", "humming", "quack"]
    assert "B200: a model from NVIDIA's product data" in roof.caption
    marked = [line for line in roof.axes[0].lines if line.get_marker() not in (None, "None", "")]
    assert sum(len(line.get_xdata()) for line in marked) == len(ROWS)  # no more marks than rows
    assert plots.bound_by(16, device=B200).caption.startswith("A model, not a measurement: NVIDIA B200")
    assert "bound by bytes" in plots.bound_by(1).caption and "bound by flops" in plots.bound_by(4096).caption


def test_time_against_tokens_draws_every_row_and_the_floor():
    picture = plots.time_against_tokens(ROWS, 64, 32)
    lines = {line.get_label(): line for line in picture.axes[0].lines}
    assert list(lines) == ["hopper", "torch in bf16", "humming", "quack", "floor"]
    assert list(lines["hopper"].get_ydata()) == [10, 11] and lines["floor"].get_linestyle() == ":"
    assert "Measured on NVIDIA H200 (driver 1.2), 2026-11-21." in picture.caption


def test_bars_of_speedups_name_what_is_missing():
    drawn = [text.get_text() for text in plots.speedups(ROWS, 16).axes[0].texts]
    assert drawn == ["1.82", "not measured"]
    assert plots.speedups(ROWS, 4).caption.endswith("Nothing was measured yet.")


def test_quantizing_has_shares():
    table = plots.best_of_quantizing([row("16x64", op="dequantize"), *ROWS])
    assert [r[:2] for r in table.rows] == [("dequantize", "16x64")] and table.rows[0][-1] == "50%"


def layer_row(tokens, part, us, floor):
    return {"model": "flash", "tokens": float(tokens), "part": part, "p50_us": us, "floor_us": floor,
            "device": H200, "driver": "1.2", "date": "2026-11-21"}  # fmt: skip


def test_parts_of_a_layer_stand_on_each_other():
    found = [
        layer_row(t, part, us, 1.0) for t in (4, 1) for part, us in (("a", 3.0), ("b", 5.0), ("step", 9.0))
    ]
    assert plots.layer_parts(found, "flash") == {t: {"a": (3.0, 1.0), "b": (5.0, 1.0)} for t in (1, 4)}
    axes = plots.layer_bars(found, "flash").axes[0]
    tops = sorted((bar.get_x(), bar.get_y() + bar.get_height()) for bar in axes.patches)
    assert [top for _, top in tops] == [3, 8, 3, 8]
    assert [line.get_ydata()[0] for line in axes.lines] == [2, 2]  # the sum of floors
    with pytest.raises(ValueError, match=r"must hold parts of 'pro', got \['flash'\]"):
        plots.layer_bars(found, "pro")


def test_extremes_of_the_slider_are_drawn():
    for device in (H200, B200):
        for tokens, k, n in ((1, 3072, 1024), (4096, 16384, 16384)):
            assert plots.bound_by(tokens, k, n, device).png
    assert benchmarks.measured_on([]) == "Nothing was measured yet."
