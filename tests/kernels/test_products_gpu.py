"""Grouped products on a GPU, in every place against a bound that is derived from how the sums are made."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch

from dsv4lab.bench.compiling import compile_all
from dsv4lab.bench.random_products import Product, draw, needed, run_many
from dsv4lab.device import supports
from dsv4lab.formats import SCALE_DTYPE, NVFP4Tensor
from dsv4lab.gemm import grouped_mm

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
RANDOM = 150
"""How many; `-m slow` runs 10,000."""


@pytest.fixture(scope="module")
def backend():
    """Kernels for this GPU; all that the tests of this file take are compiled at once, in parallel."""
    name = next((name for name in ("hopper", "blackwell") if supports(name)), None)
    if name is None:
        pytest.skip("no kernels for this GPU")
    listed = [*one_group(), *one_group_swiglu(), *experts(), *(p for s in SPLITS for p in split(s))]
    products = [p for p in with_activations(name, listed)]
    compile_all(needed(products, name, GPU), GPU)
    return name


def kinds(backend: str) -> tuple[str, ...]:
    return ("nvfp4",) if backend == "blackwell" else ("nvfp4", "bf16")


def with_activations(backend: str, products: list[Product]) -> list[Product]:
    """With every kind of activations that the backend multiplies."""
    return [dataclasses.replace(p, activations=kind) for p in products for kind in kinds(backend)]


def check(backend: str, products: list[Product]) -> None:
    run_many(with_activations(backend, products), backend, GPU)


SIZES = [(4096, 4096), (7168, 6144), (3072, 7168), (8192, 1024), (1040, 72), (16, 8)]
SPLITS = [(3, 0, 0, 130, 1), (0,) * 9, (0, 0, 5), (128, 128), (1,) * 48, (513, 0, 1)]


def one_group() -> list[Product]:
    tokens = (0, 1, 7, 16, 33, 64, 128, 300)
    return [Product(*size, (t,), grouped=False) for size in SIZES for t in tokens]


def one_group_swiglu() -> list[Product]:
    products = []
    for output in ("swiglu", "nvfp4"):
        products += [Product(2048, 1024, (t,), grouped=False, output=output) for t in (1, 16, 64, 200)]
        products.append(
            Product(7168, 6144, (17,), grouped=False, output=output, b_scale="halves", limit=None)
        )
    return products


def split(sizes: tuple[int, ...]) -> list[Product]:
    products = []
    for output in ("mm", "swiglu", "nvfp4"):
        for a_scale, b_scale in (("token", "one"), ("group", "halves"), ("tensor", "group")):
            wide = Product(512, 320, sizes, output=output, a_scale=a_scale, b_scale=b_scale)
            products += [wide, dataclasses.replace(wide, k=1040, n=96, swizzled=False)]
    return products


def experts() -> list[Product]:
    """256 experts, top 6 of 64 tokens: many groups hold few rows, some none."""
    chosen = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)).topk(6).indices
    sizes = tuple(torch.bincount(chosen.flatten(), minlength=256).tolist())
    assert 0 in sizes
    return [Product(1024, 512, sizes, output="nvfp4"), Product(256, 1024, sizes)]


def test_one_group_from_one_token_to_many(backend):
    check(backend, one_group())


def test_swiglu_of_one_group(backend):
    check(backend, one_group_swiglu())


@pytest.mark.parametrize("sizes", SPLITS)
def test_groups_of_any_size(backend, sizes):
    check(backend, split(sizes))


def test_experts_of_a_model(backend):
    check(backend, experts())


@pytest.mark.parametrize("groups", [1, 3])
def test_one_hot_rows_give_the_weights_themselves(backend, groups):
    """A weight has 6 significant bits, so that its product with 1 is exact in bf16: no error is allowed."""
    k, n = 512, 256
    product = Product(k, n, (k,) * groups)
    _, b, offsets, sizes = product.make(GPU)
    scales = torch.randint(0x30, 0x50, b.block_scales.shape, device=GPU, dtype=torch.uint8).view(SCALE_DTYPE)
    b = b.with_(block_scales=scales, global_scale=torch.ones((), device=GPU))
    hot = torch.eye(k, device=GPU).repeat(groups, 1)
    want = reference(b)
    for kind in kinds(backend):
        x = one_hot(hot) if kind == "nvfp4" else hot.bfloat16()
        d = grouped_mm(x, b, offsets, sizes, backend=backend)
        for group in range(groups):
            assert torch.equal(d[group * k : (group + 1) * k].T, want[group].bfloat16()), (kind, group)


def one_hot(hot: torch.Tensor) -> NVFP4Tensor:
    """Code 2 is 1; block scales of 1."""
    codes = (hot * 2).to(torch.uint8)
    scales = torch.full((hot.shape[0], hot.shape[1] // 16), 0x38, device=GPU, dtype=torch.uint8)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return NVFP4Tensor(packed, scales.view(SCALE_DTYPE), torch.ones((), device=GPU), granularity="tensor")


def reference(b: NVFP4Tensor) -> torch.Tensor:
    from dsv4lab.bench.checks import decode64

    return decode64(b.codes, b.block_scales)


def test_the_same_bits_every_time(backend):
    for product in (
        Product(7168, 1024, (5,), grouped=False),
        Product(2048, 512, (9, 0, 140, 33), output="nvfp4"),
    ):
        given = product.make(GPU)
        runs = [product.run(given, backend) for _ in range(4)]
        if product.output == "nvfp4":
            spans = product.spans(given[2])
            runs = [torch.cat([r.codes[start:stop] for _, start, stop in spans]) for r in runs]
        assert all(torch.equal(r, runs[0]) for r in runs[1:])


def test_random_products(backend):
    random_products(backend, RANDOM)


@pytest.mark.slow
def test_ten_thousand_random_products(backend):
    random_products(backend, int(os.environ.get("DSV4LAB_PRODUCTS", "10000")), seed=1)


def random_products(backend: str, count: int, seed: int = 0) -> None:
    r = random.Random(seed)
    products = [draw(r) for _ in range(count)]
    run_many([p for p in products if p.activations in kinds(backend)], backend, GPU)


KEPT = """
import torch
from dsv4lab.bench.random_products import Product
from dsv4lab.kernels import launch
from dsv4lab.quantize import quantize_nvfp4
if {second}:
    launch._compile = None
product = Product(256, 64, (3,), grouped=False, activations="nvfp4")
given = product.make("cuda")
product.check(given, product.run(given, {backend!r}))
t = quantize_nvfp4(torch.randn(4, 64, device="cuda"), "token", backend={backend!r})
print("right")
"""


def test_a_second_process_compiles_nothing(backend, tmp_path):
    where = {**os.environ, "DSV4LAB_CACHE": str(tmp_path)}
    for second in (False, True):
        script = KEPT.format(second=second, backend=backend)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=where)
        assert done.stdout == "right\n", done.stderr
        assert len(list(tmp_path.iterdir())) >= 2
