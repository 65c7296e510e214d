"""One layer of a full-size model with random weights: a decode step in a CUDA graph, part by part.

`python -m dsv4lab.bench.layer --csv data/layers.csv` measures a layer of DeepSeek-V4-Flash and of Pro for 1
to 64 sequences. Events in the graph say when each part begins and ends, so that the parts follow one another
as they do in use: each finds the caches as the others leave them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers import quantize_model_
from ..layers.activation import QuantizedInput
from ..model import CSA, DeepseekV4, ModelConfig
from ..model.config import MOE
from ..model.decode_step import DecodeStep
from ..model.rope import layer_frequencies
from ..roofline import floor_seconds
from . import rows
from .measure import micro, percentiles
from .shapes import PRESETS

TOKENS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT, REPLAYS = 1024, 30
PARTS = {
    "wq_a, wkv": ("attn.wq_a", "attn.wkv"),
    "wq_b": ("attn.wq_b",),
    "compressor, indexer": ("attn.compressor", "attn.indexer"),
    "wo_a": ("attn.wo_a",),
    "wo_b": ("attn.wo_b",),
    "attention": ("attn",),
    "router": ("ffn.gate",),
    "experts": ("ffn.experts",),
    "shared expert": ("ffn.shared_experts",),
    "sum of experts": ("ffn",),
    "mHC and norms": ("",),
}
"""Modules of a block whose time is a part's; what is nested in a module is not counted with it again."""
COLUMNS = ("model", "tokens", "part", "p20_us", "p50_us", "p80_us", "floor_us", "bytes")
HEADER = (*COLUMNS, *rows.PROVENANCE)


def one_layer(config: ModelConfig, device: torch.device) -> DeepseekV4:
    """A model of a single CSA layer with routed experts, of NVFP4 with any codes, and a small vocabulary."""
    config = dataclasses.replace(
        config, num_hidden_layers=1, vocab_size=256, layer_types=(CSA,), mlp_layer_types=(MOE,),
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, r = DeepseekV4(config, device="meta"), torch.Generator(device).manual_seed(0)
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedInput) and module.nvfp4:
            state |= {f"{prefix}.{name}": t for name, t in _codes(module.weight.shape, r).items()}
    for name, t in model.state_dict().items():
        if name not in state:
            made = torch.randn(t.shape, generator=r, device=device) * t.shape[-1] ** -0.5
            state[name] = (torch.ones_like(made) if "norm" in name else made).to(t.dtype)
    model.load_state_dict(state, assign=True)
    for kind, layer_type in (("sliding", "sliding_attention"), ("compressed", CSA)):
        angle = layer_frequencies(config, layer_type, device)
        model.register_buffer(f"{kind}_angle", angle, persistent=False)
    return model.requires_grad_(False)


def _codes(shape: torch.Size, r: torch.Generator) -> dict[str, Tensor]:
    """Random codes, block scales from 0.5 to 2, and a global scale that makes outputs of a few units."""
    *lead, k = shape
    draw = {"generator": r, "device": r.device, "dtype": torch.uint8}
    return {
        "weight": torch.randint(256, (*lead, k // 2), **draw),
        "weight_scale": torch.randint(0x30, 0x41, (*lead, k // 16), **draw),
        "weight_scale_2": torch.full((1,), 0.3 * k**-0.5, device=r.device),
    }


@contextmanager
def timed(block: nn.Module, names: list[str]):
    """Record events around modules while a graph is captured.

    Yields:
        (begin, end) by name.
    """
    events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
    modules = {name: module for name in names if (module := _module(block, name)) is not None}

    def around(name: str, forward: Callable) -> Callable:
        def run(*args, **options):
            if not torch.cuda.is_current_stream_capturing():
                return forward(*args, **options)
            begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
            begin.record()
            result = forward(*args, **options)
            end.record()
            events[name] = (begin, end)
            return result

        return run

    for name, module in modules.items():
        module.forward = around(name, module.forward)
    try:
        yield events
    finally:
        for module in modules.values():
            del module.forward


def _module(block: nn.Module, name: str) -> nn.Module | None:
    for part in filter(None, name.split(".")):
        block = getattr(block, part, None)
    return block


def own_times(spent: dict[str, float]) -> dict[str, float]:
    """Seconds of modules without those of the modules in them that are listed."""

    def inside(name: str) -> list[str]:
        below = [n for n in spent if n != name and (n.startswith(name + ".") or name == "")]
        return [n for n in below if not any(n.startswith(m + ".") for m in below)]

    return {name: seconds - sum(spent[n] for n in inside(name)) for name, seconds in spent.items()}


def touched_bytes(model: DeepseekV4, tokens: int) -> dict[str, int]:
    """Bytes of weights that each part reads, by module; of routed experts, those that tokens choose."""
    block = model.layers[0]
    x = torch.randn(tokens, model.config.hidden_size, device=block.attn_norm.weight.device)
    _, chosen = block.ffn.gate(x.bfloat16())
    share = chosen.unique().numel() / model.config.n_routed_experts
    sizes = {name: _nbytes(_module(block, name)) for names in PARTS.values() for name in names}
    sizes = own_times(sizes)
    return {**sizes, "ffn.experts": round(sizes["ffn.experts"] * share)}


def _nbytes(module: nn.Module | None) -> int:
    return 0 if module is None else sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def measure(preset: str, tokens: int, model: DeepseekV4, replays: int = REPLAYS) -> list[dict]:
    """A row for each part of the layer, and one for all of it without events between the parts."""
    block, device = model.layers[0], torch.cuda.get_device_name()
    names = [name for modules in PARTS.values() for name in modules]
    ids = torch.randint(256, (replays + 3, tokens), device="cuda")
    with timed(block, names) as events, DecodeStep(model, model.new_cache(tokens, CONTEXT)) as step:
        found = []
        for token_ids in ids:
            step(token_ids)
            torch.cuda.synchronize()
            spent = {name: a.elapsed_time(b) * 1e-3 for name, (a, b) in events.items()}
            found.append(own_times(spent))
    sizes = touched_bytes(model, tokens)
    result = []
    for part, modules in PARTS.items():
        there = [name for name in modules if name in events]
        times = percentiles([sum(f[name] for name in there) for f in found[3:]])
        result.append(_row(preset, tokens, part, times, sum(sizes[name] for name in there), device))
    whole = percentiles(_whole(model, tokens, ids))
    result.append(_row(preset, tokens, "step", whole, sum(r["bytes"] for r in result), device))
    return result


def _whole(model: DeepseekV4, tokens: int, ids: Tensor) -> list[float]:
    """Seconds of a whole step in a graph, also of the embedding and a small head."""
    times = []
    with DecodeStep(model, model.new_cache(tokens, CONTEXT)) as step:
        for token_ids in ids:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step(token_ids)
            begin.record()
            step(token_ids)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
    return times[3:]


def _row(preset: str, tokens: int, part: str, times, size: int, device: str) -> dict:
    p20, p50, p80 = map(micro, times)
    floor = micro(floor_seconds(device, size, 0))
    return dict(zip(COLUMNS, (preset, tokens, part, p20, p50, p80, floor, size), strict=True))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=("nano", "flash", "pro"), default=("flash", "pro"))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--activations", choices=("nvfp4", "bf16"), default="nvfp4")
    parser.add_argument("--commit", help="for the rows, where the sources are no git checkout")
    parser.add_argument("--csv", type=Path, help="write the rows to a file")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    where = rows.provenance(device, args.commit)
    writer = None
    if args.csv:
        stream = args.csv.open("w", newline="")
        writer = csv.DictWriter(stream, HEADER, lineterminator="\n")
        writer.writeheader()
    for preset in args.presets:
        model = one_layer(PRESETS[preset](), device)
        quantize_model_(model, activation_dtype=args.activations)
        for tokens in args.tokens:
            for row in measure(preset, tokens, model):
                part = f"{preset:6} {tokens:3} {row['part']:20}"
                print(f"{part} {row['p50_us']:9.1f} us, floor {row['floor_us']}", flush=True)
                if writer:
                    writer.writerow({**row, **where})
                    stream.flush()
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
