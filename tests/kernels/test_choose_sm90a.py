"""Which Hopper kernel multiplies: as measured on an H200 where it was, and never one that cannot run."""

from __future__ import annotations

import pytest
from dsv4lab.kernels import decode_sm90a_choice
from dsv4lab.kernels.choose_sm90a import choose
from dsv4lab.kernels.decode_sm90a_choice import CHOICES, Decode, best, cycles, most_clusters
from dsv4lab.kernels.decode_sm90a_form import CTA_BYTES, SM_BYTES, Form
from dsv4lab.kernels.gemm_sm90a_choice import Many

from dsv4lab.layouts import max_group_rows

SMS = 132


@pytest.mark.parametrize(
    ("k", "n", "rows", "choice"),
    [
        (4096, 4096, 1, Decode(2, 2, 4, 8, 2, 2)),
        (4096, 4096, 16, Decode(2, 2, 4, 16, 2, 2)),
        (3072, 7168, 1, Decode(2, 2, 4, 8, 1, 2)),
        (7168, 6144, 1, Decode(3, 1, 7, 8, 1, 2)),
        (7168, 6144, 16, Decode(3, 1, 4, 16, 1, 2)),
        (7168, 16384, 1, Decode(8, 1, 8, 8, 1)),
        (7168, 16384, 16, Decode(8, 1, 8, 16, 1)),
        (16384, 7168, 1, Decode(7, 1, 4, 8, 2, 2)),
        (16384, 7168, 16, Decode(7, 1, 8, 16, 2)),
        (8192, 1024, 1, Decode(1, 1, 8, 8, 2, 2)),
    ],
    ids=str,
)
def test_the_fastest_of_those_measured(k, n, rows, choice):
    assert choose(rows, n, k, None, SMS, False, False) == choice


def test_many_tokens_go_to_the_other_kernel():
    for k, n in ((7168, 6144), (16384, 7168), (4096, 8192)):
        assert isinstance(choose(128, n, k, None, SMS, False, False), Many)
        assert isinstance(choose(4096, n, k, None, SMS, True, False), Many)


@pytest.mark.parametrize("rows", [1, 9, 33, 4096])
def test_tiles_of_whole_blocks_where_they_are_quantized(rows):
    choice, _ = best(rows, 6144, 7168, None, SMS, True, True)
    assert choice.mmas * choice.across % 2 == 0


def test_experts_with_few_tokens_have_small_tiles():
    rows = [max_group_rows(tokens, 6, 256) for tokens in (1, 64, 256)]
    assert [best(r, 4096, 4096, 256, SMS, False, False)[0].tokens for r in rows] == [8, 8, 16]
    # A group of up to 128 tokens may have any number of them.
    assert best(8 * 128, 1024, 4096, 8, SMS, False, False)[0].tokens == 16


@pytest.mark.parametrize("activations", ["bf16", "linear"])
def test_stages_fit_into_shared_memory(activations):
    for choice in CHOICES:
        for single in (False, True):
            form = Form(
                choice.mmas, choice.across, choice.along, choice.tokens, choice.split,
                activations=activations, single=single, ctas=choice.ctas,
            )  # fmt: skip
            sums = 0 if form.overlays else form.sum_bytes
            used = form.stages * form.stage_bytes + sums + form.given_bytes + 16 * (form.stages + 1)
            assert used <= SM_BYTES // form.ctas - CTA_BYTES
            if form.overlays:
                assert form.sum_bytes <= form.stages * form.features * 64


def test_more_work_never_takes_less_time():
    for choice in CHOICES:
        assert most_clusters(choice, SMS) * choice.split <= SMS
        if decode_sm90a_choice._form(choice, False).depth:
            sizes = [(rows, n) for rows in (1, 8, 64, 512) for n in (128, 8192)]
            times = [cycles(choice, rows, n, 7168, None, SMS, False) for rows, n in sizes]
            assert times[0::2] == sorted(times[0::2]) and times[1::2] == sorted(times[1::2])
