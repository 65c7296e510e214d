"""Kernels with one mistake each: the result is wrong, or the emulator says what a GPU would hide."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import EmulatorError, device
from dsv4lab.emulator.errors import DeadlockError, UninitialisedError
from dsv4lab.emulator.race_errors import ProxyError, RaceError

F32, BF16 = torch.float32, torch.bfloat16
TRANSPOSE = {"dtype": BF16, "rows": 136, "columns": 200}
WGMMA = {"dtype": BF16, "target": F32, "shape": (128, 64, 192), "exact": True, "tile": (128, 64, 64)}
RING = {"dtype": BF16, "target": BF16, "shape": (256, 64, 512), "exact": True, "blocks": 1}
TCGEN05 = {"dtype": BF16, "target": F32, "shape": (128, 64, 512), "exact": True}
SCALED = {"kind": "nvfp4", "target": F32, "shape": (256, 128, 512), "exact": True}
SHAPES = ((100, 64, 128), (300, 136, 72), (17, 40, 200))
GROUPED = {"dtype": BF16, "shapes": SHAPES, "exact": True, "blocks": 1}

WRONG = [
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "swizzle"}),
    ("sm_100a", "tcgen05_gemm", TCGEN05 | {"mutation": "swizzle"}),
    ("sm_100a", "scaled_gemm", SCALED | {"mutation": "scale layout"}),
    ("sm_100a", "scaled_gemm", SCALED | {"mutation": "first scales"}),
]

CAUGHT = [
    # Threads do not wait for the load.
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "wait"}, (RaceError, UninitialisedError), None),
    ("sm_100a", "pipelined_copy", {"count": 3000, "blocks": 3, "forget": True},
     (RaceError, UninitialisedError), None),
    ("sm_100a", "tcgen05_gemm", TCGEN05 | {"mutation": "early"}, (RaceError, UninitialisedError), None),
    # Their stores are not fenced before TMA reads them.
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "fence"}, ProxyError, "fence.proxy.async"),
    ("sm_90a", "hopper_pipeline", RING | {"mutation": "fence"}, ProxyError, "fence.proxy.async"),
    ("sm_100a", "scaled_gemm", SCALED | {"mutation": "fence"}, ProxyError, "fence.proxy.async"),
    # No barrier between threads that write and threads that read.
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "barrier"}, (RaceError, UninitialisedError), None),
    ("sm_100a", "reductions", {"dtype": F32, "rows": 2, "columns": 300, "forget_barrier": True},
     (RaceError, UninitialisedError), None),
    ("sm_90a", "wgmma_gemm", WGMMA | {"mutation": "barrier"}, RaceError, "race"),
    # Nobody arrives, or the barrier waits for bytes that never come.
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "arrive"}, DeadlockError, "no warp can go on"),
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "bytes"}, DeadlockError, "no warp can go on"),
    ("sm_90a", "hopper_pipeline", RING | {"mutation": "arrive"}, DeadlockError, "no warp can go on"),
    ("sm_100a", "tcgen05_gemm", TCGEN05 | {"mutation": "arrive"}, DeadlockError, "no warp can go on"),
    ("sm_100a", "tcgen05_gemm", TCGEN05 | {"mutation": "bytes"}, DeadlockError, "no warp can go on"),
    ("sm_90a", "warps", {"forget": True}, DeadlockError, "no warp can go on"),
    # More bytes come than were announced.
    ("sm_90a", "transpose", TRANSPOSE | {"mutation": "few bytes"}, EmulatorError, "bytes"),
    # Scales that nobody has brought to tensor memory; tensor memory that nobody gives back.
    ("sm_100a", "scaled_gemm", SCALED | {"mutation": "no scales"}, UninitialisedError, "tensor memory"),
    ("sm_100a", "tcgen05_gemm", TCGEN05 | {"mutation": "leak"}, EmulatorError, "tensor memory"),
    # A changed descriptor that is used without the fence.
    ("sm_100a", "grouped_gemm", GROUPED | {"mutation": "descriptor fence"}, EmulatorError, "fence"),
]  # fmt: skip


def names(value) -> str | None:
    if isinstance(value, dict):
        return str(value.get("mutation", "forgotten")).replace(" ", "-")
    return value if isinstance(value, str) and value.islower() and "." not in value else ""


@pytest.mark.parametrize(("arch", "module", "parameters"), WRONG, ids=names)
def test_the_result_is_wrong(arch, module, parameters, gpu_kernels):
    case = gpu_kernels(module).case(**parameters)
    with device(arch) as gpu:
        placed = case.run(gpu.from_torch)
    with pytest.raises(AssertionError, match="elements are wrong"):
        case.check(placed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("arch", "module", "parameters", "error", "message"), CAUGHT, ids=names)
def test_the_mistake_is_named(arch, module, parameters, error, message, seed, gpu_kernels):
    case = gpu_kernels(module).case(**parameters)
    with device(arch, seed=seed) as gpu, pytest.raises(error, match=message) as caught:
        case.run(gpu.from_torch)
    assert caught.value.kernel and caught.value.kernel in str(caught.value)


@pytest.mark.parametrize(("arch", "module", "parameters"), WRONG, ids=names)
def test_without_the_mistake_it_is_right(arch, module, parameters, gpu_kernels):
    case = gpu_kernels(module).case(**parameters | {"mutation": None})
    with device(arch) as gpu:
        placed = case.run(gpu.from_torch)
    case.check(placed)
