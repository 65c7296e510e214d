"""`dsv4lab decode`: continue a text."""

from __future__ import annotations

import argparse
import sys
import time

from .common import POLICIES, add_json, add_model, command, load_model, positive, print_json, say, seed

SMALL = 1024
"""Hidden size up to which the matrices of a one-token step are too small to share between threads."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = command(commands, "decode", "Continue a text, streaming it as it comes.")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the beginning of the text")
    parser.add_argument("--max-new-tokens", type=positive, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token (default); 1 draws from the model's distribution",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="makes draws repeatable")
    parser.add_argument("--precision", choices=("bf16", "nvfp4"), default="nvfp4", help="default: nvfp4")
    parser.add_argument(
        "--activation-scale",
        choices=POLICIES,
        default="token",
        help="how NVFP4 scales activations (default: token)",
    )
    add_model(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import torch

    from dsv4lab.evaluate import is_quantized, set_precision
    from dsv4lab.model.generate import encode_bytes, stream_text

    model = load_model(args)
    if model.config.hidden_size <= SMALL:
        torch.set_num_threads(1)
    pieces = stream_text(
        model, args.prompt, args.max_new_tokens, temperature=args.temperature, seed=args.seed
    )
    if args.precision == "nvfp4" and args.activation_scale == "static" and not is_quantized(model):
        say(
            "decode: the checkpoint has no input scales: calibrating on files of the running Python's library"
        )
    set_precision(model, args.precision, args.activation_scale)
    text, seconds = _stream(pieces, None if args.json else args.prompt)
    tokens = len(seconds) - 1
    rate = (tokens - 1) / (seconds[-1] - seconds[1]) if tokens > 1 else None
    if args.json:
        print_json(
            {
                "prompt": args.prompt,
                "text": text,
                "prompt_tokens": len(encode_bytes(args.prompt)),
                "new_tokens": tokens,
                "tokens_per_second": rate,
                "precision": args.precision,
                "activation_scale": args.activation_scale if args.precision == "nvfp4" else None,
                "temperature": args.temperature,
                "seed": args.seed,
            }
        )
    elif rate:
        say(f"{tokens} tokens, {rate:.1f} tokens/s, {args.precision}")


def _stream(pieces, prompt: str | None) -> tuple[str, list[float]]:
    """The new text, and the time before it and after each token; with a prompt, prints both as they come."""
    text, seconds = [], [time.perf_counter()]
    if prompt is not None:
        _echo(prompt)
    for piece in pieces:
        text.append(piece)
        seconds.append(time.perf_counter())
        if prompt is not None:
            _echo(piece)
    if prompt is not None:
        print()
    return "".join(text), seconds[:-1]  # the last piece is what an incomplete character left behind


def _echo(text: str) -> None:
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
