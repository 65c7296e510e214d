"""What the quantizing kernels cost: each byte once for every pass that a policy needs, and few launches."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS

from dsv4lab import reference
from dsv4lab.emulator import device

ROWS, COLUMNS = 24, 7168
DIVISOR, EPS = 2688.0, 1e-6
THREADS = COLUMNS // 16  # which have a row, one block each
SCALE = torch.tensor(0.002)


@pytest.fixture(scope="module")
def gpu():
    with device("sm_90a") as gpu:
        yield gpu


def cost(gpu, op: str, *args) -> tuple[int, int, int]:
    """Launches of a call, and the bytes that it loads and stores."""
    outs = [torch.empty_like(t) for t in outputs(op, *args)]
    first = len(gpu.runs)
    IMPLEMENTATIONS[op](*args, *outs)
    runs = gpu.runs[first:]
    loads, stores = (sum(r.counters[f"global.{kind}_bytes"] for r in runs) for kind in ("load", "store"))
    return len(runs), loads, stores


def outputs(op: str, *args) -> tuple[torch.Tensor, ...]:
    results = getattr(reference, op)(*args)
    return results if isinstance(results, tuple) else (results,)


def codes_and_scales(rows: int) -> int:
    return rows * (COLUMNS // 2 + COLUMNS // 16)


def x(rows: int = ROWS, columns: int = COLUMNS, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_of_each_row_reads_once(gpu, dtype):
    size = dtype.itemsize * ROWS * COLUMNS
    launches, loads, stores = cost(gpu, "quantize", x(dtype=dtype), None, "token", DIVISOR, False)
    assert (launches, loads, stores) == (1, size, codes_and_scales(ROWS) + 4 * ROWS)


def test_a_known_scale_reads_once(gpu):
    launches, loads, stores = cost(gpu, "quantize", x(), SCALE, "tensor", DIVISOR, False)
    # The scale itself: all lanes of a warp read the same word; and one thread copies it.
    assert (launches, loads, stores) == (
        1, 2 * ROWS * COLUMNS + 4 * (ROWS * THREADS + 1), codes_and_scales(ROWS) + 4,
    )  # fmt: skip


def test_a_scale_of_the_tensor_reads_once_where_a_cluster_holds_it(gpu):
    for rows in (1, 2, 9, 16):
        launches, loads, stores = cost(gpu, "quantize", x(rows), None, "tensor", DIVISOR, False)
        assert (launches, loads, stores) == (1, 2 * rows * COLUMNS, codes_and_scales(rows) + 4)


def test_a_scale_of_the_tensor_reads_twice_elsewhere(gpu):
    launches, loads, stores = cost(gpu, "quantize", x(), None, "tensor", DIVISOR, False)
    # 6 CTAs of 4 rows leave a part each, two more a zero: 8 words are written, and read by each warp.
    parts = 4 * 8
    warps = ROWS * THREADS // 32
    assert launches == 2
    assert loads == 2 * 2 * ROWS * COLUMNS + warps * parts
    assert stores == codes_and_scales(ROWS) + 4 + parts


def test_swizzled_scales_are_written_once_with_their_padding(gpu):
    for rows in (1, 24, 128):
        scales = 128 * COLUMNS // 16
        launches, _, stores = cost(gpu, "quantize", x(rows), None, "token", DIVISOR, True)
        assert (launches, stores) == (1, rows * COLUMNS // 2 + scales + 4 * rows)


@pytest.mark.parametrize("streams", [1, 4])
def test_norms_read_once(gpu, streams):
    weight = torch.randn(COLUMNS).bfloat16()
    stored = codes_and_scales(ROWS) + 4 * ROWS + 4 * ROWS  # scales and 1 / rms of rows
    # The weight is read again for each row, from a cache.
    read = 2 * ROWS * COLUMNS * (streams + 1)
    if streams == 1:
        found = cost(gpu, "rmsnorm_quantize", x(), weight, EPS, None, "token", DIVISOR, False)
    else:
        mix = torch.rand(ROWS, streams)
        residuals = x(ROWS * streams).view(ROWS, streams, COLUMNS)
        found = cost(gpu, "mhc_rmsnorm_quantize", residuals, mix, weight, EPS, None, "token", DIVISOR, False)
        read += 4 * streams * ROWS * THREADS  # all lanes of a warp the same words
    assert found == (1, read, stored)


@pytest.mark.parametrize("interleaved", [False, True])
def test_swiglu_reads_once(gpu, interleaved):
    found = cost(
        gpu, "swiglu_quantize", x(ROWS, 2 * COLUMNS), 10.0, interleaved, None, "token", DIVISOR, False
    )
    assert found == (1, 4 * ROWS * COLUMNS, codes_and_scales(ROWS) + 4 * ROWS)


def test_dequantize_reads_and_writes_once(gpu):
    codes, scales, g = reference.quantize(x(), SCALE, "tensor", DIVISOR, False)
    found = cost(gpu, "dequantize", codes, scales, g, "tensor", False, False, torch.bfloat16)
    # 8 values a thread: the two of a block read its scale, and each the global one.
    threads = ROWS * COLUMNS // 8
    assert found == (1, codes.numel() + threads + 4 * threads, 2 * ROWS * COLUMNS)


def test_swizzle_reads_and_writes_once(gpu):
    scales = torch.randint(0, 256, (200, 448), dtype=torch.uint8)
    outs = (torch.empty(256, 448, dtype=torch.uint8),)
    IMPLEMENTATIONS["swizzle_scales"](scales, *outs)
    counters = gpu.runs[-1].counters
    assert (counters["global.load_bytes"], counters["global.store_bytes"]) == (200 * 448, 256 * 448)


def test_global_scales_read_once(gpu):
    assert cost(gpu, "global_scale", x(), "token", DIVISOR) == (1, 2 * ROWS * COLUMNS, 4 * ROWS)
    assert cost(gpu, "global_scale", x(16), "tensor", DIVISOR) == (1, 2 * 16 * COLUMNS, 4)
    launches, loads, stores = cost(gpu, "global_scale", x(), "tensor", DIVISOR)
    assert (launches, loads, stores) == (2, 2 * ROWS * COLUMNS + 32, 4 + 32)


def test_few_instructions_a_block(gpu):
    """PTX instructions of a thread for a block of 16 values, where each thread has up to four."""
    rows = 700
    outs = outputs("quantize", x(rows), SCALE, "tensor", DIVISOR, True)
    IMPLEMENTATIONS["quantize"](x(rows), None, "token", DIVISOR, True, *outs[:2], torch.empty(rows))
    run = gpu.runs[-1]
    assert run.launch.block[0] == 128
    # An H200 has 128 lanes an SM and cycle. At 85 % of the 4.27 TB/s of its copies, a block of 41 bytes may
    # take 335 of these: 132 SMs x 128 x 1.755 GHz / (0.85 x 4.27e12 / 41). Division takes more than one.
    assert run.counters["instructions"] * 32 / (rows * THREADS) < 335 * 0.9
