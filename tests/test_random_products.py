"""Products of random sizes: the reference passes its bounds, and what is wrong anywhere does not."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from dsv4lab.bench import checks
from dsv4lab.bench.checks import WrongResult
from dsv4lab.bench.random_products import Product, draw, needed, run_many
from dsv4lab.formats import NVFP4Tensor, scales_shape

CPU = torch.device("cpu")


def test_the_reference_is_right():
    r = random.Random(0)
    run_many([draw(r) for _ in range(25)], "reference", CPU)


def test_draws_differ_and_repeat():
    first, again = ([draw(random.Random(seed)) for _ in range(1)] for seed in (3, 3))
    assert first == again
    r = random.Random(0)
    products = [draw(r) for _ in range(300)]
    assert len(set(products)) > 290
    assert {p.output for p in products} == {"mm", "swiglu", "nvfp4"}
    assert any(0 in p.sizes for p in products) and any(p.k % 64 for p in products)
    assert needed(products, "hopper", CPU) == {}  # there is no GPU to compile for


PRODUCTS = [
    Product(96, 64, (3, 0, 130)),
    Product(96, 64, (5,), grouped=False, activations="nvfp4", b_scale="halves"),
    Product(64, 64, (3, 0, 130), activations="nvfp4", a_scale="group", output="swiglu"),
    Product(64, 64, (3, 9), output="nvfp4"),
    Product(64, 64, (3, 9), output="nvfp4", swizzled=False, limit=None),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: f"{p.output}-{p.activations}")
def test_one_wrong_number_is_refused(product):
    given = product.make(CPU)
    result = product.run(given, "reference")
    product.check(given, result)
    for group, start, stop in product.spans(given[2]):
        for row in {start, stop - 1}:
            with pytest.raises(WrongResult, match="wrong in"):
                product.check(given, spoiled(product.run(given, "reference"), row))
        assert group < len(product.sizes)


def spoiled(result, row: int):
    """The largest number of a row, off by two units in the last place, or two blocks' codes."""
    if isinstance(result, NVFP4Tensor):
        result.codes[row] ^= 0x44
        return result
    column = result[row].abs().argmax()
    result[row, column] *= 1.02
    return result


def test_scales_in_padding_must_be_zero():
    product = PRODUCTS[-1]
    given = product.make(CPU)
    result = product.run(given, "reference")
    result.block_scales.view(torch.uint8)[5, 0] = 1  # between two groups
    with pytest.raises(WrongResult, match="block scales of padding wrong in 1"):
        product.check(given, result)


def test_a_wrong_backend_is_named_with_its_product(monkeypatch):
    monkeypatch.setattr(Product, "run", lambda self, given, backend: torch.zeros(5, 64, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match=r"number 0, Product\(k=96, n=64, sizes=\(5,\).*wrong in"):
        run_many([PRODUCTS[1]], "reference", CPU)


def test_swizzled_output_is_read_in_its_order():
    product = PRODUCTS[3]
    given = product.make(CPU)
    swizzled = product.run(given, "reference")
    linear = dataclasses.replace(product, swizzled=False).run(given, "reference")
    assert swizzled.block_scales.shape == scales_shape(linear.shape, "swizzled")
    product.check(given, linear)
    wrong = swizzled.block_scales.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    with pytest.raises(WrongResult):
        product.check(given, swizzled.with_(block_scales=wrong))


def test_codes_are_held_to_the_values_that_could_be():
    y = torch.tensor([[6.0, 2.5] * 8]).double()
    t = NVFP4Tensor(
        torch.full((1, 8), 0x47, dtype=torch.uint8), torch.ones(1, 1).to(torch.float8_e4m3fn), torch.ones(())
    )
    checks.encoded(t, y, torch.zeros_like(y))  # 2.5 is a tie, and may be 2 (code 4) or 3
    checks.encoded(t.with_(codes=t.codes ^ 0x10), y, torch.zeros_like(y))
    with pytest.raises(WrongResult, match="codes wrong in 8 of 16"):
        checks.encoded(t.with_(codes=t.codes ^ 0x70), y, torch.zeros_like(y))
    with pytest.raises(WrongResult, match="signs"):
        checks.encoded(t.with_(codes=t.codes ^ 0x80), y, torch.zeros_like(y))
