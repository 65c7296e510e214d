"""The emulator tests' kernels for sm_90a, each run in the emulator and on a GPU."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsv4lab.emulator import device

_FOLDER = Path(__file__).resolve().parents[2] / "tests" / "emulator"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, I8, I32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32
UGLY = (200, 104, 136)
ARCHITECTURE = "sm_90a"


@dataclass(frozen=True)
class Comparison:
    """A buffer of a kernel, from the emulator and from a GPU.

    Attributes:
        what: kernel, parameters and buffer.
        kind: "bits" where they must be equal, "bound" where both must keep the bound of the case; "model"
            for tensor cores again, with the bit model of them, where equality is hoped for.
        elements, differing: counts.
        worst: the largest difference of the two as a share of the bound, 0 for "bits".
    """

    what: str
    kind: str
    elements: int
    differing: int
    worst: float

    @property
    def passed(self) -> bool:
        # Each is within the bound of the exact result, so that the two are within twice the bound.
        return self.worst <= 2 if self.kind == "bound" else self.differing == 0


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(module, function, parameters) of every kernel that sm_90a runs."""
    found = [("elementwise", "case", {"source": s, "target": t, "count": 1000}) for s, t in _PAIRS]
    found += [("conversions", "case", {"source": s, "target": t}) for s, t in _CONVERSIONS]
    found += [
        ("elementwise", "add_case", {"dtype": F32, "rows": 37, "columns": 51, "passed": "dynamic"}),
        ("reductions", "case", {"dtype": F32, "rows": 3, "columns": 300}),
        ("reductions", "case", {"dtype": I32, "rows": 3, "columns": 1025}),
        ("reductions", "votes_case", {}),
        ("rows", "softmax_case", {"dtype": F32, "rows": 3, "columns": 300}),
        ("rows", "softmax_case", {"dtype": BF16, "rows": 3, "columns": 129}),
        ("rows", "rms_norm_case", {"dtype": F16, "rows": 3, "columns": 300}),
        ("divergent", "case", {"count": 300}),
        ("divergent", "common_case", {}),
        ("histogram", "case", {"count": 3000, "blocks": 3}),
        ("histogram", "kinds_case", {}),
        ("pipelined_copy", "case", {"count": 3000, "blocks": 3}),
        ("launches", "chain_case", {"count": 300, "rounds": 3}),
        ("launches", "chain_case", {"count": 300, "rounds": 3, "early": True}),
        ("launches", "persistent_case", {"count": 3000}),
        ("elementwise", "case", {"source": F32, "target": F32, "count": 1000, "nbytes": 32}),
        ("warps", "case", {}),
        ("warps", "sort_case", {"threads": 40, "count": 9}),
        ("warps", "functions_case", {}),
        ("bulk_copies", "case", {"pairs": 3}),
        ("multicast", "case", {"size": 2, "tiles": 3}),
        ("multicast", "case", {"size": 4, "tiles": 3}),
    ]
    found += [("transpose", "case", dict(zip(_TRANSPOSE, values, strict=True))) for values in _TRANSPOSED]
    found += [
        ("cluster_reduce", "case", {"size": size, "sends": sends})
        for size in (2, 8)
        for sends in (True, False)
    ]
    return found + _products()


_TENSOR_CORES = ("warp_gemm", "wgmma_gemm", "hopper_pipeline")
_PAIRS = [(F32, BF16), (BF16, F32), (F16, E4M3), (F32, F32)]
_CONVERSIONS = [(s, F32) for s in (E4M3, E5M2, BF16, F16, I8, I32)]
_CONVERSIONS += [(F32, t) for t in (E4M3, E5M2, BF16, F16, I8, I32)]
_CONVERSIONS += [(BF16, E4M3), (F16, E5M2), (E4M3, F16), (E5M2, BF16), (BF16, F16), (BF16, I32)]
_TRANSPOSE = ("dtype", "rows", "columns", "batches", "bits")
_TRANSPOSED = [
    (BF16, 200, 136, 1, 3), (F32, 20, 36, 3, 3), (F16, 40, 72, 2, 2), (F32, 20, 12, 2, 1),
    (I32, 28, 12, 1, 0), (I8, 160, 144, 1, 3),
]  # fmt: skip


def _products() -> list[tuple[str, str, dict[str, Any]]]:
    found = []
    for dtype, target, exact, a, b in (
        (BF16, F32, True, 0, 0),
        (F16, F32, False, 1, 0),
        (BF16, BF16, False, 1, 1),
    ):
        how = {"dtype": dtype, "target": target, "shape": (70, 50, 40), "exact": exact}
        found.append(("warp_gemm", "case", how | {"a_transposed": bool(a), "b_transposed": bool(b)}))
    for dtype, target, exact, tile, majors in (
        (BF16, F32, True, (64, 64, 64), "kk"),
        (BF16, BF16, False, (128, 32, 32), "kk"),
        (F16, F32, True, (64, 128, 16), "kk"),
        (F16, F32, False, (64, 64, 64), "mk"),
        (BF16, F32, True, (64, 64, 32), "km"),
        (F16, F16, False, (128, 32, 64), "mm"),
        (E4M3, F32, True, (64, 64, 128), "kk"),
        (E4M3, F32, False, (64, 64, 128), "kk"),
        (E5M2, BF16, True, (64, 32, 64), "kk"),
    ):
        shape = (200, 104, 144) if dtype.itemsize == 1 else UGLY
        how = {"dtype": dtype, "target": target, "shape": shape, "exact": exact, "tile": tile}
        found.append(("wgmma_gemm", "case", how | {"majors": majors}))
    for dtype, exact in ((BF16, True), (F16, False)):
        how = {"dtype": dtype, "target": F32, "shape": (70, 56, 72), "exact": exact, "tile": (64, 64, 64)}
        found.append(("wgmma_gemm", "case", how | {"from_registers": True}))
        how = {"dtype": dtype, "target": dtype, "shape": (300, 200, 328), "exact": exact}
        found.append(("hopper_pipeline", "case", how))
    return found


def compare() -> list[Comparison]:
    """Run every kernel both ways."""
    sys.path.insert(0, str(_FOLDER))
    return [row for module, function, how in cases() for row in _compare(module, function, how)]


def _compare(module: str, function: str, how: dict[str, Any]) -> list[Comparison]:
    case = getattr(importlib.import_module(f"gpu_kernels.{module}"), function)(**how)
    emulated = _emulated(case, "exact")
    modelled = _emulated(case, "hardware") if module in _TENSOR_CORES else emulated
    real = [tensor.cpu() for tensor in case.run(lambda tensor: tensor.cuda())]
    case.check(real)
    said = ", ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in how.items())
    buffers = [a for a in case.arguments if hasattr(a, "changes")]
    rows = []
    for number, (buffer, e, r) in enumerate(zip(buffers, emulated, real, strict=True)):
        if not buffer.changes and buffer.expected is not None:
            what = f"{module}.{function}({said}) buffer {number}"
            rows.append(_row(what, buffer.bound, e, r))
            if modelled is not emulated:
                rows.append(replace(_row(what, None, modelled[number], r), kind="model"))
    return rows


def _emulated(case: Any, mma: str) -> list[torch.Tensor]:
    with device(ARCHITECTURE, mma=mma) as gpu:
        placed = case.run(gpu.from_torch)
    case.check(placed)
    return placed


def _row(what: str, bound: torch.Tensor | None, emulated: torch.Tensor, real: torch.Tensor) -> Comparison:
    differing = int((emulated.contiguous().view(torch.uint8) != real.contiguous().view(torch.uint8)).sum())
    if bound is None:
        return Comparison(what, "bits", emulated.numel(), differing, 0.0)
    apart = (emulated.double() - real.double()).abs()
    share = torch.where(apart == 0, 0.0, apart / bound.double())
    return Comparison(what, "bound", emulated.numel(), int((apart != 0).sum()), float(share.max()))
