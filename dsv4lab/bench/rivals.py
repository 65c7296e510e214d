"""What an operation is compared with: the same work by plain torch, and by packages that do it too.

The first rival of a case is its baseline, which is there everywhere. Peers are optional packages that are
asked for by name; of their results is asked only that they are about right.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import NVFP4Tensor
from ..gemm import grouped_mm
from ..policies import bound_global_scale
from ..quantize import swiglu_quantize
from . import inputs
from .cases import Case
from .checks import WrongResult
from .inputs import LIMIT

Call = Callable[[], object]
FAR = 1e-2
"""Relative error from which on a peer's product is wrong: it may round each weight to bf16, 2^-9."""


@dataclass(frozen=True)
class Peer:
    """A package with a GEMM of bf16 activations and NVFP4 weights.

    Args:
        package: as it is installed.
        prepare: (activations, weight) to a function that multiplies them.
    """

    package: str
    prepare: Callable[[Tensor, NVFP4Tensor], Call]

    def version(self) -> str:
        """Package and version.

        Raises:
            ValueError: it is not installed.
        """
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{self.package} is not installed: pip install 'dsv4lab[peers]'") from None


def _quack(x: Tensor, weight: NVFP4Tensor) -> Call:
    from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

    codes, scales = prepare_w4_weight(weight.codes, weight.block_scales, "nvfp4")
    g = weight.global_scale.item()
    return lambda: gemm_w4a16(x, codes, scales, tensor_scale=g, wformat="nvfp4", n_out=weight.shape[0])


def _humming(x: Tensor, weight: NVFP4Tensor) -> Call:
    from humming.layer import HummingLayer

    n, k = weight.shape
    config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
    layer = HummingLayer(n, k, weight_config=config, torch_dtype=torch.bfloat16).to(x.device)
    g = weight.global_scale.reshape(1)
    layer.load_from_tensors(
        {"weight": weight.codes, "weight_scale": weight.block_scales, "weight_scale_2": g}
    )
    layer.transform()
    return partial(layer, x)


PEERS = {"quack": Peer("quack-kernels", _quack), "humming": Peer("humming-kernels", _humming)}


def check_peers(names: Sequence[str]) -> dict[str, str]:
    """The versions of peers.

    Raises:
        ValueError: a peer is unknown or not installed.
    """
    if unknown := [name for name in names if name not in PEERS]:
        raise ValueError(f"peer {unknown[0]!r} is unknown; known are {', '.join(PEERS)}")
    return {name: PEERS[name].version() for name in names}


def names_of(case: Case, peers: Sequence[str] = ()) -> list[str]:
    """The rivals of a case, its baseline first."""
    if len(case.shape) == 2:
        return ["copy"]
    if case.kind.startswith("linear"):
        return ["bf16 linear", *(peers if case.kind == "linear_w4a16" else ())]
    *_, groups, top_k = case.shape
    names = ["bf16 bmm" if groups == top_k > 1 else "bf16 linear" if groups == 1 else "bf16 grouped_mm"]
    return names + ["unfused"] * (case.op == "grouped_mm_swiglu_quantize")


def prepare(name: str, case: Case, given: tuple, ready: tuple, work_bytes: int, backend: str) -> Call:
    """A rival's call on the data of a case, or on other data of the same size.

    Args:
        given, ready: the inputs, and as the backend takes them.
        work_bytes: that the operation needs.
        backend: what runs the operation itself.
    """
    device = given[0].device
    if name == "copy":
        source = torch.randint(256, (work_bytes // 2,), dtype=torch.uint8, device=device)
        return partial(torch.empty_like(source).copy_, source)
    if name == "unfused":
        return partial(_unfused, ready, backend)
    if name in PEERS:
        return PEERS[name].prepare(*given[:2])
    (n, k), sizes = given[1].shape[-2:], [stop - start for _, start, stop in inputs.spans(*given)]
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    if name == "bf16 bmm":
        x, weights = draw(len(sizes), max(sizes), k), draw(len(sizes), n, k)
        return lambda: torch.bmm(x, weights.mT)
    if name == "bf16 linear" or device.type != "cuda":
        pairs = [(draw(size, k), draw(n, k)) for size in sizes]
        return lambda: [F.linear(x, weight) for x, weight in pairs]
    x, weights = draw(sum(sizes), k), draw(len(sizes), n, k)
    ends = torch.tensor(sizes, device=device).cumsum(0).int()
    return lambda: F.grouped_mm(x, weights.mT, offs=ends)


def calls(
    name: str, case: Case, sets: Sequence[tuple[tuple, tuple]], result, work_bytes: int, backend: str
) -> list[Call] | None:
    """A rival's call on each set, after one was checked; None for a peer that fails or is wrong."""
    try:
        made = [prepare(name, case, *both, work_bytes, backend) for both in sets]
        check(name, made[0](), result)
    except Exception:
        if name not in PEERS:
            raise
        return None  # it may not know the shape, and has errors of its own for that
    return made


def _unfused(ready: tuple, backend: str):
    """The GEMM, then SwiGLU and quantization in a kernel of its own, under the same scale."""
    d = grouped_mm(*ready, backend=backend)
    return swiglu_quantize(d, LIMIT, bound_global_scale(LIMIT), interleaved=True, backend=backend)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuse a peer's product that is far from ours.

    Raises:
        WrongResult: saying how far.
    """
    if name in PEERS:
        distance = (found.double() - expected.double()).norm() / expected.double().norm()
        if not distance < FAR:
            raise WrongResult(f"{name} is off by {distance:.1e}")
