"""Whole kernels with tensor cores against torch: exact if no sum is rounded, else within a derived bound."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import device

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, I8, I32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32
UGLY = (200, 104, 136)


@pytest.fixture
def run(gpu_kernels):
    """A function that runs a case of a module and checks every buffer; it returns the device."""

    def run(arch, module, name="case", *, seed=0, mma="exact", **parameters):
        case = getattr(gpu_kernels(module), name)(**parameters)
        with device(arch, seed=seed, mma=mma) as gpu:
            placed = case.run(gpu.from_torch)
        case.check(placed)
        return gpu

    return run


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("dtype", "target", "exact", "transposed"),
    [(BF16, F32, True, (False, False)), (F16, F32, False, (True, False)), (BF16, BF16, False, (True, True))],
)
def test_mma_sync(arch, dtype, target, exact, transposed, run):
    a, b = transposed
    shape = (70, 50, 40)
    run(
        arch,
        "warp_gemm",
        dtype=dtype,
        target=target,
        shape=shape,
        exact=exact,
        a_transposed=a,
        b_transposed=b,
    )


@pytest.mark.parametrize(
    ("dtype", "target", "exact", "tile", "majors"),
    [
        (BF16, F32, True, (64, 64, 64), "kk"),
        (BF16, BF16, False, (128, 32, 32), "kk"),
        (F16, F32, True, (64, 128, 16), "kk"),
        (F16, F32, False, (64, 64, 64), "mk"),
        (BF16, F32, True, (64, 64, 32), "km"),
        (F16, F16, False, (128, 32, 64), "mm"),
        (E4M3, F32, True, (64, 64, 128), "kk"),
        (E4M3, F32, False, (64, 64, 128), "kk"),
        (E5M2, BF16, True, (64, 32, 64), "kk"),
    ],
)
def test_wgmma(dtype, target, exact, tile, majors, run):
    shape = (200, 104, 144) if dtype.itemsize == 1 else UGLY
    run(
        "sm_90a", "wgmma_gemm", dtype=dtype, target=target, shape=shape, exact=exact, tile=tile, majors=majors
    )


@pytest.mark.parametrize(("dtype", "exact"), [(BF16, True), (F16, False), (E4M3, True)])
def test_wgmma_with_a_from_registers(dtype, exact, run):
    tile, shape = ((64, 64, 128), (70, 56, 144)) if dtype is E4M3 else ((64, 64, 64), (70, 56, 72))
    options = {"dtype": dtype, "target": F32, "shape": shape, "exact": exact, "tile": tile}
    run("sm_90a", "wgmma_gemm", **options, from_registers=True)


@pytest.mark.parametrize(("dtype", "exact"), [(BF16, True), (F16, False)])
def test_hopper_pipeline(dtype, exact, run):
    run("sm_90a", "hopper_pipeline", dtype=dtype, target=dtype, shape=(300, 200, 328), exact=exact)


@pytest.mark.parametrize(
    ("dtype", "target", "exact", "tile", "majors"),
    [
        (BF16, F32, True, (128, 64, 64), "kk"),
        (F16, BF16, False, (128, 64, 32), "kk"),
        (F16, F32, True, (128, 64, 64), "mk"),
        (BF16, F32, True, (128, 32, 32), "km"),
        (F16, F32, False, (128, 64, 64), "mm"),
        (BF16, F32, True, (64, 64, 64), "kk"),
        (F16, F16, True, (128, 64, 64), "kk"),
        (F32, F32, True, (128, 64, 32), "kk"),
        (E4M3, F32, True, (128, 64, 128), "kk"),
        (E5M2, F32, False, (128, 64, 64), "mm"),
        (I8, I32, True, (128, 64, 128), "kk"),
    ],
)
def test_tcgen05(dtype, target, exact, tile, majors, run):
    shape = (208, 112, 144) if dtype.itemsize == 1 else UGLY
    run(
        "sm_100a",
        "tcgen05_gemm",
        dtype=dtype,
        target=target,
        shape=shape,
        exact=exact,
        tile=tile,
        majors=majors,
    )


@pytest.mark.parametrize(
    ("dtype", "tile", "cluster", "two"),
    [
        (BF16, (256, 128, 64), (2, 1), True),
        (F16, (256, 64, 64), (4, 2), True),
        (BF16, (128, 64, 64), (2, 1), True),
        (E4M3, (256, 64, 128), (2, 1), True),
        (BF16, (128, 64, 64), (2, 2), False),
    ],
)
def test_tcgen05_in_clusters(dtype, tile, cluster, two, run):
    options = {"dtype": dtype, "target": F32, "shape": (300, 200, 208), "exact": True}
    run("sm_100a", "tcgen05_gemm", **options, tile=tile, cluster=cluster, two=two)


@pytest.mark.parametrize(("dtype", "columns", "exact"), [(BF16, 32, True), (F16, 64, False)])
def test_tcgen05_with_a_from_tensor_memory(dtype, columns, exact, run):
    run("sm_100a", "tensor_memory", "gemm_case", dtype=dtype, columns=columns, exact=exact)


@pytest.mark.parametrize(
    ("kind", "target", "exact", "tile"),
    [
        ("nvfp4", F32, True, (128, 128, 256)),
        ("nvfp4", BF16, False, (128, 256, 256)),
        ("mxfp4", F32, True, (128, 128, 256)),
        ("mxfp8", F32, True, (128, 128, 128)),
        ("mxfp8", BF16, False, (128, 128, 128)),
    ],
)
def test_block_scaled(kind, target, exact, tile, run):
    run("sm_100a", "scaled_gemm", kind=kind, target=target, shape=(200, 136, 544), exact=exact, tile=tile)


@pytest.mark.parametrize(("kind", "tile"), [("nvfp4", (256, 128, 256)), ("mxfp8", (256, 128, 128))])
def test_block_scaled_by_two_ctas(kind, tile, run):
    options = {"kind": kind, "target": F32, "shape": (500, 136, 544), "exact": True}
    run("sm_100a", "scaled_gemm", **options, tile=tile, two=True)


def test_persistent_block_scaled(run):
    """Five tiles by two CTAs: each multiplies into one accumulator while the other one is stored."""
    run("sm_100a", "scaled_gemm", kind="nvfp4", target=BF16, shape=(600, 128, 576), exact=True, clusters=2)


@pytest.mark.parametrize("shape", [(600, 200, 136), (300, 2500, 64)])
def test_scheduled_by_launch_control(shape, run):
    """With the second shape there are more clusters than are resident together."""
    run("sm_100a", "scheduled_gemm", dtype=BF16, target=F32, shape=shape, exact=True)


@pytest.mark.parametrize(("in_shared", "exact"), [(True, True), (False, True), (True, False)])
def test_grouped(in_shared, exact, run):
    shapes = ((100, 64, 128), (300, 136, 72), (17, 40, 200))
    run("sm_100a", "grouped_gemm", dtype=BF16, shapes=shapes, exact=exact, in_shared=in_shared)


RING = ("sm_90a", "hopper_pipeline", {"dtype": F16, "target": F16, "shape": (300, 128, 200)})
ROUNDED = [
    ("sm_90a", "warp_gemm", {"dtype": F16, "shape": (70, 50, 40)}),
    ("sm_90a", "wgmma_gemm", {"dtype": E4M3, "shape": (70, 56, 144), "tile": (64, 64, 128)}),
    RING,
    ("sm_100a", "tcgen05_gemm", {"dtype": BF16, "shape": UGLY}),
    ("sm_100a", "tcgen05_gemm", {"dtype": E5M2, "shape": (208, 112, 144), "tile": (128, 64, 128)}),
    ("sm_100a", "scaled_gemm", {"kind": "nvfp4", "shape": (200, 136, 544)}),
    ("sm_100a", "scaled_gemm", {"kind": "mxfp8", "shape": (200, 136, 288), "tile": (128, 128, 128)}),
]
TWO = {"tile": (256, 64, 64), "cluster": (4, 2), "two": True}
TWO_SCALED = {"kind": "nvfp4", "tile": (256, 128, 256), "two": True, "clusters": 1}
ORDERS = [
    RING,
    ("sm_100a", "tcgen05_gemm", TWO | {"dtype": BF16, "target": F32, "shape": (300, 128, 200)}),
    ("sm_100a", "scaled_gemm", TWO_SCALED | {"target": F32, "shape": (500, 256, 320)}),
    ("sm_100a", "grouped_gemm", {"dtype": F16, "shapes": ((130, 64, 64), (40, 72, 72), (20, 8, 136))}),
]


@pytest.mark.parametrize(("arch", "module", "parameters"), ROUNDED)
def test_the_arithmetic_of_the_hardware(arch, module, parameters, run):
    run(arch, module, mma="hardware", exact=False, **{"target": F32} | parameters)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("arch", "module", "parameters"), ORDERS)
def test_any_order_of_warps_and_copies(arch, module, parameters, seed, run):
    run(arch, module, seed=seed, exact=True, **parameters)
