"""What is measured: each operation at a shape, with inputs, a check of the result, bytes and flops to count.

Cases are data that a benchmark and a kernel's tests can share: `Case("linear", (16, 256, 128))` makes random
inputs, runs them on a backend, and refuses a wrong result by formulas of its own (see `checks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..formats import BLOCK, SCALE_DTYPE, NVFP4Tensor
from ..gemm import grouped_mm, grouped_mm_swiglu
from ..gemm_arguments import operands
from ..layouts import swizzle_scales, with_scale_layout
from ..ops import resolve_backend
from ..policies import bound_global_scale
from ..quantize import (
    dequantize_nvfp4,
    mhc_rmsnorm_quantize,
    quantize_nvfp4,
    rmsnorm_quantize,
    swiglu_quantize,
)
from . import checks, inputs
from .inputs import LIMIT

MOST_GROUPS = 24
"""Whose results are checked before they are timed; tests check all of them."""


@dataclass(frozen=True)
class Kind:
    """An operation as it is measured.

    Args:
        op: the registered operator that it runs.
        dims: names of the numbers in a shape: T tokens, K contraction, N outputs, G groups, k groups a token
            goes to. Of the quantizing kinds K is the width of the result.
        function: the public function; takes the inputs, and `backend`.
        make: (generator, *shape) to the inputs.
        check: (result, *inputs); raises WrongResult.
        bits: the contract fixes every bit, so that any backend must equal the reference.
        reads: how often the first input must be read.
    """

    op: str
    dims: tuple[str, ...]
    function: Callable
    make: Callable
    check: Callable
    bits: bool = False
    reads: int = 1


def _quantize(policy: str, reads: int) -> Kind:
    return Kind(
        "quantize", ("T", "K"), quantize_nvfp4, lambda r, t, k: (inputs.normal(r, t, k), policy),
        lambda q, x, _: checks.quantized(q, x.double()), bits=True, reads=reads,
    )  # fmt: skip


def _gemm(op: str, grouped: bool, w4a16: bool) -> Kind:
    swiglu, quantized = op != "grouped_mm", op == "grouped_mm_swiglu_quantize"
    make = partial(inputs.grouped, interleaved=swiglu) if grouped else inputs.linear
    function, limit = grouped_mm, None
    if swiglu:
        function = partial(grouped_mm_swiglu, limit=LIMIT, output="nvfp4" if quantized else "bf16")
        limit = LIMIT

    def check(d, *given) -> None:
        if quantized:
            bound = torch.tensor(bound_global_scale(LIMIT), device=d.device)
            checks.require("global scale", d.global_scale == bound)
        checks.product(d, *given[:2], _some(inputs.spans(*given)), limit)

    dims = ("T", "K", "N", "G", "k") if grouped else ("T", "K", "N")
    return Kind(op, dims, function, partial(make, w4a16=w4a16), check)


def _some(spans: list) -> list:
    """At most MOST_GROUPS of the groups, spread over all: float64 takes long."""
    return spans[:: -(-len(spans) // MOST_GROUPS)] if spans else spans


KINDS: dict[str, Kind] = {
    "quantize_tensor": _quantize("tensor", reads=2),  # the largest value first
    "quantize_token": _quantize("token", reads=1),
    "rmsnorm_quantize": Kind(
        "rmsnorm_quantize", ("T", "K"), rmsnorm_quantize, inputs.rmsnorm,
        lambda q, x, weight, eps, _: checks.normalized(*q, x.double(), weight, eps),
    ),
    "mhc_rmsnorm_quantize": Kind(
        "mhc_rmsnorm_quantize", ("T", "K"), mhc_rmsnorm_quantize, inputs.mhc,
        lambda q, x, mix, weight, eps, _: checks.normalized(
            *q, (x.double() * mix.double().unsqueeze(-1)).sum(-2), weight, eps
        ),
    ),
    "swiglu_quantize": Kind(
        "swiglu_quantize", ("T", "K"), swiglu_quantize, inputs.swiglu,
        lambda q, x, limit, _: checks.quantized(
            q, checks.swiglu64(*x.double().chunk(2, -1), limit), checks.BF16_ULP
        ),
    ),
    "dequantize": Kind(
        "dequantize", ("T", "K"), dequantize_nvfp4,
        lambda r, t, k: (inputs.by_token(inputs.normal(r, t, k)),), checks.dequantized, bits=True,
    ),
    "swizzle": Kind(
        "swizzle_scales", ("T", "K"), swizzle_scales, lambda r, t, k: (inputs.scales(r, t, k // BLOCK),),
        checks.swizzled, bits=True,
    ),
} | {
    name + suffix: _gemm(op, name != "linear", bool(suffix))
    for name, op in (
        ("linear", "grouped_mm"), ("grouped_mm", "grouped_mm"), ("grouped_mm_swiglu", "grouped_mm_swiglu"),
        ("grouped_mm_swiglu_quantize", "grouped_mm_swiglu_quantize"),
    )
    for suffix in ("", "_w4a16")
}  # fmt: skip
"""By the name that a row carries. Activations are NVFP4 with token scales; w4a16 has them in bf16."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Args:
        kind: a name in KINDS.
        shape: a number for each of its dims; K % 16 == 0, k <= G, and N % 16 == 0 for the SwiGLU GEMM.

    Raises:
        ValueError: unknown kind, or a shape that does not fit.
    """

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"op {self.kind!r} is unknown; known are {', '.join(KINDS)}")
        dims = KINDS[self.kind].dims
        if len(self.shape) != len(dims):
            raise ValueError(f"shape {self.size} does not fit op {self.kind}, which needs {'x'.join(dims)}")
        sizes = dict(zip(dims, self.shape, strict=True))
        rules = {
            "numbers from 1 on": min(self.shape) >= 1,
            "K % 16 == 0": sizes["K"] % BLOCK == 0,
            "N % 16 == 0": "swiglu" not in self.kind or sizes.get("N", 0) % 16 == 0,
            "k <= G": sizes.get("k", 0) <= sizes.get("G", 0),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"shape {self.size} of op {self.kind} needs {' and '.join(broken)}")

    @property
    def op(self) -> str:
        """The registered operator."""
        return KINDS[self.kind].op

    @property
    def size(self) -> str:
        """The shape as it is typed and printed, such as 16x256x128."""
        return "x".join(map(str, self.shape))

    @property
    def memory(self) -> int:
        """About how many bytes it takes on a CPU, to decode weights to fp32 or to check in fp64."""
        return 64 * math.prod(self.shape) if len(self.shape) == 2 else 16 * math.prod(self.shape[1:4])

    def make(self, device: torch.device | str, seed: int = 0) -> tuple:
        """Random inputs, others for another seed."""
        return KINDS[self.kind].make(torch.Generator(device).manual_seed(seed), *self.shape)

    @property
    def fp4(self) -> bool:
        """Whether it multiplies FP4 by FP4."""
        return len(self.shape) > 2 and not self.kind.endswith("_w4a16")

    def backend(self, name: str | None, device: torch.device | str) -> str:
        """What will run it, see `ops.resolve_backend`: not every backend takes every kind of operands."""
        return resolve_backend(name, device, self.op, self._arguments())

    def _arguments(self) -> tuple | None:
        """The operands for one row of zeros and weights without values; None if all do."""
        if len(self.shape) == 2:
            return None
        _, k, n, *_ = self.shape
        row = torch.zeros(1, k, dtype=torch.bfloat16)
        codes = torch.empty(n, k // 2, dtype=torch.uint8)
        weight = NVFP4Tensor(codes, torch.empty(n, k // BLOCK, dtype=SCALE_DTYPE), torch.ones(()))
        return operands(inputs.by_token(row) if self.fp4 else row, weight, None, None)[0]

    def ready(self, given: tuple, backend: str | None) -> tuple:
        """The inputs as a backend's layers hand them over: kernels multiply with swizzled block scales."""
        if len(self.shape) == 2 or backend == "reference":
            return given
        return tuple(with_scale_layout(x, "swizzled") if isinstance(x, NVFP4Tensor) else x for x in given)

    def run(self, given: tuple, backend: str | None):
        """The operation on a backend."""
        return KINDS[self.kind].function(*given, backend=backend)

    def check(self, given: tuple, result, backend: str | None) -> None:
        """Refuse a result that breaks its formula, or differs from the reference where every bit is fixed.

        Raises:
            WrongResult: saying what is wrong and in how many places.
        """
        kind = KINDS[self.kind]
        kind.check(result, *given)
        if kind.bits and backend != "reference":
            leaves = (tensors(result), tensors(self.run(given, "reference")))
            for ours, reference in zip(*leaves, strict=True):
                checks.require(f"bits of {reference.dtype}", _bytes(ours) == _bytes(reference))

    def work(self, given: tuple, result) -> tuple[int, int]:
        """(bytes, flops) that it needs: each byte once a pass, none of padding and idle groups."""
        if len(self.shape) == 2:
            return _nbytes(given) + _nbytes(result) + (KINDS[self.kind].reads - 1) * given[0].nbytes, 0
        a, b, *groups = given
        sizes = [stop - start for _, start, stop in inputs.spans(*given)]
        activations = (_nbytes(a) + _nbytes(result)) * sum(sizes) / a.shape[0]
        weights = _nbytes(b) * len(sizes) / math.prod(b.shape[:-2])
        return round(activations + weights) + _nbytes(groups), 2 * sum(sizes) * math.prod(b.shape[-2:])


def tensors(tree) -> list[Tensor]:
    """All tensors in nested data."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _nbytes(tree) -> int:
    return sum(t.nbytes for t in tensors(tree))
