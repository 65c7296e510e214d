"""Decoding: one prefill, then a token at a time, greedy or sampled, streamed as it comes."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from dsv4lab.corpus import BEGIN

from .decode_step import DecodeStep

BYTE_VOCABULARY = 256


def encode_bytes(text: str) -> list[int]:
    """The token ids of a text for a byte-level model, after the byte it has seen before every text."""
    return [BEGIN, *text.encode("utf-8", "surrogateescape")]


def generate(model, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0,
             seed: int | None = None, stop: Iterable[int] = (),
             graph: bool | None = None) -> Iterator[Tensor]:  # fmt: skip
    """Continue every row of a batch of prompts.

    Args:
        model: a `DeepseekV4`.
        input_ids: (B, T) int64, T >= 1, each id below the vocabulary size.
        max_new_tokens: how many tokens to add at most; with T at most the model's positions.
        temperature: 0 takes the most likely token; above, one is drawn from softmax(logits / temperature).
        seed: of the draws; None takes a fresh one.
        stop: token ids that end a row.
        graph: replay the steps after the first as one CUDA graph, see `DecodeStep`; None does so on a GPU.

    Returns:
        An iterator over the tokens of each step, (B,) int64 on the CPU: the one wait for a GPU that a token
        takes. A row that has ended repeats its stop token; the iterator ends with the last row.

    Raises:
        TypeError: input_ids is no integer tensor.
        ValueError: a shape, id, count or temperature out of range, more tokens than positions, or a graph
            asked of a CPU; while iterating, a graph of a model with hooks or observers.
        FloatingPointError: while iterating, logits that hold NaN or Inf.
        RuntimeError: while iterating, the graph could not be captured.
    """
    _check_ids(input_ids, model.config.vocab_size)
    _check_length(input_ids.shape[1], max_new_tokens, model.config.max_position_embeddings)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 or a positive number, got {temperature}")
    if graph and not input_ids.is_cuda:
        raise ValueError(f"graph=True needs input_ids on a CUDA device, got {input_ids.device}")
    graph = input_ids.is_cuda if graph is None else graph
    draws = torch.Generator(device=input_ids.device)
    draws.seed() if seed is None else draws.manual_seed(seed)
    ends = torch.tensor(sorted(stop), dtype=torch.int64)
    return _steps(model, input_ids, max_new_tokens, temperature, draws, ends, graph)


def stream_text(model, prompt: str, max_new_tokens: int, *, temperature: float = 0.0,
                seed: int | None = None, graph: bool | None = None) -> Iterator[str]:  # fmt: skip
    """Continue a text with a byte-level model, in pieces that never split a character.

    Args:
        model: a `DeepseekV4` with a vocabulary of 256 bytes.
        prompt: the beginning; may be empty.
        max_new_tokens, temperature, seed, graph: see `generate`.

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
    options = {"temperature": temperature, "seed": seed, "stop": (BEGIN,), "graph": graph}
    return _decoded(generate(model, ids, max_new_tokens, **options))


def _decoded(steps: Iterator[Tensor]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in steps:
        if (byte := token.item()) != BEGIN:
            yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)


def _steps(model, ids: Tensor, count: int, temperature: float, draws: torch.Generator, stop: Tensor,
           graph: bool) -> Iterator[Tensor]:  # fmt: skip
    if count == 0:
        return
    stop = stop.to(ids.device)
    cache = model.new_cache(ids.shape[0], ids.shape[1] + count)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    token = step = None
    with ExitStack() as captured:
        for _ in range(count):
            with torch.no_grad():  # not around the yield: the caller's own code runs there
                if token is not None and graph and step is None:
                    step = captured.enter_context(DecodeStep(model, cache))
                logits = step(token) if step else model(ids, cache, last_only=True)[:, -1]
                chosen = _choose(logits, temperature, draws)
                token = chosen if token is None else torch.where(ended, token, chosen)
                ended |= (token[:, None] == stop).any(-1)
                ids = token[:, None]
                on_host, finite, over = _read(token, logits, ended)
            if not finite:
                raise FloatingPointError("the model's logits hold NaN or Inf")
            yield on_host
            if over:
                return


def _read(token: Tensor, logits: Tensor, ended: Tensor) -> tuple[Tensor, bool, bool]:
    """The tokens on the CPU, whether the logits are finite, and whether all rows have ended, in one copy."""
    flags = torch.stack((torch.isfinite(logits).all(), ended.all()))
    *values, finite, over = torch.cat((token, flags)).tolist()
    return torch.tensor(values, dtype=torch.int64), bool(finite), bool(over)


def _choose(logits: Tensor, temperature: float, draws: torch.Generator) -> Tensor:
    """The likeliest token of each row, or one drawn: the first to arrive, at rates that are the weights.

    That is how `torch.multinomial` draws too, but on a GPU it first waits to look at its weights.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = torch.softmax(logits.float() / temperature, -1)
    return (weights / torch.empty_like(weights).exponential_(generator=draws)).argmax(-1)


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
