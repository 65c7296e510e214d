"""What products cost, counted while they run in the emulator, and a model of the time on a B200.

The model knows two rates of the product data, of memory and of FP4 tensor cores, and nothing of latencies,
launches or caches: no kernel is faster, all are slower. It is there to see which of both a product is bound
by, and what padding wastes. It measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.bench.cases import Case
from dsv4lab.emulator import device
from dsv4lab.roofline import RATES

B200 = RATES["NVIDIA B200"]


@dataclass(frozen=True)
class Cost:
    """One product, as it was counted.

    Attributes:
        case: which.
        ctas: of the grid.
        sm_count: of the GPU.
        instructions: of all warps.
        fetched: bytes of operands that TMA brought to shared memory, each as often as it was brought.
        multiplied: operations of the tensor cores, those on padding too.
        bytes, flops: that the product needs, see Case.work.
    """

    case: Case
    ctas: int
    sm_count: int
    instructions: int
    fetched: int
    multiplied: int
    bytes: int
    flops: int

    @property
    def memory_seconds(self) -> float:
        """At a B200's bandwidth, each byte once."""
        return self.bytes / B200.copy

    @property
    def tensor_seconds(self) -> float:
        """At the rate of those of a B200's tensor cores that have a CTA, padding included."""
        return self.multiplied / (B200.fp4 * min(1, self.ctas / self.sm_count))

    @property
    def seconds(self) -> float:
        """The model."""
        return max(self.memory_seconds, self.tensor_seconds)

    def as_dict(self) -> dict:
        """Plain data; times in microseconds."""
        return {
            "op": self.case.kind,
            "shape": self.case.size,
            "ctas": self.ctas,
            "instructions": self.instructions,
            "fetched_bytes": self.fetched,
            "needed_bytes": self.bytes,
            "multiplied_flops": self.multiplied,
            "needed_flops": self.flops,
            "model_b200_us": round(self.seconds * 1e6, 4),
            "bound_by": "memory" if self.memory_seconds >= self.tensor_seconds else "tensor cores",
        }


def count(case: Case, arch: str = "sm_100a") -> Cost:
    """Run a product in the emulator.

    Raises:
        WrongResult: it is not what it must be.
    """
    given = case.make("cpu")
    ready = case.ready(given, "blackwell")
    with device(arch, checks="none", trace=False) as gpu:
        result = case.run(ready, "blackwell")
    case.check(given, result, "blackwell")
    (launch,), counters = gpu.launches, gpu.counters
    x, y, z = launch.grid
    return Cost(
        case, x * y * z, gpu.arch.sm_count, counters["instructions"], counters["tma.load_bytes"],
        counters["mma.flops"], *case.work(given, result),
    )  # fmt: skip
