"""Decoding: the tokens of the model's own forward, repeatable draws, text in whole characters."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.corpus import BEGIN
from dsv4lab.model import DeepseekV4
from dsv4lab.model.generate import encode_bytes, generate, stream_text


@pytest.fixture(scope="module")
def model(tiny_config):
    """In float32, so that greedy choices do not hang on rounding."""
    torch.manual_seed(3)
    model = DeepseekV4(tiny_config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


class Scripted(torch.nn.Module):
    """Stands for a model: answers with the bytes of a script, one a step."""

    def __init__(self, config, script: bytes):
        super().__init__()
        self.config, self.script, self.position = config, script, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def new_cache(self, batch, max_tokens):
        self.position = 0

    def forward(self, ids, cache, *, last_only):
        logits = torch.zeros(len(ids), 1, 256)
        logits[:, :, self.script[self.position]] = 100.0
        self.position += 1
        return logits


def test_greedy_tokens_are_those_of_the_full_forward(model):
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(1))
    tokens = torch.stack(list(generate(model, ids, 12)), 1)
    assert tokens.shape == (2, 12)
    with torch.no_grad():
        logits = model(torch.cat([ids, tokens], 1))
    assert torch.equal(tokens, logits[:, 6:-1].argmax(-1))


def test_a_seed_repeats_draws_and_another_does_not(model):
    ids = torch.zeros(1, 1, dtype=torch.int64)
    draw = lambda seed: torch.stack(list(generate(model, ids, 30, temperature=1.0, seed=seed)))  # noqa: E731
    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6)) and not torch.equal(draw(None), draw(None))


def test_draws_follow_the_distribution(model):
    """Against softmax(logits / T) of the model: a chi-square test over the sixteen likeliest first tokens."""
    temperature, rows = 0.7, 4000
    ids = torch.full((rows, 1), 65)
    with torch.no_grad():
        p = torch.softmax(model(ids[:1])[0, -1].double() / temperature, -1)
    counts = torch.bincount(next(generate(model, ids, 1, temperature=temperature, seed=0)), minlength=256)
    top = p.topk(16).indices
    observed = torch.cat([counts[top], (rows - counts[top].sum())[None]]).double()
    expected = rows * torch.cat([p[top], (1 - p[top].sum())[None]])
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < 39.25  # the 0.1 % point of chi-square with 16 degrees of freedom; the seed is fixed


def test_a_row_that_has_ended_repeats_its_stop_token(tiny_config):
    class TwoRows(Scripted):
        def forward(self, ids, cache, *, last_only):
            logits = super().forward(ids, cache, last_only=last_only)
            if self.position == 2:
                logits[1] = logits[1].roll(1, -1)
            return logits

    ids = torch.ones(2, 3, dtype=torch.int64)
    steps = list(generate(TwoRows(tiny_config, b"abzcd"), ids, 5, stop=[ord("c")]))
    assert [bytes(step.tolist()) for step in steps] == [b"aa", b"bc", b"zc", b"cc"]


def test_text_comes_in_whole_characters(tiny_config):
    script = "añ😀.".encode()
    pieces = list(stream_text(Scripted(tiny_config, script), "x", len(script)))
    assert "".join(pieces) == "añ😀." and all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(script) + 1 and pieces[1] == "" and pieces[2] == "ñ"


def test_bytes_that_are_no_text_are_marked(tiny_config):
    assert "".join(stream_text(Scripted(tiny_config, b"a\xff\xe2\x82"), "", 4)) == "a\ufffd\ufffd"


def test_the_byte_between_texts_ends_one(tiny_config):
    assert "".join(stream_text(Scripted(tiny_config, b"ab\x00cd"), "", 5)) == "ab"


def test_a_prompt_is_its_bytes_even_where_they_are_no_text():
    assert encode_bytes("é") == [BEGIN, 0xC3, 0xA9]
    assert encode_bytes(b"\xff".decode("utf-8", "surrogateescape")) == [BEGIN, 0xFF]


def test_nothing_is_asked_of_the_model_for_no_tokens(tiny_config):
    assert list(generate(Scripted(tiny_config, b""), torch.ones(1, 1, dtype=torch.int64), 0)) == []


def test_nan_logits_are_an_error(tiny_config):
    model = Scripted(tiny_config, b"a")
    model.forward = lambda ids, cache, last_only: torch.full((1, 1, 256), float("nan"))
    with pytest.raises(FloatingPointError, match="logits hold NaN"):
        next(generate(model, torch.ones(1, 1, dtype=torch.int64), 1))


@pytest.mark.parametrize("ids, options, error, message", [
    (torch.ones(1, 300), {}, TypeError, "integer tensor, got torch.float32"),
    ([[1]], {}, TypeError, "integer tensor, got list"),
    (torch.ones(3, dtype=torch.int64), {}, ValueError, r"\(B, T\) with at least one token, got \(3,\)"),
    (torch.ones(1, 0, dtype=torch.int64), {}, ValueError, "at least one token"),
    (torch.tensor([[1, 256]]), {}, ValueError, "holds 256, but ids go from 0 to 255"),
    (torch.tensor([[1, -1]]), {}, ValueError, "holds -1"),
    (torch.ones(1, 311, dtype=torch.int64), {}, ValueError, "311 tokens and 10 new ones exceed"),
    (torch.ones(1, 1, dtype=torch.int64), {"temperature": -1.0}, ValueError, "temperature must be"),
    (torch.ones(1, 1, dtype=torch.int64), {"temperature": float("nan")}, ValueError, "temperature must be"),
    (torch.ones(1, 1, dtype=torch.int64), {"max_new_tokens": -1}, ValueError, "max_new_tokens must be 0"),
])  # fmt: skip
def test_bad_arguments_are_named_before_anything_runs(tiny_config, ids, options, error, message):
    with pytest.raises(error, match=message):
        generate(Scripted(tiny_config, b""), ids, **{"max_new_tokens": 10, **options})


def test_a_model_of_words_does_not_read_text():
    class Words:
        class config:
            vocab_size = 129280

    with pytest.raises(ValueError, match="must read bytes, a vocabulary of 256, got one of 129280"):
        stream_text(Words(), "x", 1)
