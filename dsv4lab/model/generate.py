"""Decoding: one prefill, then a token at a time, greedy or sampled, streamed as it comes."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dsv4lab.corpus import BEGIN

BYTE_VOCABULARY = 256


def encode_bytes(text: str) -> list[int]:
    """The token ids of a text for a byte-level model, after the byte it has seen before every text."""
    return [BEGIN, *text.encode("utf-8", "surrogateescape")]


def generate(model, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0,
             seed: int | None = None, stop: Iterable[int] = ()) -> Iterator[Tensor]:  # fmt: skip
    """Continue every row of a batch of prompts.

    Args:
        model: a `DeepseekV4`.
        input_ids: (B, T) int64, T >= 1, each id below the vocabulary size.
        max_new_tokens: how many tokens to add at most; with T at most the model's positions.
        temperature: 0 takes the most likely token; above, one is drawn from softmax(logits / temperature).
        seed: of the draws; None takes a fresh one.
        stop: token ids that end a row.

    Returns:
        An iterator over the tokens of each step, (B,) int64. A row that has ended repeats its stop token; the
        iterator ends with the last row.

    Raises:
        TypeError: input_ids is no integer tensor.
        ValueError: a shape, id, count or temperature out of range, or more tokens than positions.
        FloatingPointError: while iterating, logits that hold NaN or Inf.
    """
    _check_ids(input_ids, model.config.vocab_size)
    _check_length(input_ids.shape[1], max_new_tokens, model.config.max_position_embeddings)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 or a positive number, got {temperature}")
    draws = torch.Generator(device=input_ids.device)
    draws.seed() if seed is None else draws.manual_seed(seed)
    return _steps(model, input_ids, max_new_tokens, temperature, draws, torch.tensor(sorted(stop)))


def stream_text(model, prompt: str, max_new_tokens: int, *, temperature: float = 0.0,
                seed: int | None = None) -> Iterator[str]:  # fmt: skip
    """Continue a text with a byte-level model, in pieces that never split a character.

    Args:
        model: a `DeepseekV4` with a vocabulary of 256 bytes.
        prompt: the beginning; may be empty.
        max_new_tokens, temperature, seed: see `generate`.

    Returns:
        An iterator over pieces of text, one for each byte, empty while a character is incomplete. Bytes that
        are no UTF-8 come as U+FFFD. The byte `BEGIN`, which stands between texts, ends it.

    Raises:
        ValueError: the model's vocabulary is not bytes; see `generate`.
    """
    if model.config.vocab_size != BYTE_VOCABULARY:
        size = model.config.vocab_size
        raise ValueError(f"model must read bytes, a vocabulary of {BYTE_VOCABULARY}, got one of {size}")
    device = next(model.parameters()).device
    ids = torch.tensor([encode_bytes(prompt)], device=device)
    return _decoded(generate(model, ids, max_new_tokens, temperature=temperature, seed=seed, stop=(BEGIN,)))


def _decoded(steps: Iterator[Tensor]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in steps:
        if (byte := token.item()) != BEGIN:
            yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)


def _steps(model, ids: Tensor, count: int, temperature: float, draws: torch.Generator,
           stop: Tensor) -> Iterator[Tensor]:  # fmt: skip
    if count == 0:
        return
    stop = stop.to(ids.device)
    cache = model.new_cache(ids.shape[0], ids.shape[1] + count)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    token = None
    for _ in range(count):
        with torch.no_grad():  # not around the yield: the caller's own code runs there
            logits = model(ids, cache, last_only=True)[:, -1]
            chosen = _choose(logits, temperature, draws)
        token = chosen if token is None else torch.where(ended, token, chosen)
        yield token
        ended |= torch.isin(token, stop)
        if ended.all():
            return
        ids = token[:, None]


def _choose(logits: Tensor, temperature: float, draws: torch.Generator) -> Tensor:
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits hold NaN or Inf")
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=draws)[:, 0]


def _check_ids(input_ids: Tensor, vocabulary: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        what = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an integer tensor, got {what}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be (B, T) with at least one token, got {tuple(input_ids.shape)}")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids holds {wrong}, but ids go from 0 to {vocabulary - 1}")


def _check_length(prompt: int, new: int, positions: int) -> None:
    if new < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {new}")
    if prompt + new > positions:
        raise ValueError(
            f"prompt of {prompt} tokens and {new} new ones exceed the model's {positions} positions"
        )
