"""Whole kernels without tensor cores, of both architectures, against torch."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import device

BOTH = pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, I32 = torch.int8, torch.int32
E4M3, E5M2, E8M0, E2M1 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2


@pytest.fixture
def run(gpu_kernels):
    """A function that runs a case of a module and checks every buffer; it returns the device."""

    def run(arch, module, name="case", **parameters):
        case = getattr(gpu_kernels(module), name)(**parameters)
        if arch not in case.architectures:
            pytest.skip(f"not for {arch}")
        with device(arch) as gpu:
            placed = case.run(gpu.from_torch)
        case.check(placed)
        return gpu

    return run


@BOTH
@pytest.mark.parametrize(("source", "target"), [(F32, BF16), (BF16, F32), (F16, E4M3), (F32, F32)])
@pytest.mark.parametrize("count", [1, 1000])
def test_affine(arch, source, target, count, run):
    run(arch, "elementwise", source=source, target=target, count=count)


@BOTH
def test_affine_of_32_bytes(arch, run):
    run(arch, "elementwise", source=F32, target=F32, count=1000, nbytes=32)


@BOTH
@pytest.mark.parametrize(("dtype", "passed"), [(F16, "tensor"), (F32, "dynamic"), (BF16, "dynamic")])
def test_add_with_strides(arch, dtype, passed, run):
    run(arch, "elementwise", "add_case", dtype=dtype, rows=37, columns=51, passed=passed)


CONVERSIONS = [(s, F32) for s in (E4M3, E5M2, BF16, F16, I8, I32)]
CONVERSIONS += [(F32, t) for t in (E4M3, E5M2, BF16, F16, I8, I32)]
CONVERSIONS += [(BF16, E4M3), (F16, E5M2), (E4M3, F16), (E5M2, BF16), (BF16, F16), (BF16, I32)]
# These are Blackwell's.
NEW = [
    (E8M0, F32),
    (E2M1, F32),
    (E2M1, BF16),
    (F32, E8M0),
    (F32, E2M1),
    (F16, E2M1),
    (BF16, E2M1),
    (I8, BF16),
]


@BOTH
@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
def test_conversions(arch, source, target, run):
    run(arch, "conversions", source=source, target=target)


@pytest.mark.parametrize(("source", "target"), NEW)
def test_conversions_of_blackwell(source, target, run):
    run("sm_100a", "conversions", source=source, target=target)


@BOTH
@pytest.mark.parametrize(("dtype", "columns"), [(F32, 300), (F32, 7), (I32, 1025)])
def test_block_reduction(arch, dtype, columns, run):
    run(arch, "reductions", dtype=dtype, rows=3, columns=columns)


@BOTH
def test_what_lanes_tell_one_another(arch, run):
    run(arch, "reductions", "votes_case")


@BOTH
@pytest.mark.parametrize(("dtype", "columns"), [(F32, 300), (BF16, 129), (F16, 5)])
def test_softmax(arch, dtype, columns, run):
    run(arch, "rows", "softmax_case", dtype=dtype, rows=3, columns=columns)


@BOTH
@pytest.mark.parametrize(("dtype", "columns"), [(F32, 300), (BF16, 129), (F16, 5)])
def test_rms_norm(arch, dtype, columns, run):
    run(arch, "rows", "rms_norm_case", dtype=dtype, rows=3, columns=columns)


@BOTH
def test_divergent_loops(arch, run):
    run(arch, "divergent", count=300)
    run(arch, "divergent", "common_case")


@BOTH
def test_atomics(arch, run):
    run(arch, "histogram", count=3000, blocks=3)
    run(arch, "histogram", "kinds_case")


@BOTH
@pytest.mark.parametrize(("count", "blocks"), [(3000, 3), (8, 2)])
def test_pipelined_copy(arch, count, blocks, run):
    run(arch, "pipelined_copy", count=count, blocks=blocks)


@BOTH
@pytest.mark.parametrize("early", [False, True])
def test_several_launches_in_one_call(arch, early, run):
    gpu = run(arch, "launches", "chain_case", count=300, rounds=3, early=early)
    assert len(gpu.launches) == 6


@BOTH
def test_persistent_blocks(arch, run):
    run(arch, "launches", "persistent_case", count=3000)


@BOTH
def test_printing(arch, gpu_kernels, run, capfd):
    run(arch, "launches", "printing_case")
    printed = gpu_kernels("launches").printing_case().printed
    assert sorted(capfd.readouterr().out.splitlines()) == sorted(printed.splitlines())


@BOTH
@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "batches", "bits"),
    [
        (BF16, 200, 136, 1, 3), (F32, 20, 36, 3, 3), (F16, 40, 72, 2, 2), (F32, 20, 12, 2, 1),
        (I32, 28, 12, 1, 0), (I8, 160, 144, 1, 3),
    ],
)  # fmt: skip
def test_transpose_through_tma(arch, dtype, rows, columns, batches, bits, run):
    run(arch, "transpose", dtype=dtype, rows=rows, columns=columns, batches=batches, bits=bits)


@BOTH
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((100,), (64,)),
        ((20, 7), (8, 4)),
        ((20, 7, 3), (8, 4, 2)),
        ((12, 5, 3, 3), (4, 4, 2, 2)),
        ((12, 5, 3, 3, 2), (4, 4, 2, 2, 2)),
    ],
)
def test_boxes_of_every_rank(arch, shape, box, run):
    run(arch, "boxes", dtype=F32, shape=shape, box=box)


@BOTH
@pytest.mark.parametrize(("dtype", "kind"), [(I32, "add"), (I32, "min"), (I32, "max"), (BF16, "add")])
def test_boxes_reduced_into_global_memory(arch, dtype, kind, run):
    run(arch, "boxes", dtype=dtype, shape=(24, 7), box=(8, 4), kind=kind)


@BOTH
def test_bulk_copies(arch, run):
    run(arch, "bulk_copies", pairs=3)


@BOTH
def test_named_barriers(arch, run):
    run(arch, "warps")


@BOTH
def test_arrays_in_local_memory(arch, run):
    run(arch, "warps", "sort_case", threads=40, count=9)


@BOTH
def test_integer_functions(arch, run):
    run(arch, "warps", "functions_case")


TMEM = ("32x32b", "16x64b", "16x128b", "16x256b")


@pytest.mark.parametrize(
    ("store", "load"), [*zip(TMEM, TMEM[1:] + TMEM[:1], strict=True), (TMEM[3], TMEM[1])]
)
def test_tensor_memory_written_and_read(store, load, run):
    run("sm_100a", "tensor_memory", store=store, load=load)


@BOTH
@pytest.mark.parametrize("size", [2, 4])
def test_multicast(arch, size, run):
    run(arch, "multicast", size=size, tiles=3)


@BOTH
@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("size", [2, 8])
def test_cluster_reduction(arch, size, sends, run):
    run(arch, "cluster_reduce", size=size, sends=sends)


@pytest.mark.parametrize("size", [1, 2])
def test_tiles_taken_over_from_ctas_not_begun(size, gpu_kernels):
    """More CTAs than are resident together: those that have begun do the tiles of the others."""
    case = gpu_kernels("dynamic_scheduler").case(rows=60, columns=1000, size=size)
    with device("sm_100a") as gpu:
        placed = case.run(gpu.from_torch)
    case.check(placed)
    rounds = placed[3].flatten()
    assert rounds.sum() == rounds.numel()
    assert rounds.max() > 1 and rounds.min() == 0


@BOTH
def test_one_compiled_kernel_on_many_shapes(arch, gpu_kernels):
    """A function compiled once for dynamic shapes, called with others and other pointers."""
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    module = gpu_kernels("rows")
    with device(arch) as gpu:
        compiled = None
        for rows, columns in ((2, 40), (5, 300), (1, 7)):
            case = module.softmax_case(dtype=F32, rows=rows, columns=columns)
            placed = [gpu.from_torch(buffer.data) for buffer in case.arguments]
            lent = [from_dlpack(t).mark_layout_dynamic() for t in placed]
            compiled = compiled or cute.compile(case.host, *lent)
            compiled(*lent)
            case.check(placed)
    assert {launch.module for launch in gpu.launches} == {gpu.launches[0].module}
