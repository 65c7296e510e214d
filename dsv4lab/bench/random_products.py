"""Grouped products of random sizes, splits and forms, each checked against float64 in every place.

`python -m dsv4lab.bench.random_products --count 10000` runs many on a GPU; tests run some, and chosen ones.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import BLOCK, SCALE_DTYPE, NVFP4Tensor
from ..gemm import grouped_mm, grouped_mm_swiglu
from ..layouts import group_offsets, swizzle_scales, unswizzle_scales
from . import checks, compiling, inputs

STEP = 16
"""Contraction of an MMA of bf16; each is off by at most 2^-23 of the sum of magnitudes."""
PARTS = 16
"""Partial sums that a kernel may add, and the two roundings of the global scales."""


@dataclass(frozen=True)
class Product:
    """Sizes and forms of a product.

    Args:
        k, n: of the weights; 2I for SwiGLU.
        sizes: rows of each group.
        grouped: with offsets; else one group that is all of the activations.
        activations: "bf16" or "nvfp4".
        a_scale: whose the activations' global scales are, "tensor", "token" or "group".
        b_scale: "one", "group" or "halves", gate and up of each group.
        swizzled: layout of the activations' block scales, and of those of the output.
        output: "mm", "swiglu" or "nvfp4", SwiGLU that is quantized.
        limit: of SwiGLU.
    """

    k: int
    n: int
    sizes: tuple[int, ...]
    grouped: bool = True
    activations: str = "bf16"
    a_scale: str = "token"
    b_scale: str = "one"
    swizzled: bool = True
    output: str = "mm"
    limit: float | None = 10.0

    def make(self, device: torch.device | str, seed: int = 0) -> tuple:
        """(a, b, offsets, sizes), the last two None for one group. Padding of bf16 is NaN."""
        r = torch.Generator(device).manual_seed(seed)
        sizes = torch.tensor(self.sizes, dtype=torch.int32, device=device)
        offsets = group_offsets(sizes)
        rows = int(offsets[-1]) if self.grouped else self.sizes[0]
        spread = (0x20, 0x50) if self.output == "mm" else (0x30, 0x41)
        a = self._activations(r, rows, offsets, spread)
        groups = len(self.sizes)
        lead = (groups,) if self.grouped else ()
        shape = {"one": (), "group": (groups,), "halves": (groups, 2)}[self.b_scale]
        g = (torch.rand(shape, generator=r, device=device) + 0.5) * self.k**-0.5
        codes = _bytes(r, *lead, self.n, self.k // 2)
        scales = _scales(r, spread, *lead, self.n, self.k // BLOCK)
        b = NVFP4Tensor(codes, scales, g, interleaved=self.output != "mm")
        return (a, b, offsets, sizes) if self.grouped else (a, b, None, None)

    def _activations(self, r, rows: int, offsets: Tensor, spread: tuple[int, int]) -> NVFP4Tensor | Tensor:
        real = torch.zeros(rows, dtype=torch.bool, device=r.device)
        for _, start, stop in self.spans(offsets):
            real[start:stop] = True
        if self.activations == "bf16":
            x = inputs.normal(r, rows, self.k)
            return torch.where(real[:, None], x, torch.nan)
        codes = _bytes(r, rows, self.k // 2)
        scales = _scales(r, spread, rows, self.k // BLOCK).view(torch.uint8) * real[:, None]
        shape = {"tensor": (), "token": (rows,), "group": (len(self.sizes),)}[self.a_scale]
        g = torch.rand(shape, generator=r, device=r.device) + 0.5
        scales, layout = scales.view(SCALE_DTYPE), "linear"
        if self.swizzled:
            scales, layout = swizzle_scales(scales, backend="reference"), "swizzled"
        return NVFP4Tensor(codes, scales, g, layout, self.a_scale)

    def spans(self, offsets: Tensor | None) -> list[tuple[int, int, int]]:
        """(group, first row, end) of the groups that hold rows."""
        starts = [0, *offsets.tolist()] if self.grouped else [0]
        return [(g, starts[g], starts[g] + n) for g, n in enumerate(self.sizes) if n]

    def run(self, given: tuple, backend: str | None):
        """The product on a backend."""
        a, b, offsets, sizes = given
        if self.output == "mm":
            return grouped_mm(a, b, offsets, sizes, backend=backend)
        more = {"output": "nvfp4", "scale_layout": "swizzled"} if self.output == "nvfp4" else {}
        if more and not self.swizzled:
            more["scale_layout"] = "linear"
        if more and self.limit is None:
            more["global_scale"] = 0.05
        return grouped_mm_swiglu(a, b, offsets, sizes, limit=self.limit, backend=backend, **more)

    def check(self, given: tuple, d: NVFP4Tensor | Tensor) -> None:
        """Refuse a result with a value outside its bound.

        Raises:
            WrongResult: saying in how many places.
        """
        for group, start, stop in self.spans(given[2]):
            exact, error = self._exact(given, group, start, stop)
            if self.output != "mm":
                limit = 2.0**60 if self.limit is None else self.limit
                exact, error = checks.swiglu_of(exact, error, limit)
            error = checks.U_BF16 * exact.abs() + (1 + checks.U_BF16) * error
            if isinstance(d, Tensor):
                checks.near(f"output of group {group}", d[start:stop], exact, error)
            else:
                checks.encoded(_rows(d, start, stop), exact, error)
        if isinstance(d, NVFP4Tensor):
            self._check_padding(given, d)

    def _exact(self, given: tuple, group: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Sums in float64, and how far those of a kernel may be from them."""
        a, b = given[:2]
        if isinstance(a, Tensor):
            x = a[start:stop].double()
        else:
            rows = _rows(a, start, stop)
            g = a.global_scale.double()
            g = {"tensor": g, "token": g.reshape(-1, 1)[start:stop], "group": g.reshape(-1)[group:][:1]}
            x = checks.decode64(rows.codes, rows.block_scales) * g[self.a_scale]
        codes, scales = (t[group] if self.grouped else t for t in (b.codes, b.block_scales))
        g = b.global_scale.double()
        g = g[group] if self.b_scale != "one" else g
        if self.b_scale == "halves":
            row = torch.arange(self.n, device=g.device)
            g = g[row // 8 % 2 if b.interleaved else (row >= self.n // 2).long()][:, None]
        w = checks.decode64(codes, scales) * g
        steps = -(-self.k // STEP) + PARTS
        return x @ w.T, x.abs() @ w.abs().T * (steps * 2 * checks.U_FP32)

    def _check_padding(self, given: tuple, d: NVFP4Tensor) -> None:
        """Block scales of rows that are padding must be zero."""
        scales = _linear(d).view(torch.uint8).clone()
        for _, start, stop in self.spans(given[2]):
            scales[start:stop] = 0
        checks.require("block scales of padding", scales == 0)


def _bytes(r: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(256, shape, generator=r, device=r.device, dtype=torch.uint8)


def _scales(r: torch.Generator, spread: tuple[int, int], *shape: int) -> Tensor:
    return torch.randint(*spread, shape, generator=r, device=r.device, dtype=torch.uint8).view(SCALE_DTYPE)


def _linear(t: NVFP4Tensor) -> Tensor:
    """Block scales of all rows in linear order."""
    if t.scale_layout == "linear":
        return t.block_scales
    return unswizzle_scales(t.block_scales, t.rows, t.K // BLOCK, backend="reference")


def _rows(t: NVFP4Tensor, start: int, stop: int) -> NVFP4Tensor:
    """Rows with linear scales, under the first global scale."""
    g = t.global_scale.reshape(-1)[0]
    return NVFP4Tensor(t.codes[start:stop], _linear(t)[start:stop], g)


def draw(r: random.Random) -> Product:
    """Sizes mostly small and often odd; a third with one group, others with up to 40, many of them empty."""
    grouped, output = r.random() < 0.7, r.choice(("mm", "mm", "swiglu", "nvfp4"))
    sizes = (int(2 ** r.uniform(0, 9)) - 1,)
    if grouped:
        often = r.random()
        sizes = tuple(
            int(2 ** r.uniform(0, 7.5)) if r.random() < often else 0 for _ in range(r.randint(1, 40))
        )
    unit = {"mm": 8, "swiglu": 16, "nvfp4": 32}[output]
    activations = r.choice(("bf16", "nvfp4"))
    return Product(
        k=16 * int(2 ** r.uniform(0, 6.5)) if r.random() < 0.4 else 64 * int(2 ** r.uniform(0, 5)),
        n=unit * max(int(2 ** r.uniform(0, 10)) // unit, 1),
        sizes=sizes,
        grouped=grouped,
        activations=activations,
        a_scale=r.choice(("tensor", "token") + ("group",) * grouped),
        b_scale=r.choice(("one", "group", "halves") if grouped else ("one", "halves")),
        swizzled=r.random() < 0.7,
        output=output,
        limit=r.choice((10.0, 7.0, None)),
    )


def needed(
    products: Sequence[Product],
    backend: str,
    device: torch.device,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict:
    """The kernels of products, see `compiling.compile_all`; none where no GPU is."""
    kernels = {}
    for i, product in enumerate(products if device.type == "cuda" else ()):
        progress(i, len(products), "looking")
        kernels |= compiling.noted(lambda p=product, i=i: p.run(p.make(device, i), backend))
    return kernels


def run_many(
    products: Iterable[Product],
    backend: str,
    device: torch.device,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> None:
    """Compile what they need in parallel, then run and check each.

    Raises:
        AssertionError: naming the product that is wrong.
    """
    products = list(products)
    compiling.compile_all(needed(products, backend, device, progress), device, progress)
    for i, product in enumerate(products):
        progress(i, len(products), "checking")
        given = product.make(device, i)
        try:
            product.check(given, product.run(given, backend))
        except checks.WrongResult as error:
            raise AssertionError(f"number {i}, {product}: {error}") from None


def main() -> None:
    """The command."""
    from dsv4lab.cli.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="hopper")
    args = parser.parse_args()
    r = random.Random(args.seed)
    with Progress("products") as progress:
        products = [draw(r) for _ in range(args.count)]
        run_many(products, args.backend, torch.device("cuda"), progress)
    print(f"{args.count} products from seed {args.seed}: none is wrong")


if __name__ == "__main__":
    main()
