"""Layouts are bijections that equal their formulas, for tensors and for whole operands."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dsv4lab import layouts
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.layouts import deinterleave_gate_up, interleave_gate_up, swizzle_scales, unswizzle_scales
from dsv4lab.ops import OPS
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4, quantize_weight


def offset(r: int, c: int, columns: int) -> int:
    """The format's definition, for C padded columns."""
    return ((r // 128) * (columns // 4) + c // 4) * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4


def byte(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 16, 18])
def test_every_scale_stands_where_the_formula_says(rows, columns):
    padded_rows, padded_columns = -(-rows // 128) * 128, -(-columns // 4) * 4
    where = np.array([[offset(r, c, padded_columns) for c in range(columns)] for r in range(rows)])
    assert len(np.unique(where)) == rows * columns  # no two scales share a byte
    assert where.max() < padded_rows * padded_columns
    for seed in range(2):  # random bytes that are never 0, so that padding shows
        generator = torch.Generator().manual_seed(seed)
        scales = torch.randint(1, 256, (rows, columns), dtype=torch.uint8, generator=generator)
        swizzled = swizzle_scales(scales)
        assert swizzled.shape == (padded_rows, padded_columns)
        flat = swizzled.flatten().numpy()
        np.testing.assert_array_equal(flat[where], scales.numpy())
        assert np.count_nonzero(flat) == rows * columns  # padding is zero
        assert torch.equal(unswizzle_scales(swizzled, rows, columns), scales)


def test_whole_tiles_are_permuted_completely():
    """256 x 8 positions as numbers: each byte of the result names another source."""
    index = torch.arange(256 * 8).reshape(256, 8)
    low, high = swizzle_scales((index % 256).byte()), swizzle_scales((index // 256).byte())
    source = (low.int() + 256 * high.int()).flatten()
    assert torch.equal(source.sort().values, torch.arange(2048, dtype=torch.int32))
    assert source[:6].tolist() == [0, 1, 2, 3, 32 * 8, 32 * 8 + 1]  # four rows 32 apart, four columns each


def test_groups_are_swizzled_one_by_one_and_dtypes_stay():
    scales = torch.randint(0, 127, (3, 130, 5), dtype=torch.uint8)
    for given in (scales, scales.view(torch.float8_e4m3fn)):
        swizzled = swizzle_scales(given)
        assert swizzled.dtype == given.dtype and swizzled.shape == (3, 256, 8)
        for i in range(3):
            assert torch.equal(byte(swizzled[i]), byte(swizzle_scales(given[i])))
        assert torch.equal(byte(unswizzle_scales(swizzled, 130, 5)), byte(given))
    transposed = scales.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(swizzle_scales(transposed), swizzle_scales(scales))


def test_empty_scales():
    assert swizzle_scales(torch.zeros(0, 4, dtype=torch.uint8)).shape == (0, 4)
    assert unswizzle_scales(torch.zeros(2, 0, 4, dtype=torch.uint8), 0, 3).shape == (2, 0, 3)


def test_out_with_spare_rows():
    scales = torch.randint(1, 256, (100, 6), dtype=torch.uint8)
    out = torch.full((384, 8), 9, dtype=torch.uint8)
    got = swizzle_scales(scales, out=out)
    assert torch.equal(got, swizzle_scales(scales)) and out[128:].eq(9).all()
    back = torch.zeros(150, 6, dtype=torch.uint8)
    assert torch.equal(unswizzle_scales(got, 100, 6, out=back), scales) and back[100:].eq(0).all()


# ---------------------------------------------------------------- gate and up


def test_interleave_by_hand():
    gate, up = [f"g{i}" for i in range(16)], [f"u{i}" for i in range(16)]
    names = np.array(gate + up)
    moved = interleave_gate_up(torch.arange(32), dim=0).numpy()
    assert names[moved].tolist() == gate[:8] + up[:8] + gate[8:] + up[8:]


@pytest.mark.parametrize("shape", [(16, 3), (48, 4), (2, 160, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_deinterleave_is_the_inverse(shape, dtype):
    t = torch.randint(0, 255, shape).to(dtype)
    moved = interleave_gate_up(t)
    assert torch.equal(deinterleave_gate_up(moved), t)
    gate, up = t.chunk(2, -2)
    for i in range(shape[-2]):
        source = (gate, up)[i // 8 % 2][..., i // 16 * 8 + i % 8, :]
        assert torch.equal(moved[..., i, :], source)


def gate_up_weight(groups=(), g=None, scale_layout="linear") -> tuple[torch.Tensor, NVFP4Tensor]:
    """Rows of very different magnitude, so that a scale in a wrong row is seen."""
    w = torch.randn(*groups, 48, 64) * torch.exp2(torch.arange(48) % 12 - 6.0)[:, None]
    return w, quantize_weight(w, global_scale="tensor" if g is None else g, scale_layout=scale_layout)


@pytest.mark.parametrize("scale_layout", ["linear", "swizzled"])
@pytest.mark.parametrize(
    ("groups", "g"),
    [((), None), ((3,), None), ((3,), torch.tensor([[0.1, 1.0], [2.0, 0.3], [0.5, 0.5]]))],
)
def test_interleaved_operand_decodes_to_interleaved_rows(groups, g, scale_layout):
    _, t = gate_up_weight(groups, g, scale_layout)
    moved = interleave_gate_up(t)
    assert moved.interleaved and moved.scale_layout == scale_layout
    expected = interleave_gate_up(dequantize_nvfp4(t, torch.float32))
    assert torch.equal(dequantize_nvfp4(moved, torch.float32), expected)
    back = deinterleave_gate_up(moved)
    assert not back.interleaved and torch.equal(back.codes, t.codes)
    assert torch.equal(byte(back.block_scales), byte(t.block_scales))


def test_interleave_moves_token_scales_too():
    t = quantize_nvfp4(torch.randn(2, 48, 32) * torch.rand(48, 1), "token")
    moved = interleave_gate_up(t)
    assert torch.equal(dequantize_nvfp4(moved), interleave_gate_up(dequantize_nvfp4(t)))


def test_defect_6_scales_of_another_granularity_are_seen():
    """Scales left in place, or interleaved by 1, 16 or 128 rows, decode to something else; not by 8."""
    w = torch.randn(512, 64) * torch.exp2(torch.arange(512) % 12 - 6.0)[:, None]
    t = quantize_weight(w)
    moved, expected = interleave_gate_up(t), interleave_gate_up(dequantize_nvfp4(t))
    scales = byte(t.block_scales)

    def decoded(wrong: torch.Tensor) -> torch.Tensor:
        return dequantize_nvfp4(moved.with_(block_scales=wrong.contiguous().view(torch.float8_e4m3fn)))

    for rows in (8, 1, 16, 128):
        other = scales.view(2, 256 // rows, rows, 4).transpose(0, 1).reshape(512, 4)
        assert torch.equal(decoded(other), expected) == (rows == 8)
    assert not torch.equal(decoded(scales), expected)


def test_a_tensor_knows_whether_it_is_interleaved():
    t = gate_up_weight()[1]
    with pytest.raises(ValueError, match="t is not interleaved"):
        deinterleave_gate_up(t)
    with pytest.raises(ValueError, match="t is already interleaved"):
        interleave_gate_up(interleave_gate_up(t))


def test_gate_and_up_scales_of_an_interleaved_weight():
    """(G, 2): the first is for gate rows wherever they stand."""
    w = torch.full((1, 32, 16), 6.0)
    t = quantize_weight(w, global_scale=torch.tensor([[1.0, 0.25]]))
    wrong = t.with_(global_scale=torch.tensor([[2.0, 0.25]]))  # doubles the gate rows only
    assert dequantize_nvfp4(wrong)[0, :, 0].tolist() == [12.0] * 16 + [6.0] * 16
    assert dequantize_nvfp4(interleave_gate_up(wrong))[0, :, 0].tolist() == ([12.0] * 8 + [6.0] * 8) * 2


# ---------------------------------------------------------------- other layouts


def test_k_packed_import_gives_equal_bytes():
    for w in (torch.randn(24, 64), torch.randn(3, 24, 64)):
        t = quantize_weight(w, global_scale="group" if w.dim() == 3 else "tensor")
        codes = t.codes.transpose(-1, -2).contiguous()
        scales = byte(t.block_scales).transpose(-1, -2).contiguous().view(torch.float8_e4m3fn)
        back = layouts.from_k_packed(codes, scales, t.global_scale)
        assert torch.equal(back.codes, t.codes) and torch.equal(byte(back.block_scales), byte(t.block_scales))
        assert back.granularity == t.granularity and back.codes.is_contiguous()


def test_with_scale_layout():
    t = gate_up_weight()[1]
    swizzled = layouts.with_scale_layout(t, "swizzled")
    assert layouts.with_scale_layout(t, "linear") is t
    assert torch.equal(byte(layouts.with_scale_layout(swizzled, "linear").block_scales), byte(t.block_scales))


# ---------------------------------------------------------------- groups


def test_group_offsets_by_hand():
    sizes = torch.tensor([0, 1, 127, 128, 129, 0], dtype=torch.int32)
    assert layouts.group_offsets(sizes).tolist() == [0, 128, 256, 384, 640, 640]
    assert layouts.group_offsets(sizes).dtype == torch.int32
    assert layouts.group_offsets(sizes[:0]).shape == (0,)


def test_torch_offsets_are_real_ends():
    sizes = torch.tensor([0, 1, 127, 128, 129, 0], dtype=torch.int32)
    offsets, back = layouts.from_torch_offsets(sizes.cumsum(0, dtype=torch.int32))
    assert torch.equal(back, sizes) and torch.equal(offsets, layouts.group_offsets(sizes))


def test_padded_rows_keep_group_and_order():
    sizes = [0, 1, 127, 128, 129, 0, 3]
    rows = layouts.padded_rows(torch.tensor(sizes, dtype=torch.int32), sum(sizes))
    starts = np.concatenate([[0], np.cumsum([-(-n // 128) * 128 for n in sizes])])
    expected = [starts[g] + i for g, n in enumerate(sizes) for i in range(n)]
    assert rows.tolist() == expected and rows.dtype == torch.int64
    assert layouts.padded_rows(torch.tensor([5], dtype=torch.int32), 0).shape == (0,)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 2, 4), (3, 1, 2), (4, 2, 3)])
def test_max_group_rows_holds_every_routing(tokens, top_k, experts):
    """All ways to give T k rows to E experts, at most T each; padded to 128 none exceeds the bound."""
    largest = max(
        sum(-(-n // 128) * 128 for n in sizes)
        for sizes in itertools.product(range(tokens + 1), repeat=experts)
        if sum(sizes) == tokens * top_k
    )
    assert largest <= layouts.max_group_rows(tokens, top_k, experts)
    assert layouts.max_group_rows(tokens, top_k, experts) % 128 == 0


def test_max_group_rows_by_hand():
    assert layouts.max_group_rows(1, 6, 256) == 768  # six rows, each in a tile of its own
    assert layouts.max_group_rows(1000, 4, 8) == 5120  # ceil((4000 + 8 * 127) / 128) * 128


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: swizzle_scales(torch.ones(4, 4)), TypeError, "scales must be float8_e4m3fn or uint8"),
        (lambda: swizzle_scales(torch.ones(4).byte()), ValueError, "2 or 3 dimensions"),
        (lambda: unswizzle_scales(torch.ones(128, 4).byte(), 129, 4), ValueError, r"must be \(256, 4\)"),
        (
            lambda: swizzle_scales(torch.ones(4, 4).byte(), out=torch.ones(128, 4).byte().to("meta")),
            ValueError,
            "out must be on cpu like the scales, got meta",
        ),
        (lambda: layouts.from_k_packed(None, None, None), TypeError, "codes must be a tensor, got NoneType"),
        (lambda: interleave_gate_up(torch.ones(24, 4)), ValueError, "multiple of 8 rows each, got 24"),
        (lambda: interleave_gate_up(torch.ones(16), dim=1), ValueError, "dim 1 is out of range"),
        (lambda: interleave_gate_up(gate_up_weight()[1], dim=0), ValueError, "dim must be -2"),
        (lambda: layouts.group_offsets(torch.ones(3)), TypeError, "sizes must be an int32"),
        (lambda: layouts.group_offsets(torch.ones(3, 1).int()), ValueError, r"sizes must be \(G,\)"),
        (lambda: layouts.with_scale_layout(gate_up_weight()[1], "tiled"), ValueError, "'tiled'"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_graph():
    def step(w, sizes):
        t = interleave_gate_up(quantize_nvfp4(w, scale_layout="swizzled"))
        offsets, real = layouts.from_torch_offsets(sizes.cumsum(0, dtype=torch.int32))
        return dequantize_nvfp4(t), offsets, real, layouts.padded_rows(real, 7)

    args = (torch.randn(48, 64), torch.tensor([3, 0, 4], dtype=torch.int32))
    for got, expected in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["swizzle_scales", "unswizzle_scales"])
@pytest.mark.parametrize("form", ["", "_out"])
def test_opcheck(name, form):
    scales = torch.randint(0, 255, (130, 5), dtype=torch.uint8)
    args = (scales,) if name == "swizzle_scales" else (swizzle_scales(scales), 130, 5)
    if form:
        args = (*args, torch.zeros_like(OPS[name](*args)))
    torch.library.opcheck(getattr(torch.ops.dsv4lab, name + form).default, args)
