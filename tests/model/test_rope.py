"""Rotary positions: frequencies, direction, and what turning back is for."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4lab.model import CSA, SLIDING, ModelConfig, Yarn
from dsv4lab.model.rope import frequencies, layer_frequencies, rotate, rotation


def test_plain_frequencies():
    assert frequencies(4, 10000.0).tolist() == pytest.approx([1.0, 0.01])


def test_yarn_of_flash():
    """Computed by hand for 64 channels, base 160000, 65536 positions, 32 and 1 turns."""
    angle = frequencies(64, 160000.0, Yarn()).double()
    plain = [160000.0 ** (-2 * i / 64) for i in range(32)]
    # corr(32) = 64 ln(65536 / 64 pi) / (2 ln 160000) = 15.45, corr(1) = 64 ln(65536 / 2 pi) / (...) = 24.70
    low, high = 15, 25
    for i in range(32):
        ramp = min(max((i - low) / (high - low), 0), 1)
        assert angle[i].item() == pytest.approx(plain[i] / 16 * ramp + plain[i] * (1 - ramp), rel=1e-5)
    assert angle[15].item() == pytest.approx(plain[15], rel=1e-6)
    assert angle[25].item() == pytest.approx(plain[25] / 16, rel=1e-6)


def test_only_compressed_layers_scale():
    config = ModelConfig.flash()
    assert torch.equal(layer_frequencies(config, SLIDING), frequencies(64, 10000.0))
    assert torch.equal(layer_frequencies(config, CSA), frequencies(64, 160000.0, config.yarn))


def test_pairs_are_interleaved_and_last():
    x = torch.tensor([[[9.0, 9.0, 1.0, 0.0, 0.0, 1.0]]])
    by = rotation(torch.tensor([1]), torch.tensor([math.pi / 2, math.pi]))
    assert torch.allclose(rotate(x, by), torch.tensor([[[9.0, 9.0, 0.0, 1.0, 0.0, -1.0]]]), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 5, 3, 16)])
def test_inverse_turns_back(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    by = rotation(torch.arange(100, 105), frequencies(8, 10000.0))
    turned = rotate(x, by)
    assert torch.equal(turned[..., :8], x[..., :8]) and (turned[..., 8:] - x[..., 8:]).abs().max() > 0.1
    assert torch.allclose(rotate(turned, by, inverse=True), x, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1))
    angle = frequencies(16, 100.0)

    def product(a: int, b: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([p]), angle)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2
