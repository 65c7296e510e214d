"""Trains the nano model on a Python standard library: `python data/nano/train.py --library DIR --out DIR`.

One run of at most `--max-seconds` makes config.json, model.safetensors (bf16), the training log, the facts of
the run, and the list of what it was trained on. See README.md in this folder.
"""

from __future__ import annotations

import time

BEGIN = time.monotonic()  # before torch is imported: --max-seconds counts from here

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import schedule  # noqa: E402
import torch  # noqa: E402
from indexers import COUNTS, RATE, Indexers  # noqa: E402
from loop import Every, Loop  # noqa: E402
from optimizer import Optimizer  # noqa: E402
from output import Destination  # noqa: E402
from text import HeldOut, Text  # noqa: E402
from trainee import Trainee, first_weights  # noqa: E402

from dsv4lab import corpus  # noqa: E402
from dsv4lab.cli import Parser  # noqa: E402
from dsv4lab.model import CSA, ModelConfig  # noqa: E402

MATRIX_RATE, WEIGHT_DECAY = 0.02, 0.1
RATES = {
    "embed.": 1e-2, "head.weight": 4e-3, "gate.weight": 3e-3, "hc_head_fn": 1e-3, "hc_attn_fn": 1e-3,
    "hc_ffn_fn": 1e-3, "_scale": 3e-3, "": 5e-3,
}  # fmt: skip
"""Peak rates of AdamW by what a parameter's name contains, the first that fits."""


def main(argv: list[str] | None = None, begin: float | None = None) -> int:
    """Runs the command line; `begin` is when --max-seconds began to count, by time.monotonic()."""
    args = _arguments(argv)
    loop = None
    try:
        loop, facts, trained_on = prepare(args, time.monotonic() if begin is None else begin)
        if args.profile:
            from profiling import profile

            profile(loop)
            return 0
        loop.run()
        finish(loop, facts, trained_on)
    except (ValueError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        if loop is not None and loop.step:
            loop.checkpoint(loop.clock.progress(loop.step))
            print(f"\ninterrupted; --resume goes on from {loop.destination.checkpoint}", file=sys.stderr)
        return 130
    return 0


def prepare(args: argparse.Namespace, begin: float) -> tuple[Loop, dict, str]:
    """Reads the text, builds the model, and restores a checkpoint where asked."""
    device = _device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    destination = Destination(args.out, resume=args.resume, overwrite=args.overwrite or args.profile)
    files = corpus.library_files(args.library)
    train_on, (judge_on, _) = corpus.training_files(files), corpus.evaluation_files(files)
    if not judge_on:
        raise ValueError("library: no held-out file is left to validate on")
    trained_on = corpus.trained_on_text(train_on)
    config = ModelConfig.nano() if args.config is None else _read_config(args.config)
    if CSA in config.layer_types and args.context % config.sliding_window:
        raise ValueError(
            f"context: the indexers need a multiple of {config.sliding_window}, got {args.context}"
        )
    text = Text(train_on, args.batch, args.context, args.seed, device)
    held_out = HeldOut.of(judge_on, args.batch, args.context, device)
    kernels = args.kernels and device.type == "cuda"
    trainee = Trainee(config, device, args.context, compiled=args.compile, kernels=kernels)
    first_weights(trainee.model, text.modules.data)
    optimizer = Optimizer(trainee.model, matrix_rate=MATRIX_RATE * args.rate, decay=WEIGHT_DECAY, rates=RATES)
    facts = _facts(args, device, train_on, judge_on, trainee)
    identity = {
        "text": hashlib.sha256(trained_on.encode()).hexdigest(),
        "config": json.dumps(config.to_dict()),
    }
    identity |= {"seed": args.seed, "batch": args.batch, "context": args.context}
    clock = schedule.Clock(begin, args.max_seconds, args.steps)
    every = Every(args.log_every, args.validate_every, args.checkpoint_every)
    loop = Loop(trainee, optimizer, text, held_out, clock, destination, identity, every)
    if args.resume:
        loop.restore()
    print(f"{facts['parameters']:,} parameters; {text.bytes:,} bytes of text in {len(train_on)} files; "
          f"held out {held_out.bytes:,} bytes in {len(judge_on)} files, xz -9 needs "
          f"{facts['held_out']['xz_bits_per_byte']:.4f} bits per byte; {facts['device']}; "
          f"ready after {time.monotonic() - begin:.1f} s", flush=True)  # fmt: skip
    return loop, facts, trained_on


def finish(loop: Loop, facts: dict, trained_on: str) -> None:
    """Trains the indexers, judges the weights as they are saved, and moves all files to their names."""
    facts["steps"], facts["bytes_seen"] = loop.step, loop.bytes
    indexers = Indexers(loop.trainee)
    entries = loop.trainee.context // loop.trainee.model.config.csa_ratio
    counts = [count for count in COUNTS if count < entries and indexers.layers]
    loop.freeze()
    untrained = indexers.recall(loop.held_out.batches, counts)
    loop.train_indexers(indexers)
    recall = indexers.recall(loop.held_out.batches, counts)
    bits, chosen, nvfp4 = loop.judge(counts)
    config = loop.trainee.model.config
    config = replace(config, index_topk=chosen or max(entries, config.index_topk))
    facts["indexers"] = {
        "steps": indexers.steps, "rate": RATE, "divergence": indexers.curve,
        "bits_per_byte_by_entries": {"all" if c is None else str(c): round(v, 4) for c, v in bits.items()},
        "recall_by_entries": recall,
        "recall_untrained_by_entries": untrained,
    }  # fmt: skip
    facts["index_topk"] = config.index_topk
    _conclude(facts, {"bf16": bits[chosen], "nvfp4": nvfp4})
    facts["seconds"] = round(loop.seconds, 1)
    loop.destination.finish(config, loop.weights(), loop.rows, facts, trained_on)
    print(f"{loop.destination.folder}: written after {loop.seconds:.1f} s", flush=True)


def _conclude(facts: dict, bits: dict[str, float]) -> None:
    """Put the figures into `facts` and on the screen."""
    xz = facts["held_out"]["xz_bits_per_byte"]
    facts |= {
        "bits_per_byte": {k: round(v, 4) for k, v in bits.items()},
        "of_xz": {k: round(v / xz, 4) for k, v in bits.items()},
        "nvfp4_above_bf16": round(bits["nvfp4"] / bits["bf16"] - 1, 4),
    }
    for count, value in facts["indexers"]["bits_per_byte_by_entries"].items():
        recall = facts["indexers"]["recall_by_entries"].get(count)
        print(
            f"held out, bf16, {count} entries: {value:.4f} bits per byte"
            + (f", recall {recall['indexer']:.3f} (chance {recall['chance']:.3f})" if recall else "")
        )
    print(f"index_topk: {facts['index_topk']}")
    for name, value in bits.items():
        print(f"held out, {name}: {value:.4f} bits per byte, {value / xz:.4f} of what xz -9 needs")
    print(f"NVFP4 above bf16: {bits['nvfp4'] / bits['bf16'] - 1:+.2%}", flush=True)


def _facts(args, device, train_on, judge_on, trainee) -> dict:
    tests = [f for f in train_on if f.is_test]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name, "torch": torch.__version__, "python": platform.python_version(),
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "seed": args.seed, "batch": args.batch, "context": args.context, "compiled": args.compile,
        "rates": {"muon": MATRIX_RATE * args.rate, "weight_decay": WEIGHT_DECAY, "adamw": RATES},
        "schedule": {"warm_up": schedule.WARM_UP, "decay_from": schedule.DECAY_FROM,
                     "nvfp4_from": schedule.QUANTIZE_FROM,
                     "indexers_share": schedule.INDEXERS_SHARE, "modules_share": schedule.MODULES_SHARE},
        "trained_on": {"files": len(train_on), "bytes": sum(len(f.data) for f in train_on),
                       "of_them_tests": {"files": len(tests), "bytes": sum(len(f.data) for f in tests)}},
        "held_out": {"files": len(judge_on), "bytes": sum(len(f.data) for f in judge_on),
                     "xz_bits_per_byte": 8 * corpus.xz_bytes(judge_on) / sum(len(f.data) for f in judge_on)},
    }  # fmt: skip


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--library", metavar="DIR", help="standard library to train on (default: the running Python's)")
    add("--out", metavar="DIR", default="build/nano", help="receives the files (default: %(default)s)")
    add("--max-seconds", type=_positive, default=480.0, metavar="S",
        help="all that the run may take, saving included (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="stop after N steps, if that comes first")
    add("--resume", action="store_true", help="go on from the checkpoint of an unfinished run in --out")
    add("--overwrite", action="store_true", help="replace what --out holds")
    add("--device", default="auto", help="cuda, cpu or auto (default)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=32, metavar="B", help="windows in a step (default: %(default)s)")
    add("--context", type=int, default=2048, metavar="T", help="bytes in a window (default: %(default)s)")
    add("--rate", type=_positive, default=1.0, help="factor on the matrices' learning rate")
    add("--config", metavar="FILE", help="config.json of another size (default: nano)")
    for what, seconds in (("log", 5.0), ("validate", 20.0), ("checkpoint", 120.0)):
        add(
            f"--{what}-every",
            type=_positive,
            default=seconds,
            metavar="S",
            help="seconds (default: %(default)s)",
        )
    add("--no-compile", dest="compile", action="store_false", help="run the model eagerly")
    add("--no-kernels", dest="kernels", action="store_false", help="no Triton kernels, which need CUDA")
    add("--profile", action="store_true", help="time a step, show where the time goes, write nothing")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "context"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        raise ValueError(f"device: {name}: {str(error).splitlines()[0]}") from None
    return device


def _read_config(path: str) -> ModelConfig:
    try:
        return ModelConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(begin=BEGIN))
